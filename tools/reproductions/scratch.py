"""Train from scratch, and freeze BatchNorm's statistics in mid-run."""
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from operator import itemgetter

import torch
from finetune_digits import data_options, load_data
from matplotlib.figure import Figure
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmtune import turn_on
from mmtune.analysis.timing import quartiles
from mmtune.api import latest_runs
from reproductions.material import (
    in_processes,
    measure_in_turns,
    put_in_paper_mode,
    small_resnet,
)
from reproductions.page import (
    STEP_COLUMNS,
    Page,
    drawing,
    each_mode,
    mean_spread,
    ratios_to_train,
    table,
)

# A share of the test digits. Runs below have learned nothing.
LEARNED = 0.5
# What a run may lose by freezing, of the same.
TOLERANCE = 0.01


class SmallResNet(BaseModel):
    """A residual network for small images, with new weights."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = small_resnet(3, projects=True)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor, labels: Tensor, mode: str = 'tensor'):
        """Give scores, or what the Runner asks for."""
        scores = self.head(self.backbone(images).mean(dim=(2, 3)))
        if mode == 'loss':
            return dict(loss=cross_entropy(scores, labels))
        if mode == 'predict':
            return (scores.argmax(dim=1) == labels).tolist()
        return scores


class FreezeHook(Hook):
    """The control: freezes statistics like ``begin``, but in Eval mode."""

    def __init__(self, begin: int) -> None:
        self.begin = begin

    def before_train_epoch(self, runner: Runner) -> None:
        """Hold the BatchNorms, where it is time to."""
        if runner.epoch == self.begin:
            turn_on(runner.model, 'Eval', modules=['backbone'])


def train(lr: float, begin: int | None, mode: str, seed: int, epochs: int,
          size: int, batch_size: int, work_dir: str) -> dict:
    """Train once, in Tune or Eval mode from the epoch ``begin`` on.

    Returns:
        dict: The first four arguments; after each epoch the test
        ``accuracy``, and the mean training ``loss`` of the epoch, None where
        it is not a number.
    """
    data = data_options(size, batch_size)
    steps = math.ceil(len(data['train_dataloader']['dataset']) / batch_size)
    hooks: list = []
    if begin is not None:
        hooks = [FreezeHook(begin) if mode == 'Eval' else dict(
            type='mmtune.TuneModeHook', modules=['backbone'], begin=begin,
            activations=False)]
    runner = Runner(
        model=dict(type=SmallResNet),
        work_dir=f'{work_dir}/{lr:g}-{begin}-{mode}-{seed}',
        **data,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(
            type='SGD', lr=lr, momentum=0.9, weight_decay=5e-4)),
        param_scheduler=dict(type='CosineAnnealingLR', T_max=epochs,
                             convert_to_iter_based=True),
        custom_hooks=hooks,
        default_hooks=dict(checkpoint=None),
        log_level='WARNING',
        randomness=dict(seed=seed))
    runner.train()
    scalars = runner.message_hub.log_scalars
    losses, _ = scalars['train/loss'].data
    accuracies, _ = scalars['val/accuracy'].data
    # Runs that start within the same second share a log.
    losses, accuracies = losses[-epochs * steps:], accuracies[-epochs:]
    means = losses.reshape(epochs, steps).mean(axis=1).tolist()
    return dict(
        lr=lr, begin=begin, mode=mode, seed=seed,
        accuracy=accuracies.tolist(),
        loss=[mean if math.isfinite(mean) else None for mean in means])


def measure_steps(batch_size: int, size: int, rounds: int) -> dict:
    """Measure a training step of each mode; see :func:`measure_in_turns`.

    And how often the blocks of Tune ``ran`` how.
    """
    batch = load_data(size)[0][:batch_size]
    steps = {}
    for mode in ('Train', 'Eval', 'Tune'):
        torch.manual_seed(0)
        model = SmallResNet()
        put_in_paper_mode(model, mode, ['backbone'])

        def step(model=model):
            model.zero_grad()
            model(*batch, mode='loss')['loss'].backward()

        steps[mode] = step
    found = measure_in_turns(steps, rounds)
    # The last of them is that in Tune mode.
    return dict(found, ran=Counter(latest_runs(model).values()))


def run(lrs: Sequence[float] = (0.05, 0.01),
        begins: Sequence[int | None] = (0, 1, 2, 5, 10, None),
        controls: Sequence[int] = (5, 10),
        seeds: Sequence[int] = (0, 1, 2),
        epochs: int = 15,
        size: int = 16,
        batch_size: int = 64,
        rounds: int = 50) -> dict:
    """Train from each `begin` on, and measure what a step spares.

    Args:
        lrs (Sequence[float]): Learning rates to start with.
        begins (Sequence[int | None]): Epochs from which statistics are
            frozen; None, which has to be among them, is never.
        controls (Sequence[int]): Those of them to repeat in Eval mode.
        seeds (Sequence[int]): A run for each of them.
        epochs (int): How long each run is.
        size (int): Height and width of the images in pixels.
        batch_size (int): Images a step.
        rounds (int): How many steps to time in each mode.
    """
    kinds = [(begin, 'Tune') for begin in begins]
    kinds += [(begin, 'Eval') for begin in controls]
    with tempfile.TemporaryDirectory() as work_dir:
        runs = in_processes(train, [
            (lr, *kind, seed, epochs, size, batch_size, work_dir)
            for lr, kind, seed in product(lrs, kinds, seeds)
        ], 'Train from scratch')
    return dict(
        lrs=list(lrs), begins=list(begins), controls=list(controls),
        seeds=list(seeds), epochs=epochs, size=size, batch_size=batch_size,
        images=[len(part) for part in load_data(size)],
        runs=runs,
        step=measure_steps(batch_size, size, rounds))


def runs_of(found: dict, lr: float, begin: int | None,
            mode: str = 'Tune') -> list[dict]:
    """Give the runs of all seeds."""
    return [run for run in found['runs']
            if (run['lr'], run['begin'], run['mode']) == (lr, begin, mode)]


def final(runs: Sequence[dict]) -> list[float]:
    """Give the accuracies in the end."""
    return [run['accuracy'][-1] for run in runs]


def is_harmless(found: dict, lr: float, begin: int) -> bool:
    """Tell whether no seed ends far below its run that never freezes."""
    return all(
        accuracy >= never - TOLERANCE for accuracy, never in zip(
            final(runs_of(found, lr, begin)), final(runs_of(found, lr, None))))


def frozen(found: dict) -> list[int]:
    """List the epochs from which statistics are frozen."""
    return sorted({*found['begins']} - {None})


def loss_text(runs: Sequence[dict]) -> str:
    """Write the training loss in the end."""
    losses = [run['loss'][-1] for run in runs if run['loss'][-1] is not None]
    if not losses:
        return 'not a number'
    failed = len(runs) - len(losses)
    return mean_spread(losses, 4) + f'; {failed} not a number' * bool(failed)


def results_row(found: dict, lr: float, begin: int | None,
                mode: str) -> dict[str, object]:
    """Write a row of the results, by the titles of its columns."""
    runs = runs_of(found, lr, begin, mode)
    row: dict[str, object] = {
        'begin': 'never' if begin is None else
        f'{begin} (Eval)' if mode == 'Eval' else begin,
        'learning rate then': '', 'accuracy before': '',
        'accuracy': mean_spread(final(runs)),
        'of the worst seed': f'{min(final(runs)):.3f}',
        'training loss': loss_text(runs),
        'steps after': '0%',
        'time spared': ''
    }
    if begin is not None:
        share = 1 - begin / found['epochs']
        row['learning rate then'] = (
            f'{lr * (1 - math.cos(math.pi * share)) / 2:.4f}')
        row['steps after'] = f'{share:.0%}'
        if mode == 'Tune':
            low, median, high = quartiles(
                ratios_to_train(found['step'], 'Tune'))
            row['time spared'] = ('unclear' if low <= 1 <= high else
                                  f'{share * (1 - median):+.1%}')
    if begin:
        row['accuracy before'] = mean_spread(
            [run['accuracy'][begin - 1] for run in runs])
    return row


def results(found: dict, lr: float) -> str:
    """Lay out what comes of each `begin` at a learning rate."""
    rows = [results_row(found, lr, begin, mode)
            for mode, begins in (('Tune', 'begins'), ('Eval', 'controls'))
            for begin in found[begins]]
    cells = {title: itemgetter(title) for title in rows[0]}
    return f'### Learning rate {lr:g}\n\n{table(rows, cells)}'


def collapse(found: dict, lr: float) -> str:
    """Find the last `begin` at which networks that had learned fail."""
    for begin in reversed(frozen(found)):
        runs = runs_of(found, lr, begin)
        before = [run['accuracy'][begin - 1] for run in runs if begin]
        failed = sum(accuracy < LEARNED for accuracy in final(runs))
        if begin and min(before) > LEARNED and failed:
            return (f'`begin={begin}`: {min(before):.0%} or more before, '
                    f'{failed} of {len(runs)} fail after')
    return 'none'


def controls(found: dict, lr: float) -> list[tuple[float, float]]:
    """Give the accuracy of each run of Tune, and of its control."""
    return [pair for begin in found['controls'] for pair in zip(
        *(final(runs_of(found, lr, begin, mode))
          for mode in ('Tune', 'Eval')))]


def alike(one: float, other: float) -> bool:
    """Tell whether both have learned, or both have not."""
    return (one < LEARNED) == (other < LEARNED)


def verdicts(found: dict) -> str:
    """Lay out what that means, a learning rate a row."""

    def begins(lr: float, harmless: bool) -> str:
        return ', '.join(str(begin) for begin in frozen(found) if
                         is_harmless(found, lr, begin) == harmless) or 'none'

    def count(lr: float, holds: Callable[[float, float], bool]) -> str:
        pairs = controls(found, lr)
        return f'{sum(holds(*pair) for pair in pairs)} of {len(pairs)}'

    return table(found['lrs'], {
        'learning rate': '{:g}'.format,
        'no harm with `begin` =': lambda lr: begins(lr, True),
        'harm with': lambda lr: begins(lr, False),
        'learned, and failed when frozen': lambda lr: collapse(found, lr),
        'controls that fail': lambda lr: count(
            lr, lambda _, control: control < LEARNED),
        'end as in Tune': lambda lr: count(lr, alike),
        'accuracies apart by': lambda lr:
        f'{max(abs(a - b) for a, b in controls(found, lr)):.3f}'
    })


def figures(found: dict) -> dict[str, object]:
    """Write what the page shows."""
    tried = [(lr, begin) for lr in found['lrs'] for begin in frozen(found)
             if begin]
    harmless = [f'begin={begin} at a learning rate of {lr:g}'
                for lr, begin in tried if is_harmless(found, lr, begin)]
    train_images, test_images = found['images']
    return {
        'harmless': len(harmless), 'tried': len(tried),
        'which': ', '.join(harmless) or 'none',
        'seeds': len(found['seeds']),
        'size': f'{found["size"]} x {found["size"]}',
        'train-images': train_images, 'test-images': test_images,
        'epochs': found['epochs'], 'batch': found['batch_size'],
        'steps': math.ceil(train_images / found['batch_size']),
        'verdicts': verdicts(found),
        'results': '\n\n'.join(results(found, lr) for lr in found['lrs']),
        'step': table(each_mode([found['step']]), STEP_COLUMNS),
        'ran': ', '.join(f'{count} {how}' for how, count in
                         found['step']['ran'].items())
    }


def claims(found: dict) -> dict[str, bool]:
    """Tell what the page says, and whether it is so."""
    lrs = found['lrs']
    return {
        'freezing does no harm at the last `begin`, and at all others':
        all(is_harmless(found, lr, begin) == (begin == max(frozen(found)))
            for lr in lrs for begin in frozen(found)),
        'that a network works with the statistics is not enough':
        all(collapse(found, lr) != 'none' for lr in lrs),
        'controls fail or learn as Tune does, so that freezing does it':
        all(alike(*pair) for lr in lrs for pair in controls(found, lr)),
        'frozen from the start, no network learns':
        all(max(final(runs_of(found, lr, 0))) < LEARNED for lr in lrs)
    }


@drawing(3.6)
def plot(found: dict, figure: Figure) -> None:
    """Draw the test accuracy by epoch, a panel for each learning rate."""
    panels = figure.subplots(1, len(found['lrs']), sharey=True, squeeze=False)
    epochs = range(1, found['epochs'] + 1)
    for axes, lr in zip(panels[0], found['lrs']):
        for index, begin in enumerate(found['begins']):
            # In one color; a mean of runs that fail and that do not is of
            # none of them.
            color = f'C{index}'
            for run in runs_of(found, lr, begin):
                axes.plot(epochs, run['accuracy'], color=color, linewidth=.8)
            axes.plot([], [], color=color,
                      label='never' if begin is None else begin)
        axes.set(xlabel='epoch', title=f'learning rate {lr:g}')
    panels[0][0].set(ylabel='test accuracy, a line a seed')
    figure.legend(*panels[0][-1].get_legend_handles_labels(), title='begin',
                  loc='outside right center')


PAGE = Page(run, figures, claims, plot)
