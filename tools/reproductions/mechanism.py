"""When Deploy is unstable to train, and that the scales are why."""
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproductions.mechanism_runs import (
    BATCH_SIZE,
    CORRECTED,
    FINAL_STEPS,
    FINE_TUNED_ON,
    MODES,
    MOMENTUM,
    run,
)
from reproductions.page import Page, by, drawing, mean_spread, span, table

Row = dict[str, Any]
GUESSING = math.log(len(FINE_TUNED_ON))
# Accuracies no farther apart than this count as alike.
COMPARABLE = 0.02
# Losses in float64 no farther apart than this are the same.
SAME = 1e-9


def failed(loss: float | None) -> bool:
    """Tell whether a final loss is not below half the loss of guessing.

    None is infinite.
    """
    return loss is None or loss >= GUESSING / 2


def summarize(found: Row, swept: Row | None = None) -> list[Row]:
    """Put together what each checkpoint led to.

    Args:
        found (dict): What :func:`run` returns.
        swept (dict, optional): The part of it that has the sweeps. Defaults
            to None: all of it.

    Returns:
        list[dict]: For each checkpoint what
        :func:`reproductions.mechanism_runs.describe` found, and the ``lrs``;
        for each mode the ``sweep``, its ``limit``, the largest learning rate
        that does not fail, and the place of its ``best``, the one that
        learned best; None where all fail.
    """
    swept = swept or found
    rows = []
    for scales in found['scales']:
        row = dict(scales, lrs=swept['lrs'], sweep={}, limit={}, best={})
        for sweep in swept['sweeps']:
            if any(sweep[key] != scales[key] for key in ('times', 'seed')):
                continue
            mode, losses = sweep['mode'], sweep['losses']
            learned = [i for i, loss in enumerate(losses) if not failed(loss)]
            row['sweep'][mode] = sweep
            row['limit'][mode] = max(
                (row['lrs'][i] for i in learned), default=None)
            row['best'][mode] = min(
                learned, key=losses.__getitem__, default=None)
        rows.append(row)
    return rows


def grouped(rows: Sequence[Row],
            columns: dict[str, Callable[[list[Row]], object]]) -> str:
    """Write a table with a row for each group of checkpoints."""
    return table(by('times', rows).values(), {
        'scales': lambda group: f'x {group[0]["times"]:g}', **columns
    })


def ratios(rows: Iterable[Row], other: str = 'Tune') -> list[float]:
    """Divide Deploy's limits by another mode's, where both learned."""
    return [
        row['limit']['Deploy'] / row['limit'][other] for row in rows
        if row['limit']['Deploy'] and row['limit'][other]
    ]


def limit_cell(mode: str) -> Callable[[list[Row]], str]:
    """Write the limits of a mode."""
    return lambda group: span(row['limit'][mode] for row in group)


def fails_first(row: Row) -> bool:
    """Tell whether Deploy fails at a learning rate that Tune bears."""
    limit = row['limit']
    return (limit['Deploy'] or 0) < (limit['Tune'] or 0)


def limit_table(rows: Sequence[Row]) -> str:
    """Lay out the limits of all modes."""
    return grouped(rows, {
        'coeff': lambda group: span(
            row[end] for row in group for end in ('min', 'max')),
        **{mode: limit_cell(mode) for mode in MODES},
        'Deploy / Eval': lambda group: span(ratios(group, 'Eval')),
        'Deploy / Tune': lambda group: span(ratios(group)),
        'seeds in which Deploy fails before Tune': lambda group:
        f'{sum(map(fails_first, group))} of {len(group)}'
    })


def at_best(row: Row, mode: str, lr_of: str) -> tuple[float, float | None]:
    """Accuracy and final loss of a mode at the best learning rate of another.

    Not numbers where the other never learned.
    """
    sweep, place = row['sweep'][mode], row['best'][lr_of]
    if place is None:
        return math.nan, math.nan
    return sweep['accuracies'][place], sweep['losses'][place]


def best_lr(row: Row, mode: str) -> float | None:
    """A mode's best learning rate; None where it never learned."""
    place = row['best'][mode]
    return None if place is None else row['lrs'][place]


def best_ratio(row: Row, one: str, other: str) -> float | None:
    """Divide the best learning rates of two modes."""
    lrs = best_lr(row, one), best_lr(row, other)
    return None if None in lrs else lrs[0] / lrs[1]


def best_table(rows: Sequence[Row]) -> str:
    """Lay out what Deploy reaches at Eval's learning rate and at its own."""

    def cell(mode: str, lr_of: str) -> Callable[[list[Row]], str]:

        def write(group: list[Row]) -> str:
            accuracies, losses = zip(
                *(at_best(row, mode, lr_of) for row in group))
            mean = math.inf if None in losses else statistics.mean(losses)
            return f'{mean_spread(accuracies)} ({mean:.2g})'

        return write

    def lrs(mode: str) -> Callable[[list[Row]], str]:
        return lambda group: span(best_lr(row, mode) for row in group)

    return grouped(rows, {
        "Eval's best lr": lrs('Eval'),
        'Eval': cell('Eval', 'Eval'),
        'Tune there': cell('Tune', 'Eval'),
        'Deploy there': cell('Deploy', 'Eval'),
        "Deploy's best lr": lrs('Deploy'),
        'Deploy': cell('Deploy', 'Deploy'),
        "Eval's / Deploy's": lambda group: span(
            best_ratio(row, 'Eval', 'Deploy') for row in group)
    })


def own_difference(rows: Sequence[Row]) -> list[float]:
    """Deploy's accuracy less Eval's, each at its best, at stock scales."""
    return [
        at_best(row, 'Deploy', 'Deploy')[0] - at_best(row, 'Eval', 'Eval')[0]
        for row in rows if row['times'] == 1
    ]


def distances(controls: Sequence[Row], gamma: str, mode: str) -> list[float]:
    """How far losses are from Tune's, infinite where one was."""
    return [math.inf if row[gamma][mode] is None else row[gamma][mode]
            for row in controls]


def control_table(controls: Sequence[Row]) -> str:
    """Lay out how far runs lie apart that should be the same, or not."""
    kinds = [(gamma, mode) for gamma in ('fixed', 'learning')
             for mode in MODES if mode != 'Tune']
    return table(kinds, {
        'against Tune': lambda it: it[1],
        'gamma': lambda it: it[0],
        'largest difference of losses':
        lambda it: span(distances(controls, *it), '.1e')
    })


def figures(found: Row) -> dict[str, object]:
    """Write what the page shows."""
    rows, controls = summarize(found), found['controls']
    blocks = sum((Counter(row['runs']) for row in controls), Counter())
    return {
        'ratios': '; '.join(f'x {times:g}: {span(ratios(group))}'
                            for times, group in by('times', rows).items()),
        'pretrained': mean_spread(found['pretrained']),
        'steps': found['steps'],
        'momentum': MOMENTUM,
        'batch': BATCH_SIZE,
        'rates': len(found['lrs']),
        'lrs': span(found['lrs']),
        'seeds': len(found['pretrained']),
        'final-steps': FINAL_STEPS,
        'guessing': f'{GUESSING:.2f}',
        'limits': limit_table(rows),
        'rescaled': span([max((row['rescaled'] for row in controls
                               if row['rescaled'] is not None),
                              default=None)], '.1e'),
        'best': best_table(rows),
        'own': mean_spread(own_difference(rows)),
        'controls': control_table(controls),
        'control-lrs': span(row['lr'] for row in controls),
        'function': f'{max(row["function"] for row in controls):.1e}',
        'folded': f'{blocks["fused"]} of {blocks.total()}'
    }


def claims(found: Row) -> dict[str, bool]:
    """Tell what the page says, and whether it is so."""
    controls, rows = found['controls'], summarize(found)

    def apart(gamma: str, mode: str) -> list[float]:
        return distances(controls, gamma, mode)

    first = {times: sum(map(fails_first, group)) / len(group)
             for times, group in by('times', rows).items()}
    return {
        'Deploy fails first where scales are multiplied by less than 1, and '
        'nowhere else':
        all(share == (times < 1) for times, share in first.items()),
        'Deploy does not notice what the scales are multiplied by':
        all(row['rescaled'] is not None and row['rescaled'] < SAME
            for row in controls),
        "where Eval's learning rate harms Deploy, one of its own undoes that":
        statistics.mean(own_difference(rows)) > -COMPARABLE,
        "Tune's losses are Eval's":
        max(apart('fixed', 'Eval') + apart('learning', 'Eval')) < SAME,
        'with gamma fixed, Deploy follows Tune with its gradient multiplied':
        max(apart('fixed', CORRECTED)) < SAME,
        'without that, Deploy does not': min(apart('fixed', 'Deploy')) > 1e-3,
        'with gamma learning, it follows only nearly':
        max(apart('learning', CORRECTED)) > SAME
    }


@drawing(7)
def plot(found: Row, figure: Figure) -> None:
    """Draw final losses against learning rates."""
    groups = by('times', summarize(found))
    figure.set_size_inches(8, 1.2 + 2.3 * len(groups))
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    top = 1.5 * GUESSING
    for axes, (times, rows) in zip(panels, groups.items()):
        for mode, style in zip(MODES, ('C0-', 'C1--', 'C3-', 'C2:')):
            losses = zip(*(row['sweep'][mode]['losses'] for row in rows))
            # What diverges leaves the picture at its upper edge.
            middle = [statistics.median(top if loss is None else
                                        min(loss, top) for loss in at_lr)
                      for at_lr in losses]
            axes.plot(found['lrs'], middle, style, label=mode)
        draw_bounds(axes, rows)
        axes.axhline(GUESSING, color='lightgray', linewidth=1, zorder=0)
        axes.set(xscale='log', ylabel='final loss', ylim=(0, top),
                 title=f'scales x {times:g}, median {rows[0]["median"]:.2g}')
    panels[-1].set_xlabel('learning rate')
    figure.legend(*panels[0].get_legend_handles_labels(),
                  loc='outside upper center', ncols=3)


def draw_bounds(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw what the scales and Tune's limit say of Deploy's."""
    for name, style, place in (('bound for Deploy', '-', 0),
                               ('half of channels', '--', -1)):
        limits = [row['limit']['Tune'] * row['limits'][place] for row in rows
                  if row['limit']['Tune']]
        if limits:
            axes.axvline(statistics.median(limits), color='gray',
                         linestyle=style, linewidth=1,
                         label=f"{name}, from Tune's limit")


PAGE = Page(run, figures, claims, plot)
