"""What the coefficients of a pretrained checkpoint say of Deploy mode."""
from pathlib import Path

import torch
from mmdet.models import MobileNetV2

from mmtune import turn_on
from mmtune.analysis import block_scales, diagnose
from mmtune.analysis.plots import plot_scales
from mmtune.analysis.scales import POWERS
from mmtune.analysis.sources import load_fitting, read_state_dict
from reproductions.material import fetch_weights
from reproductions.page import Page, cell, sheet, table

# By how much a step may differ from Tune's to be about the same.
FACTOR = 10.


def run(factor: float = FACTOR) -> dict:
    """Compute the coefficients of the checkpoint, and what they mean.

    Args:
        factor (float): By how much a step may differ from Tune's.

    Returns:
        dict: ``factor``; ``blocks``, for each its ``bn`` and what
        :func:`mmtune.analysis.diagnose` says of it under SGD; and
        ``total``, by optimizer, what it says of all of them together.
    """
    model = MobileNetV2(out_indices=(7, ))
    load_fitting(model, read_state_dict(fetch_weights()))
    scales = block_scales(model, turn_on(model, activations=False))
    coeff = torch.cat([block.coeff for block in scales])
    return dict(
        factor=factor,
        blocks=[
            dict(bn=block.bn, **diagnose(block.coeff, factor, 'SGD'))
            for block in scales
        ],
        total={
            optimizer: diagnose(coeff, factor, optimizer)
            for optimizer in POWERS
        })


def most_too_far(found: dict) -> list[str]:
    """Name the blocks in which most channels step too far with SGD."""
    return [block['bn'] for block in found['blocks']
            if block['at_same_lr']['faster'] > 0.5]


def figures(found: dict) -> dict[str, object]:
    """Write what the page shows."""
    totals = found['total']
    sgd = totals['SGD']
    worst = max(found['blocks'], key=lambda b: b['at_same_lr']['faster'])
    scales = {'all channels': sgd['coeff'], f'`{worst["bn"]}`': worst['coeff']}
    return {
        'shares': ' and '.join(
            f'{total["best"]["share"]:.0%} with {optimizer} '
            f'({total["best"]["lr"]:.2g} times)'
            for optimizer, total in totals.items()),
        'factor': f'{found["factor"]:g}',
        'channels': sgd['channels'],
        'blocks': len(found['blocks']),
        'scales': table(scales.items(), {
            r'\|coeff\|': cell('', 0),
            **{key: cell('.2g', 1, key) for key in sgd['coeff']}
        }),
        'steps': steps_table(found),
        'fast': ', '.join(f'`{name}`' for name in most_too_far(found))
    }


def steps_table(found: dict) -> str:
    """Lay out how far steps go, an optimizer a column."""
    rows = {
        "too far at Tune's learning rate":
        cell('.1%', 'at_same_lr', 'faster'),
        "too short at Tune's learning rate":
        cell('.1%', 'at_same_lr', 'slower')
    }
    for index, limit in enumerate(found['total']['SGD']['limits']):
        rows[f'{limit["share"]:.1%} of the channels do not step too far up '
             "to, times Tune's learning rate"] = cell(
                 '.2g', 'limits', index, 'lr')
    rows |= {
        'within the factor at the best learning rate':
        cell('.1%', 'best', 'share'),
        "that learning rate, times Tune's": cell('.2g', 'best', 'lr')
    }
    return sheet(f'factor {found["factor"]:g}', found['total'], rows)


def claims(found: dict) -> dict[str, bool]:
    """Tell what the page says, and whether it is so."""
    totals = found['total']
    return {
        'no learning rate suits all channels':
        all(total['best']['share'] < 1 for total in totals.values()),
        'most scales are above 1': totals['SGD']['coeff']['median'] > 1,
        'in some blocks most channels step too far':
        bool(most_too_far(found))
    }


def plot(found: dict, path: Path) -> None:
    """Plot the spread of each block's coefficients."""
    plot_scales([block['coeff'] for block in found['blocks']],
                found['factor'], 'SGD', path)


PAGE = Page(run, figures, claims, plot)
