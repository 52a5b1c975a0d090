"""The learning rates that modes bear, and what the scales foretell."""
import math
import statistics
from collections.abc import Sequence
from typing import Any

from reproductions.mechanism_network import FINE_TUNED_ON, MODES
from reproductions.mechanism_runs import ALONE_MODES, SHARES
from reproductions.pages import mean_spread, table

# Accuracies no farther apart than this count as alike.
COMPARABLE = 0.02


def stable_limit(lrs: Sequence[float],
                 losses: Sequence[float | None]) -> float | None:
    """Find the largest learning rate that does not fail.

    Args:
        lrs (Sequence[float]): Increasing.
        losses (Sequence[float | None]): The final loss of each.

    Returns:
        float | None: The largest learning rate whose loss ends below half of
        that of guessing, where each starts; None if there is none.
    """
    learned = [lr for lr, loss in zip(lrs, losses) if not failed(loss)]
    return max(learned, default=None)


def failed(loss: float | None) -> bool:
    """Tell whether a run has learned next to nothing, or diverged.

    Args:
        loss (float | None): Its final loss; None if that is infinite.

    Returns:
        bool: Whether it is not below half the loss of guessing.
    """
    return loss is None or loss >= math.log(len(FINE_TUNED_ON)) / 2


def summarize(found: dict[str, Any],
              swept: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Put together what each checkpoint led to.

    Returns:
        list[dict[str, Any]]: For each checkpoint what :func:`describe`
        found; for each mode its ``limit``, see :func:`stable_limit`, and the
        place of its ``best`` learning rate, None where it always failed; and
        the ``sweep`` of each mode.
    """
    swept = swept or found
    rows = []
    for scales in found['scales']:
        sweeps = {
            row['mode']: row
            for row in swept['sweeps']
            if (row['times'], row['seed']) == (scales['times'],
                                               scales['seed'])
        }
        rows.append(scales | dict(
            lrs=swept['lrs'],
            sweep=sweeps,
            limit={
                mode: stable_limit(swept['lrs'], row['losses'])
                for mode, row in sweeps.items()
            },
            best={
                mode: best_place(row['losses'])
                for mode, row in sweeps.items()
            }))
    return rows


def best_place(losses: Sequence[float | None]) -> int | None:
    """Find the run that learned best.

    Args:
        losses (Sequence[float | None]): The final loss of each.

    Returns:
        int | None: Its place; None if all failed.
    """
    places = [i for i, loss in enumerate(losses) if not failed(loss)]
    return min(places, key=lambda i: losses[i], default=None)


def ratios(rows: Sequence[dict[str, Any]],
           other: str = 'Tune') -> list[float]:
    """Divide Deploy's limits by those of another mode.

    Returns:
        list[float]: For each checkpoint on which both learned at all.
    """
    return [
        row['limit']['Deploy'] / row['limit'][other] for row in rows
        if row['limit']['Deploy'] and row['limit'][other]
    ]


def span(values: Sequence[float | None]) -> str:
    """Write from where to where numbers go."""
    known = [value for value in values if value is not None]
    if not known:
        return 'none'
    ends = dict.fromkeys(f'{end:.2g}' for end in (min(known), max(known)))
    return ' to '.join(ends)


def by_times(
        rows: Sequence[dict[str, Any]]) -> dict[float, list[dict[str, Any]]]:
    """Group summaries by what the scales were multiplied by.

    Returns:
        dict[float, list[dict[str, Any]]]: The groups.
    """
    return {
        times: [row for row in rows if row['times'] == times]
        for times in dict.fromkeys(row['times'] for row in rows)
    }


def limit_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the limits of all modes."""
    return table(['scales', 'coeff', *MODES], [[
        f'x {times:g}',
        span([row[end] for row in group for end in ('min', 'max')]),
        *(span([row['limit'][mode] for row in group]) for mode in MODES)
    ] for times, group in by_times(rows).items()])


def verdict(times: float, rows: Sequence[dict[str, Any]]) -> str:
    """Say which of Deploy and of Eval and Tune fails first."""
    name = f'**Scales x {times:g}.**'
    by_mode = {mode: ratios(rows, mode) for mode in ('Eval', 'Tune')}
    if not all(by_mode.values()):
        return (f'{name} No seed in which Deploy learned, and Eval and Tune '
                'too.')
    times_as_far = ', '.join(f"{span(found)} times {mode}'s"
                             for mode, found in by_mode.items())
    times_as_far = f"Deploy's limit is {times_as_far}."
    found = [ratio for ratios in by_mode.values() for ratio in ratios]
    if max(found) < 1:
        return (f'{name} Deploy fails where Eval and Tune do not: '
                f'{times_as_far}')
    if min(found) > 1:
        return (f'{name} The other way around: Eval and Tune fail where '
                f'Deploy does not. {times_as_far}')
    return f'{name} Neither fails first in all seeds: {times_as_far}'


def alone_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the limits where nothing learns but weights."""
    return table(['scales', 'Tune', 'Deploy', 'Deploy / Tune',
                  'smallest coeff^2', 'median', 'largest'],
                 [[
                     f'x {times:g}',
                     *(span([row['limit'][mode] for row in group])
                       for mode in ALONE_MODES),
                     span(ratios(group)),
                     *(span([row[key]**2 for row in group])
                       for key in ('min', 'median', 'max'))
                 ] for times, group in by_times(rows).items()])


def foretold(rows: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Count the checkpoints on which the scales tell Deploy's limit.

    Returns:
        tuple[int, int]: On how many Deploy's limit by Tune's is between the
        squares of the smallest and largest scale, as far as the learning
        rates that were tried can tell; and of how many.
    """
    # From one learning rate to the next.
    step = max((b / a for row in rows
                for a, b in zip(row['lrs'], row['lrs'][1:])), default=1.)
    learned = [row for row in rows if ratios([row])]
    return sum(
        row['min']**2 / step <= ratios([row])[0] <= step * row['max']**2
        for row in learned), len(learned)


def alone_verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Say whether the scales tell Deploy's limit where nothing hides them."""
    inside, learned = foretold(rows)
    if not learned:
        return 'Nothing learned, so that there is nothing to foretell.'
    from_median = [
        ratios([row])[0] / row['median']**2 for row in rows if ratios([row])
    ]
    return (f'Deploy / Tune is in that range on {inside} of {learned} '
            'checkpoints, as far as limits are known; it is '
            f'{span(from_median)} times the square of the median scale.')


def best_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out what Deploy reaches at Eval's learning rate and at its own."""

    def cell(group: list[dict[str, Any]], mode: str, lr_of: str) -> str:
        places = [(row['sweep'][mode], row['best'][lr_of]) for row in group]
        if any(place is None for _, place in places):
            return 'not all learned'
        accuracies = [sweep['accuracies'][at] for sweep, at in places]
        losses = [sweep['losses'][at] for sweep, at in places]
        known = [loss for loss in losses if loss is not None]
        loss = f'{statistics.mean(known):.2g}' if known == losses else 'inf'
        return f'{mean_spread(accuracies)} ({loss})'

    def best_lrs(group: list[dict[str, Any]], mode: str) -> str:
        places = [row['best'][mode] for row in group]
        return span([
            None if at is None else row['lrs'][at]
            for row, at in zip(group, places)
        ])

    return table([
        'scales', "Eval's best lr", 'Eval', 'Tune there', 'Deploy there',
        "Deploy's best lr", 'Deploy'
    ], [[
        f'x {times:g}',
        best_lrs(group, 'Eval'),
        *(cell(group, mode, 'Eval') for mode in ('Eval', 'Tune', 'Deploy')),
        best_lrs(group, 'Deploy'),
        cell(group, 'Deploy', 'Deploy')
    ] for times, group in by_times(rows).items()])


def best_verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Say whether Deploy wants no more than another learning rate."""
    texts, own = [], []
    for times, group in by_times(rows).items():
        lr_ratios = []
        for row in group:
            at_eval, at_deploy = row['best']['Eval'], row['best']['Deploy']
            if at_eval is None or at_deploy is None:
                return ('Not all learned, so that their best cannot be '
                        'compared.')
            lr_ratios.append(row['lrs'][at_eval] / row['lrs'][at_deploy])
            if times == 1:
                reached = row['sweep']['Eval']['accuracies'][at_eval]
                own.append(
                    row['sweep']['Deploy']['accuracies'][at_deploy] - reached)
        side = ('too small' if max(lr_ratios) < 1 else
                'too large' if min(lr_ratios) > 1 else 'about right')
        texts.append(f'x {times:g}: {span(lr_ratios)} times, {side}')
    text = ("Eval's best learning rate as a multiple of Deploy's, and so for "
            f'Deploy: {"; ".join(texts)}. ')
    if not own:
        return text
    text += (f'With scales x 1, each at its own best, Deploy differs from '
             f'Eval by {mean_spread(own)} in accuracy')
    if statistics.mean(own) < -COMPARABLE:
        return f'{text}: it learns less even at a learning rate of its own.'
    return (f"{text}: where Eval's learning rate harms Deploy, one of its own "
            'undoes that.')


def prediction_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out Deploy's limits beside what the scales say."""
    titles = [
        'scales', 'measured',
        *(f'{share:.0%} of channels' for share in SHARES), 'above',
        'best, measured', '`best_lr`'
    ]
    return table(titles, [[
        f'x {times:g}',
        span(ratios(group)),
        *(span(limits) for limits in zip(*(row['limits'] for row in group))),
        span([row['upper_limit'] for row in group]),
        span([
            row['lrs'][row['best']['Deploy']] / row['lrs'][row['best']['Tune']]
            for row in group if None not in row['best'].values()
        ]),
        span([row['best_lr'] for row in group])
    ] for times, group in by_times(rows).items()])


def prediction_verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Say how well the scales foretell Deploy's limit."""
    learned = [
        row for row in rows if row['limit']['Deploy'] and row['limit']['Tune']
    ]
    if not learned:
        return 'Nothing learned, so that there is nothing to foretell.'
    measured = [row['limit']['Deploy'] / row['limit']['Tune']
                for row in learned]
    above_bound = [
        ratio / row['limits'][0] for ratio, row in zip(measured, learned)
    ]
    above_thumb = [
        ratio / row['limits'][-1] for ratio, row in zip(measured, learned)
    ]
    kept = sum(ratio >= 1 for ratio in above_bound)
    below = sum(ratio <= row['upper_limit']
                for ratio, row in zip(measured, learned))
    if kept == len(learned):
        text = (f'The bound holds in all {kept} checkpoints, ')
    else:
        text = (f'The bound holds in {kept} of {len(learned)} checkpoints '
                '(it is proven near a minimum alone), ')
    text += (f'the limit from above in {below}. Deploy bears '
             f'{span(above_bound)} times what the bound allows, and '
             f'{span(above_thumb)} times what the rule of thumb for half of '
             'the channels does. ')
    worst = max(above_bound)
    if kept < len(learned):
        return text + 'So the scales alone are no guarantee here.'
    if worst > 10:
        return text + (
            'So the scales tell what is safe, but not where Deploy fails: the '
            f'bound is too careful by up to {worst:.0f} times. It does not '
            'know what limits Tune, which may be what has no scale.')
    return text + 'So the scales tell about where Deploy fails.'
