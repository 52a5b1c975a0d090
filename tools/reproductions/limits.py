"""What the scales of a checkpoint foretell of Deploy's learning rate."""
from collections.abc import Sequence

from matplotlib.figure import Figure

from reproductions.mechanism import (
    Row,
    best_ratio,
    grouped,
    limit_cell,
    ratios,
    summarize,
)
from reproductions.mechanism_runs import ALONE_MODES, FACTOR, SHARES, run
from reproductions.page import Page, drawing, span


def learned(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Give Deploy's limit over Tune's, with each row where both learn."""
    return [(row, ratio) for row in rows for ratio in ratios([row])]


def is_between(row: Row, ratio: float) -> bool:
    """Tell whether a limit over Tune's is between the squares of the scales.

    It is known to the step from one learning rate to the next.
    """
    step = max(b / a for a, b in zip(row['lrs'], row['lrs'][1:]))
    return row['min']**2 / step <= ratio <= step * row['max']**2


def alone_table(rows: Sequence[Row]) -> str:
    """Lay out the limits where nothing learns but weights."""
    squares = {'smallest coeff^2': 'min', 'median': 'median',
               'largest': 'max'}
    return grouped(rows, {
        **{mode: limit_cell(mode) for mode in ALONE_MODES},
        'Deploy / Tune': lambda group: span(ratios(group)),
        **{title: lambda group, key=key: span(row[key]**2 for row in group)
           for title, key in squares.items()}
    })


def prediction_table(rows: Sequence[Row]) -> str:
    """Lay out Deploy's limits beside what the scales say."""
    return grouped(rows, {
        'measured': lambda group: span(ratios(group)),
        **{f'{share:.0%} of channels': lambda group, place=place: span(
            row['limits'][place] for row in group)
           for place, share in enumerate(SHARES)},
        'above': lambda group: span(row['upper_limit'] for row in group),
        'best, measured': lambda group: span(
            best_ratio(row, 'Deploy', 'Tune') for row in group),
        '`best_lr`': lambda group: span(row['best_lr'] for row in group)
    })


def figures(found: Row) -> dict[str, object]:
    """Write what the page shows."""
    rows, alone = summarize(found), summarize(found, found['alone'])
    lrs = found['alone']['lrs']
    known, known_alone = learned(rows), learned(alone)
    return {
        'between': sum(is_between(*it) for it in known_alone),
        'alone-checkpoints': len(known_alone),
        'rates': len(lrs),
        'lrs': span(lrs),
        'alone': alone_table(alone),
        'of-median': span(ratio / row['median']**2
                          for row, ratio in known_alone),
        'predictions': prediction_table(rows),
        'factor': f'{FACTOR:g}',
        'bounded': sum(ratio >= row['limits'][0] for row, ratio in known),
        'below': sum(ratio <= row['upper_limit'] for row, ratio in known),
        'checkpoints': len(known),
        'of-bound': span(ratio / row['limits'][0] for row, ratio in known),
        'of-thumb': span(ratio / row['limits'][-1] for row, ratio in known),
        'careful': span([max((ratio / row['limits'][0]
                              for row, ratio in known), default=None)], '.0f')
    }


def claims(found: Row) -> dict[str, bool]:
    """Tell what the page says, and whether it is so."""
    rows, alone = (learned(summarize(found, part))
                   for part in (None, found['alone']))
    return {
        'where nothing but weights learns, the scales bound the limit':
        bool(alone) and all(is_between(*it) for it in alone),
        'the bound holds where everything learns':
        bool(rows) and all(ratio >= row['limits'][0] for row, ratio in rows),
        'but it does not tell where Deploy fails':
        any(ratio > 10 * row['limits'][0] for row, ratio in rows)
    }


@drawing(4.5)
def plot(found: Row, figure: Figure) -> None:
    """Draw measured limits beside the squares of the scales."""
    axes = figure.subplots()
    rows = summarize(found)
    places = range(len(rows))
    axes.vlines(places, [row['min']**2 for row in rows],
                [row['max']**2 for row in rows], color='tab:gray', alpha=.5,
                linewidth=8, label='coeff^2, smallest to largest')
    axes.plot(places, [row['median']**2 for row in rows], '_', color='black',
              markersize=14, label='coeff^2, median')
    for swept, marker, label in (
        (found['alone'], 'o', 'measured, weights alone learn'),
        (found, 'x', 'measured, everything learns')):
        points = [(place, ratio) for place, row in
                  enumerate(summarize(found, swept)) for ratio in
                  ratios([row])]
        axes.plot(*zip(*points), marker, label=label)
    axes.set_xticks(places, [f'x {row["times"]:g}\nseed {row["seed"]}'
                             for row in rows], fontsize=8)
    axes.set(yscale='log', ylabel="Deploy's limit / Tune's",
             xlabel='checkpoint: what its scales are multiplied by')
    figure.legend(loc='outside upper center', ncols=2)


PAGE = Page(run, figures, claims, plot)
