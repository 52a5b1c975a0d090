"""Tune follows Eval when the statistics of BatchNorms jump."""
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from reproductions.page import Page, cell, drawing, sheet, table
from reproductions.statistics_runs import ONE_STEP, STAGES, run

# What float64 has to agree to at the same point, as in docs/en/method.md.
TOLERANCE = 1e-10
# A relative error that float32 does not make by rounding alone.
LARGE = 1e-4


def spans(found: dict) -> dict[str, slice]:
    """The steps after each event, until the next."""
    begins = [0, *map(int, found['events']), found['steps']]
    names = ["ImageNet's statistics", *found['events'].values()]
    return {
        name: slice(begin, end)
        for name, begin, end in zip(names, begins, begins[1:])
    }


def mean_loss(losses: Sequence[float | None]) -> float:
    """Average losses; infinite where one is not finite."""
    return math.inf if None in losses else statistics.fmean(losses)


def count_large(errors: Sequence[float]) -> int:
    """Count errors that float32 does not make by rounding alone."""
    return sum(error > LARGE for error in errors)


def summed(summarize: Callable[[Sequence], object], run: str, key: str,
           spec: str = '.1e') -> Callable[[dict], str]:
    """Make what sums up a curve of a run, for a cell of a table."""
    return lambda curves: format(summarize(curves[run][key]), spec)


def events_table(found: dict, curves: dict) -> str:
    """Sum up the steps after each event."""
    rows = [{'event': event, **{
        run: {key: values[steps] for key, values in curve.items()}
        for run, curve in curves.items()
    }} for event, steps in spans(found).items()]
    return table(rows, {
        'after': cell('', 'event'),
        'loss, Eval': summed(mean_loss, 'Eval', 'loss', '.3f'),
        'loss, Tune': summed(mean_loss, 'Tune', 'loss', '.3f'),
        'loss: Tune from Eval': summed(max, 'Tune', 'loss_difference'),
        'loss: shuffled from Eval':
        summed(max, 'Eval, shuffled', 'loss_difference'),
        'gradients: Tune from Eval': summed(max, 'Tune', 'difference'),
        'gradients: shuffled from Eval':
        summed(max, 'Eval, shuffled', 'difference'),
        'one step: Eval': summed(statistics.median, 'Eval', 'error'),
        'one step: Tune': summed(statistics.median, ONE_STEP, 'error')
    })


def summary(found: dict) -> str:
    """Lay out errors and differences over all steps, a type a column."""

    def large(errors: Sequence[float]) -> str:
        return f'{count_large(errors)} of {len(errors)}'

    rows: dict[str, Callable[[dict], str]] = {}
    for name, run_ in (('Eval', 'Eval'), ('Tune', ONE_STEP)):
        rows |= {
            f'error of a step of {name}: median':
            summed(statistics.median, run_, 'error'),
            f'{name}: worst step': summed(max, run_, 'error'),
            f'{name}: steps with more than {LARGE:g}':
            summed(large, run_, 'error', '')
        }
    return sheet('', found['runs'], rows | {
        'whole run: the loss of Tune from Eval, at most':
        summed(max, 'Tune', 'loss_difference'),
        'whole run: the loss of Eval, shuffled, from Eval, at most':
        summed(max, 'Eval, shuffled', 'loss_difference')
    })


def how_it_ran(found: dict) -> str:
    """Write how Tune ran its blocks."""
    runs = Counter(tuple(sorted(step.items())) for step in found['ran'])
    return '; '.join(
        f'in {count} steps ' + ', '.join(
            f'{blocks} blocks "{kind}"' for kind, blocks in key)
        for key, count in runs.items())


def deploy_ratios(found: dict) -> dict[str, float]:
    """Deploy's mean loss after each event, over Eval's."""
    curves = list(found['runs'].values())[-1]
    return {
        name: mean_loss(curves['Deploy']['loss'][steps])
        / mean_loss(curves['Eval']['loss'][steps])
        for name, steps in spans(found).items()
    }


def figures(found: dict) -> dict[str, object]:
    """Write what the page shows."""
    smooth, ratios = found['smooth'], deploy_ratios(found)
    bent = found['runs']['float32']['Eval']['error'][:len(smooth['Eval'])]
    low, high = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
    return {
        'exact': f'{max(found["runs"]["float64"][ONE_STEP]["error"]):.0e}',
        'steps': found['steps'],
        'jumps': len(found['events']),
        'stages': STAGES,
        'blocks': found['blocks'],
        'size': f'{found["size"]} x {found["size"]}',
        'batch': found['batch_size'],
        'interval': found['interval'],
        'summary': summary(found),
        **{dtype: events_table(found, curves)
           for dtype, curves in found['runs'].items()},
        'smooth-steps': len(bent),
        'smooth-Eval': count_large(smooth['Eval']),
        'smooth-Tune': count_large(smooth['Tune']),
        'largest-Eval': f'{max(smooth["Eval"]):.1e}',
        'largest-Tune': f'{max(smooth["Tune"]):.1e}',
        'bent': count_large(bent),
        'ran': how_it_ran(found),
        'below': sum(ratio < 1 for ratio in ratios.values()),
        'stretches': len(ratios),
        'low': f'{ratios[low]:.2g} times Eval\'s after "{low}"',
        'high': f'{ratios[high]:.2g} times after "{high}"'
    }


def claims(found: dict) -> dict[str, bool]:
    """Tell what the page says, and whether it is so."""
    runs = found['runs']
    return {
        'from the same point float64 agrees to what is promised':
        max(runs['float64'][ONE_STEP]['error']) <= TOLERANCE,
        'Tune stays as near to Eval as Eval does to itself':
        all(max(curves['Tune']['loss_difference'])
            <= 10 * max(curves['Eval, shuffled']['loss_difference'])
            for curves in runs.values()),
        'without ReLU6 no error in float32 is large':
        not any(map(count_large, found['smooth'].values())),
        "Deploy's mean loss is below Eval's in all stretches":
        all(ratio < 1 for ratio in deploy_ratios(found).values())
    }


STYLES = {
    'Eval': dict(color='tab:blue', linestyle='-', linewidth=1),
    'Tune': dict(color='tab:green', linestyle='--', linewidth=1.5),
    'Eval, shuffled': dict(color='tab:gray', linestyle='-', linewidth=1),
    ONE_STEP: dict(color='tab:olive', linestyle=':', linewidth=1.5),
    'Deploy': dict(color='tab:red', linestyle='-', linewidth=.8)
}


@drawing(7)
def plot(found: dict, figure: Figure) -> None:
    """Draw the losses, and the differences below, a column for each dtype."""
    grid = figure.subplots(
        2, len(found['runs']), sharex=True, sharey='row', squeeze=False)
    for (top, bottom), (dtype, curves) in zip(grid.T, found['runs'].items()):
        for name in ('Eval', 'Tune', 'Deploy'):
            top.semilogy([math.nan if loss is None else loss
                          for loss in curves[name]['loss']],
                         label=name, **STYLES[name])
        for name in ('Tune', 'Eval, shuffled', ONE_STEP):
            values = curves[name]['error' if name == ONE_STEP else
                                  'difference']
            bottom.semilogy([value or math.nan for value in values],
                            label=name, **STYLES[name])
        for number, step in enumerate(map(int, found['events']), 1):
            for axes in (top, bottom):
                axes.axvline(step, color='black', linewidth=.5, alpha=.5)
            top.annotate(
                str(number), (step, 1), xycoords=('data', 'axes fraction'),
                xytext=(2, -10), textcoords='offset points', fontsize=8)
        top.set(title=dtype)
        bottom.set(xlabel='step')
    grid[0, 0].set(ylabel='loss')
    grid[1, 0].set(ylabel='largest relative difference of a gradient')
    handles = {
        label: handle for axes in grid[:, 0] for handle, label in zip(
            *axes.get_legend_handles_labels())
    }
    figure.legend(
        handles.values(), handles, loc='outside lower left', ncols=2)
    names = '\n'.join(f'{i}: {name}' for i, name in enumerate(
        found['events'].values(), 1))
    figure.text(1, 0, names, ha='right', va='bottom', fontsize=7)


PAGE = Page(run, figures, claims, plot)
