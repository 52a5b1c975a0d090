"""Figures of what the analysis finds."""
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmtune.analysis.blocks import Block
from mmtune.analysis.modes import PAPERS_TUNE
from mmtune.analysis.scales import POWERS

__all__ = ['plot_blocks', 'plot_scales', 'plot_steps']

MODE_COLORS = {
    'Train': 'tab:gray',
    'Eval': 'tab:blue',
    'MMEngine': 'tab:orange',
    PAPERS_TUNE: 'tab:cyan',
    'Tune': 'tab:green',
    'Deploy': 'tab:red'
}
BLOCK_COLORS = MODE_COLORS | {
    'BN trains': 'tab:olive',
    'left out': 'tab:brown'
}
MIB, GIB = 2**20, 2**30


def plot_blocks(blocks: Sequence[Block], path: str | Path) -> None:
    """Plot how many blocks of each part of a model run in which way.

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
    states = {state for _, state in counts}
    for state, color in BLOCK_COLORS.items():
        if state not in states:
            continue
        widths = [counts[part, state] for part in parts]
        bars = axes.barh(parts, widths, left=left, color=color, label=state)
        axes.bar_label(
            bars, [width or '' for width in widths], label_type='center')
        left = [start + width for start, width in zip(left, widths)]
    axes.invert_yaxis()
    axes.set(xlabel='blocks', title='How blocks run in a training step')
    figure.legend(loc='outside right upper')
    figure.savefig(path, dpi=120)


def plot_scales(spread: Sequence[Mapping[str, float]], factor: float,
                optimizer: str, path: str | Path) -> None:
    """Plot the spread of each block's scales.

    Args:
        spread (Sequence[Mapping[str, float]]): Of each block, what
            :func:`mmtune.analysis.quantiles` says of its scales.
        factor (float): By how much a step may differ from Tune's.
        optimizer (str): See :func:`mmtune.analysis.step_ratios`.
        path (str | Path): The picture to write.
    """
    figure = Figure(
        figsize=(max(7., 0.13 * len(spread)), 5), layout='constrained')
    axes = figure.subplots()
    edge = factor**(1 / POWERS[optimizer])
    axes.axhspan(
        1 / edge,
        edge,
        color='tab:green',
        alpha=0.15,
        label=f"step within {factor:g} times Tune's")
    axes.axhline(1, color='tab:green', linewidth=1)
    # A zero has no place on a logarithmic axis.
    least = min((value for row in spread for value in row.values()
                 if value > 0), default=1.)
    spread = [{name: max(value, least / 10) for name, value in row.items()}
              for row in spread]
    places = range(1, len(spread) + 1)
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


def plot_steps(results: Sequence[Mapping[str, Any]],
               path: str | Path) -> None:
    """Plot what steps in the modes take, a panel for each result.

    Args:
        results (Sequence[Mapping[str, Any]]): What benchmark_modes.py and
            estimate_memory.py of tools/analysis_tools write as JSON.
        path (str | Path): The picture to write.

    Raises:
        ValueError: If a result is of neither.
    """
    figure = Figure(figsize=(8, 4 * len(results)), layout='constrained')
    panels = figure.subplots(len(results), squeeze=False)[:, 0]
    for axes, found in zip(panels, results):
        if not isinstance(found, Mapping) or not found.get('modes'):
            keys = ', '.join(found) if isinstance(found, Mapping) else found
            raise ValueError(
                'results must have been written by benchmark_modes.py or '
                f'estimate_memory.py, but one has {keys or "nothing"} alone')
        draw = _draw_estimate if 'batches' in found else _draw_benchmark
        draw(axes, found)
        axes.set_title(_title(found), fontsize='medium')
    figure.savefig(path, dpi=120)


def _title(found: Mapping[str, Any]) -> str:
    height, width = found['shape']
    source = found['source']
    # A config, or module:callable.
    name = Path(source).stem if source.endswith('.py') else source
    words = [name, f'{height} x {width}']
    if 'batches' not in found:
        words.append(f'batch {found["batch_size"]}')
    if found['amp']:
        words.append('AMP')
    if found['grad_to'] == 'input':
        words.append('gradient to the input')
    return ', '.join(words)


def _measured(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Give the modes that did not fail."""
    return {
        mode: row
        for mode, row in found['modes'].items() if 'failed' not in row
    }


def _draw_benchmark(axes: Axes, found: Mapping[str, Any]) -> None:
    """Draw bars of memory, and points of time beside them."""
    modes = _measured(found)
    colors = [MODE_COLORS[mode] for mode in modes]
    resident = [row['resident'] / MIB for row in modes.values()]
    peak = [row['peak'] / MIB for row in modes.values()]
    axes.bar(list(modes), resident, color=colors, alpha=.4)
    bars = axes.bar(list(modes), peak, bottom=resident, color=colors)
    axes.bar_label(bars, [f'{size:.1f}' for size in peak])
    axes.set(ylabel='peak of a step, MiB, above\nwhat is there before (light)')
    for mode in found['modes']:
        if mode not in modes:
            axes.bar(f'{mode}: failed', 0)
    timed = {mode: row for mode, row in modes.items() if 'ratio' in row}
    if not timed:
        return
    times = axes.twinx()
    ratios = [row['ratio'] for row in timed.values()]
    lows, highs = zip(*(row['ratio_quartiles'] for row in timed.values()))
    times.errorbar(
        list(timed),
        ratios,
        yerr=[[ratio - low for ratio, low in zip(ratios, lows)],
              [high - ratio for ratio, high in zip(ratios, highs)]],
        fmt='ko',
        capsize=4)
    times.set(
        # Below the tops of the bars, and their labels.
        ylim=(0, 2 * max(highs)),
        ylabel="time / Eval's (points), with quartiles")


def _draw_estimate(axes: Axes, found: Mapping[str, Any]) -> None:
    """Draw lines of memory over the batch, with their errors."""
    target, limit = found['batch_size'], found['gpu_memory']
    modes = _measured(found)
    # Farther out the measured runs would be a dot.
    end = min(2 * target, max([target, *(row.get('largest_batch') or 0
                                         for row in modes.values())]))
    for mode, row in modes.items():
        color = MODE_COLORS[mode]
        runs = row['runs']
        axes.plot([run['batch'] for run in runs],
                  [run['total'] / GIB for run in runs],
                  'o',
                  color=color)
        axes.plot([0, end], [
            row['fixed'] / GIB, (row['fixed'] + end * row['per_image']) / GIB
        ],
                  color=color,
                  # Larger batches take more than that.
                  linestyle='-' if row['is_steady'] else ':',
                  label=mode)
        axes.errorbar(
            target,
            row['total'] / GIB,
            yerr=row['error'] / GIB,
            color=color,
            capsize=4)
    if limit:
        axes.axhline(
            limit / GIB,
            color='black',
            linestyle='--',
            label=f'{limit / GIB:.4g} GiB')
    axes.set(
        xlabel='batch (points: measured)',
        ylabel='memory of a step, GiB',
        xlim=(0, None),
        ylim=(0, None))
    axes.legend()
