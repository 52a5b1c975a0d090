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
from reproductions.pages import paragraph, table

TITLE = 'Coefficients of a pretrained checkpoint'
OF_PAPER = 'Mechanism 1'
QUESTION = paragraph("""
    Deploy's step of a channel is Tune's divided by `coeff^2` (SGD) or
    `|coeff|` (Adam), with `coeff = gamma / sqrt(var + eps)`:
    [deploy.md](../deploy.md) derives it. Which channels of the ImageNet
    MobileNetV2 that the demo starts from would step too far in Deploy mode,
    and is there a learning rate that suits all?
    """)

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


def answer(found: dict) -> str:
    """Say in a sentence what came out."""
    best = {optimizer: total['best']
            for optimizer, total in found['total'].items()}
    shares = ' and '.join(
        f'{row["share"]:.0%} with {optimizer} ({row["lr"]:.2g} times)'
        for optimizer, row in best.items())
    none = all(row['share'] < 1 for row in best.values())
    factor = f'{found["factor"]:g}'
    return (('No learning rate suits all channels. ' if none else '')
            + f"At the best one between 1/{factor} and {factor} times Tune's, "
            f'a step of Deploy is within {factor} times that of Tune in '
            f'{shares}.')


def page(found: dict) -> str:
    """Write the page."""
    totals = found['total']
    sgd = totals['SGD']
    worst = max(found['blocks'], key=lambda b: b['at_same_lr']['faster'])
    spread = table((r'\|coeff\|', *sgd['coeff']), [
        (name, *(f'{value:.2g}' for value in row['coeff'].values()))
        for name, row in (('all channels', sgd), (f'`{worst["bn"]}`', worst))
    ])
    rows = [("too far at Tune's learning rate",
             [f'{t["at_same_lr"]["faster"]:.1%}' for t in totals.values()]),
            ("too short at Tune's learning rate",
             [f'{t["at_same_lr"]["slower"]:.1%}' for t in totals.values()])]
    for index, limit in enumerate(sgd['limits']):
        rows.append((f'{limit["share"]:.1%} of the channels do not step too '
                     "far up to, times Tune's learning rate",
                     [f'{t["limits"][index]["lr"]:.2g}'
                      for t in totals.values()]))
    rows += [('within the factor at the best learning rate',
              [f'{t["best"]["share"]:.1%}' for t in totals.values()]),
             ("that learning rate, times Tune's",
              [f'{t["best"]["lr"]:.2g}' for t in totals.values()])]
    steps = table((f'factor {found["factor"]:g}', *totals),
                  [(text, *values) for text, values in rows])
    fast = [b['bn'] for b in found['blocks']
            if b['at_same_lr']['faster'] > 0.5]
    most_above = ('Most scales are above 1, where Deploy learns slower than '
                  'Tune. One channel with a small scale can be enough to '
                  'diverge, if the loss is steep there, which a checkpoint '
                  'does not say'
                  if sgd['coeff']['median'] > 1 else
                  'Most scales are below 1, so that Deploy mostly steps '
                  'farther than Tune')
    exceptions = (f'more than half of the channels step too far in '
                  f'{", ".join(f"`{name}`" for name in fast)}'
                  if fast else 'in no block do most channels step too far')
    return '\n\n'.join([
        paragraph(
            f'{sgd["channels"]} channels in {len(found["blocks"])} blocks; '
            'the second row is the block with the most channels that step '
            'too far.'), spread,
        paragraph(f'"Too far" is more than {found["factor"]:g} times as far '
                  'as Tune after the same gradients, "too short" less than '
                  f'1/{found["factor"]:g}. The limit for 100% is a bound, '
                  'the others are rules of thumb. No learning rate here is '
                  f'above {found["factor"]:g} times Tune\'s, since head and '
                  'neck have no scale, and would step too far.'), steps,
        paragraph(f'{most_above}. With SGD, {exceptions}.'),
        '## Not run here',
        paragraph('Other checkpoints: '
                  '`tools/analysis_tools/diagnose_checkpoint.py` takes any. '
                  'What it comes to in training is on the page '
                  '[accuracy](accuracy.md) for this checkpoint, with AdamW, '
                  'and on the page [mechanism](mechanism.md) for a small '
                  'network, with SGD.')
    ])


def plot(found: dict, path: Path) -> None:
    """Plot the spread of each block's coefficients."""
    plot_scales([block['coeff'] for block in found['blocks']],
                found['factor'], 'SGD', path)
