"""When Deploy is unstable to train, and whether the scales foretell it."""
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reproductions.mechanism_limits import (
    alone_table,
    alone_verdict,
    best_table,
    best_verdict,
    by_times,
    foretold,
    limit_table,
    prediction_table,
    prediction_verdict,
    ratios,
    span,
    summarize,
    verdict,
)
from reproductions.mechanism_network import (
    BATCH_SIZE,
    CORRECTED,
    FINE_TUNED_ON,
    MODES,
    MOMENTUM,
)
from reproductions.mechanism_runs import FACTOR, FINAL_STEPS, run
from reproductions.pages import mean_spread, paragraph, table

__all__ = ['answer', 'page', 'plot', 'run']

TITLE = 'When Deploy is unstable to train'
OF_PAPER = 'Mechanism 1'
QUESTION = paragraph("""
    The paper's Mechanism 1: Deploy multiplies the weight by `coeff = gamma /
    sqrt(var + eps)`, and its gradient by `1 / coeff` against Eval. Where the
    scales are small, its training becomes unstable. So, at which learning
    rates does Deploy fail where Eval and Tune do not? Do the scales of a
    checkpoint tell, as [deploy.md](../deploy.md) derives? And does Deploy
    with its gradient multiplied by `coeff^2` follow Tune?
    """)


def answer(found: dict[str, Any]) -> str:
    """Say in a sentence what came out."""
    limits = '; '.join(f'x {by:g}: {span(ratios(group))}'
                       for by, group in by_times(summarize(found)).items())
    return ("The largest learning rate that Deploy bears, as a multiple of "
            f"Tune's, by what the scales are multiplied by: {limits}.")


def page(found: dict[str, Any]) -> str:
    """Describe what came out."""
    rows = summarize(found)
    alone = summarize(found, found['alone'])
    alone_lrs = found['alone']['lrs']
    guessing = math.log(len(FINE_TUNED_ON))
    parts = [
        paragraph(f"""
        A ResNet of nine convolutions, each with a BatchNorm, learns
        scikit-learn's handwritten digits 0 to 4 in Train mode (accuracy on
        images that it has not seen: {mean_spread(found['pretrained'])}), gets
        a new head, and is fine-tuned on the digits 5 to 9: {found['steps']}
        steps of SGD with momentum {MOMENTUM}, batches of {BATCH_SIZE}, at
        {len(found['lrs'])} learning rates from {found['lrs'][0]:.2g} to
        {found['lrs'][-1]:.2g}, in each mode, {len(found['pretrained'])}
        seeds. Gamma and beta learn. Each is done with the scales as
        pretraining left them, and with the scales of all channels multiplied:
        a weight is divided by a number, the mean and deviation of its
        BatchNorm likewise. Train mode would not notice, so pretraining could
        have ended there as well; and the function stays what it was.
        A run *fails* if its final training loss (mean of the last
        {FINAL_STEPS} steps) is not below half the loss of guessing,
        {guessing:.2f}. The largest learning rate at which it does not is its
        *limit*.
        """), '## Where each mode fails',
        limit_table(rows),
        paragraph("""
        The limit of each mode, from the lowest to the highest of the seeds.
        The last mode is the control: Deploy with the gradient of each weight
        multiplied by `coeff^2`. A limit is known to a factor of 2, from one
        learning rate to the next.
        """), *(paragraph(verdict(by, group))
                for by, group in by_times(rows).items()),
        paragraph(invariance(found)),
        '## Where nothing learns but weights',
        paragraph(f"""
        Gamma, beta and the head have no scale, and take the same steps in
        Deploy as in Tune; where they limit the learning rate, the scales of
        the weights hide. So here the head learns first, by itself, and then
        the weights of the convolutions alone, at {len(alone_lrs)} learning
        rates from {alone_lrs[0]:.2g} to {alone_lrs[-1]:.2g}. Near a minimum
        Deploy's limit
        should then be Tune's times a number between the squares of the
        smallest and of the largest scale.
        """),
        alone_table(alone),
        paragraph(alone_verdict(alone)),
        "## At Eval's best learning rate, and at its own",
        best_table(rows),
        paragraph("""
        A mode's best learning rate is the one with the lowest final training
        loss. Accuracies on images that were not trained on, mean and standard
        deviation over the seeds; in brackets the final training loss.
        """),
        paragraph(best_verdict(rows)), '## Whether the scales foretell it',
        prediction_table(rows),
        paragraph(f"""
        Multiples of Tune's limit, over the seeds, from `mmtune.analysis`:
        `lr_limit` with factor 1, for all channels (where it is a bound) and
        for fewer (rules of thumb); above, the square of the largest scale,
        beyond which Deploy's stability would imply Tune's. The last two
        columns compare best learning rates instead, with `best_lr` at factor
        {FACTOR:g}.
        """),
        paragraph(prediction_verdict(rows)), '## Controls, in float64',
        control_table(found['controls']),
        paragraph(control_verdict(found['controls'])),
        '## What this says of Mechanism 1',
        paragraph(conclusion(found, rows, alone)), '## Not run here',
        paragraph("""
        Large networks, and networks whose scales differ by orders of
        magnitude from channel to channel, as those of MobileNetV2 do
        ([deploy.md](../deploy.md)). Adam, for which the steps differ by
        `coeff` instead of its square. Weight decay, clipping and warm-up,
        which practice has. Long runs.
        """)
    ]
    return '\n\n'.join(parts)


def conclusion(found: dict[str, Any], rows: Sequence[dict[str, Any]],
               alone: Sequence[dict[str, Any]]) -> str:
    """Say what was confirmed of the paper's explanation, and what not."""
    text = ('The scales are why Deploy takes another path than Tune: the '
            'control confirms it. ' if follows(found['controls']) else
            'The control does not confirm that the scales are why Deploy '
            'takes another path than Tune. ')
    inside, learned = foretold(alone)
    text += ('They bound where it fails, too, where nothing but weights '
             f'learns ({inside} of {learned} checkpoints). '
             if learned and inside == learned else
             'But not even where nothing but weights learns do they bound '
             f'where it fails ({inside} of {learned} checkpoints). ')
    groups = by_times(rows)
    for times, group in groups.items():
        kind = ('as pretraining left them' if times == 1 else
                f'multiplied by {times:g}')
        text += (f'With scales {kind}, and everything learning, Deploy fails '
                 f'at a lower learning rate than Tune in '
                 f'{sum(map(fails_first, group))} of {len(group)} seeds. ')
    if 1. in groups:
        text += judge_stock(
            groups[1.],
            [group for times, group in groups.items() if times < 1])
    return text + ('What it comes to in a transfer run, with AdamW and scales '
                   'mostly above 1, is on the page '
                   '[Accuracy on the trees](accuracy.md).')


def fails_first(row: dict[str, Any]) -> bool:
    """Tell whether Deploy fails at a learning rate that Tune bears.

    Returns:
        bool: True also where Deploy fails at all learning rates.
    """
    limit = row['limit']
    return (limit['Deploy'] or 0) < (limit['Tune'] or 0)


def judge_stock(stock: Sequence[dict[str, Any]],
                smaller: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Say whether checkpoints as they come show the paper's instability."""
    first = sum(map(fails_first, stock))
    if first == len(stock):
        return ('That confirms the instability that the paper reports for '
                'checkpoints as they come. ')
    if first:
        return (f'So {first} of {len(stock)} of these checkpoints show the '
                'instability that the paper reports as they come. ')
    if any(all(map(fails_first, group)) for group in smaller):
        return ('So these checkpoints, as they come, do not show the '
                'instability that the paper reports; small scales do. ')
    return ('So the instability that the paper reports does not show here. ')


def invariance(found: dict[str, Any]) -> str:
    """Say what multiplying the scales changes, and what it does not."""
    apart = [row['rescaled'] for row in found['controls']]
    if None in apart or max(apart) > 1e-9:
        return ("Deploy's own runs should not depend on what the scales are "
                'multiplied by, since the folded weights do not; in float64 '
                'they did all the same, which contradicts the derivation.')
    return ('Deploy itself does not notice what the scales are multiplied by, '
            'since the folded weights stay what they were: in float64 its '
            f'losses differ by at most {max(apart):.1e} over a run. What '
            'changes is how large a learning rate Eval and Tune bear, and '
            'need.')


def control_table(controls: Sequence[dict[str, Any]]) -> str:
    """Lay out how far runs lie apart that should be the same, or not."""
    rows = []
    for gamma in ('fixed', 'learning'):
        for mode in MODES:
            if mode == 'Tune':
                continue
            found = [row[gamma][mode] for row in controls]
            finite = [value for value in found if value is not None]
            text = (f'{min(finite):.1e} to {max(finite):.1e}'
                    if finite == found else 'infinite')
            rows.append([mode, gamma, text])
    return table(['against Tune', 'gamma', 'largest difference of losses'],
                 rows)


def extreme(controls: Sequence[dict[str, Any]], gamma: str, mode: str,
            end: Callable[[list[float]], float]) -> float:
    """Find how far a mode is from Tune at the least, or at the most.

    Returns:
        float: The difference of losses, infinite where one was.
    """
    values = [row[gamma][mode] for row in controls]
    return end([math.inf if value is None else value for value in values])


def follows(controls: Sequence[dict[str, Any]]) -> bool:
    """Tell whether Deploy follows Tune with its gradient multiplied alone."""
    return (extreme(controls, 'fixed', CORRECTED, max) < 1e-9
            and extreme(controls, 'fixed', 'Deploy', min) > 1e-3)


def control_verdict(controls: Sequence[dict[str, Any]]) -> str:
    """Say whether Deploy with its gradient multiplied follows Tune."""
    function = max(row['function'] for row in controls)
    runs = Counter[str]()
    for row in controls:
        runs.update(row['runs'])
    eval_apart = max(
        extreme(controls, gamma, 'Eval', max)
        for gamma in ('fixed', 'learning'))
    lrs = span([row['lr'] for row in controls])
    text = (
        'From the lowest to the highest over checkpoints, at learning rates '
        f'of {lrs}, the lower the larger the scales. Multiplying the scales '
        f'changes the features of the test images by {function:.1e} of their '
        f'size. In Tune, {runs["fused"]} of {runs.total()} blocks ran '
        'folded. ')
    text += (f"Tune's losses are Eval's, to {eval_apart:.1e}. "
             if eval_apart < 1e-9 else
             "Tune's losses are not Eval's, which contradicts the method. ")
    if follows(controls):
        text += ('With gamma fixed, Deploy with its gradient multiplied by '
                 '`coeff^2` follows Tune exactly, and without does not: the '
                 'scales are all there is to it. ')
    else:
        text += ('With gamma fixed, Deploy with its gradient multiplied by '
                 '`coeff^2` should follow Tune, and Deploy alone should not, '
                 'but that is not what was measured. ')
    if extreme(controls, 'learning', CORRECTED, max) > 1e-9:
        text += ('Where gamma learns, as in the sweeps above, it follows '
                 'only nearly, as derived.')
    return text


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot final losses against learning rates."""
    groups = by_times(summarize(found))
    figure = Figure(
        figsize=(8, 1.2 + 2.3 * len(groups)), layout='constrained')
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    guessing = math.log(len(FINE_TUNED_ON))
    top = 1.5 * guessing
    for axes, (by, rows) in zip(panels, groups.items()):
        for index, mode in enumerate(MODES):
            # What diverges leaves the picture at its upper edge.
            losses = [
                statistics.median(
                    top if loss is None else min(loss, top) for loss in at_lr)
                for at_lr in zip(*(row['sweep'][mode]['losses']
                                   for row in rows))
            ]
            axes.plot(
                found['lrs'],
                losses, ('-', '--', '-', ':')[index],
                color=('C0', 'C1', 'C3', 'C2')[index],
                label=mode)
        for name, style, place in (('bound for Deploy', '-', 0),
                                   ('half of channels', '--', -1)):
            limits = [
                row['limit']['Tune'] * row['limits'][place] for row in rows
                if row['limit']['Tune']
            ]
            if limits:
                axes.axvline(
                    statistics.median(limits),
                    color='gray',
                    linestyle=style,
                    linewidth=1,
                    label=f"{name}, from Tune's limit")
        axes.axhline(guessing, color='lightgray', linewidth=1, zorder=0)
        axes.set(
            xscale='log',
            ylabel='final loss',
            ylim=(0, top),
            title=f'scales x {by:g}, median {rows[0]["median"]:.2g}')
    panels[-1].set_xlabel('learning rate')
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=3)
    figure.savefig(path, dpi=120)
