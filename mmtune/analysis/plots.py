"""Figures of what the analysis finds."""
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mmtune.analysis.blocks import Block
from mmtune.analysis.scales import POWERS, BlockScale, quantiles

__all__ = ['plot_blocks', 'plot_scales']

COLORS = {
    'Tune': 'tab:green',
    'BN trains': 'tab:orange',
    'left out': 'tab:gray'
}


def plot_blocks(blocks: Sequence[Block], path: str | Path) -> None:
    """Plot how many blocks of each part of a model run in Tune mode.

    Args:
        blocks (Sequence[Block]): From :func:`mmtune.analysis.list_blocks`.
        path (str | Path): The picture to write.
    """
    parts = list(dict.fromkeys(block.bn.split('.')[0] for block in blocks))
    counts = Counter((block.bn.split('.')[0], block.runs) for block in blocks)
    figure = Figure(
        figsize=(8, 1.5 + 0.4 * len(parts)), layout='constrained')
    axes = figure.subplots()
    left = [0] * len(parts)
    for state, color in COLORS.items():
        widths = [counts[part, state] for part in parts]
        bars = axes.barh(parts, widths, left=left, color=color, label=state)
        axes.bar_label(
            bars, [width or '' for width in widths], label_type='center')
        left = [start + width for start, width in zip(left, widths)]
    axes.invert_yaxis()
    axes.set(xlabel='blocks', title='How blocks run in a training step')
    figure.legend(loc='outside right upper')
    figure.savefig(path, dpi=120)


def plot_scales(scales: Sequence[BlockScale], factor: float, optimizer: str,
                path: str | Path) -> None:
    """Plot the spread of each block's scales.

    Args:
        scales (Sequence[BlockScale]): From
            :func:`mmtune.analysis.block_scales`.
        factor (float): By how much a step may differ from Tune's.
        optimizer (str): See :func:`mmtune.analysis.step_ratios`.
        path (str | Path): The picture to write.
    """
    figure = Figure(
        figsize=(max(7., 0.13 * len(scales)), 5), layout='constrained')
    axes = figure.subplots()
    edge = factor**(1 / POWERS[optimizer])
    axes.axhspan(
        1 / edge,
        edge,
        color='tab:green',
        alpha=0.15,
        label=f"step within {factor:g} times Tune's")
    axes.axhline(1, color='tab:green', linewidth=1)
    places = range(1, len(scales) + 1)
    spread = [quantiles(block.coeff) for block in scales]
    for low, high, width in (('min', 'max', 1), ('1%', '99%', 3)):
        axes.vlines(
            places, [row[low] for row in spread],
            [row[high] for row in spread],
            color='tab:blue',
            linewidth=width,
            label=f'{low} to {high} of the channels')
    axes.plot(
        places, [row['median'] for row in spread],
        'o',
        color='tab:red',
        markersize=3,
        label='median')
    axes.set(
        yscale='log',
        xlabel='block, in the order of the forward',
        ylabel='|gamma| / sqrt(var + eps)',
        title=f'Below the band {optimizer} steps too far in Deploy mode')
    figure.legend(loc='outside lower center', ncols=2, fontsize='small')
    figure.savefig(path, dpi=120)
