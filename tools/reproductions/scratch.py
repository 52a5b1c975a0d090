"""Train from scratch, and freeze BatchNorm's statistics in mid-run."""
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

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
)
from reproductions.pages import mean_spread, mib, paragraph, table

TITLE = 'Training from scratch'
OF_PAPER = 'left open'
# A share of the test digits. Runs below have learned nothing.
LEARNED = 0.5
# What a run may lose by freezing, of the same.
TOLERANCE = 0.01
QUESTION = paragraph("""
    The paper calls Train the only mode for training from scratch, where
    BatchNorm needs the statistics of the batch. Can Tune mode take over in
    mid-run? The Hook's option `begin` trains in Train mode first, then
    freezes the statistics and goes on in Tune mode. From which epoch on does
    that do no harm, and what does it spare?""")


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut.

    Args:
        inputs (int): Channels of the input.
        outputs (int): Channels of the output.
        stride (int): Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.bn3(self.shortcut(x)))


class SmallResNet(BaseModel):
    """A residual network for small images, with new weights."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
            nn.ReLU(inplace=True), Residual(16, 16, 1), Residual(16, 32, 2),
            Residual(32, 64, 2))
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
    """The control: freezes statistics like ``begin``, but in Eval mode.

    Args:
        begin (int): Epoch from which statistics are frozen.
    """

    def __init__(self, begin: int) -> None:
        self.begin = begin

    def before_train_epoch(self, runner: Runner) -> None:
        """Hold the BatchNorms, where it is time to."""
        if runner.epoch == self.begin:
            turn_on(runner.model, 'Eval', modules=['backbone'])


def train(lr: float, begin: int | None, mode: str, seed: int, epochs: int,
          size: int, batch_size: int, work_dir: str) -> dict:
    """Train once.

    Args:
        lr (float): Learning rate to start with.
        begin (int, optional): Epoch from which statistics are frozen, None
            for never.
        mode (str): ``'Tune'`` or ``'Eval'``, from then on.
        seed (int): Of the weights and the order of images.
        epochs (int): How long.
        size (int): Height and width of the images in pixels.
        batch_size (int): Images a step.
        work_dir (str): For logs.

    Returns:
        dict: The first four arguments; after each epoch the test
        ``accuracy``, and the mean training ``loss`` of the epoch, None where
        it is not a number.
    """
    data = data_options(size, batch_size)
    steps = math.ceil(
        len(data['train_dataloader']['dataset']) / batch_size)
    hooks: list = []
    cfg = {}
    if begin is not None and mode == 'Eval':
        hooks = [FreezeHook(begin)]
    elif begin is not None:
        hooks = [dict(type='mmtune.TuneModeHook')]
        # Without the hook, this key would call for MMEngine's rewrite.
        cfg['efficient_conv_bn_eval'] = dict(
            modules=['backbone'], begin=begin, activations=False)
    runner = Runner(
        model=dict(type=SmallResNet),
        work_dir=f'{work_dir}/{lr:g}-{begin}-{mode}-{seed}',
        **data,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(
            optimizer=dict(
                type='SGD', lr=lr, momentum=0.9, weight_decay=5e-4)),
        param_scheduler=dict(
            type='CosineAnnealingLR',
            T_max=epochs,
            convert_to_iter_based=True),
        custom_hooks=hooks,
        default_hooks=dict(checkpoint=None),
        log_level='WARNING',
        randomness=dict(seed=seed),
        cfg=cfg)
    runner.train()
    scalars = runner.message_hub.log_scalars
    losses, _ = scalars['train/loss'].data
    accuracies, _ = scalars['val/accuracy'].data
    # Runs that start within the same second share a log.
    losses, accuracies = losses[-epochs * steps:], accuracies[-epochs:]
    means = losses.reshape(epochs, steps).mean(axis=1).tolist()
    return dict(
        lr=lr,
        begin=begin,
        mode=mode,
        seed=seed,
        accuracy=accuracies.tolist(),
        loss=[mean if math.isfinite(mean) else None for mean in means])


def measure_steps(batch_size: int, size: int, rounds: int) -> dict:
    """Count the memory of a training step and time it.

    Args:
        batch_size (int): How many images.
        size (int): Their height and width in pixels.
        rounds (int): How many steps to time in each mode.

    Returns:
        dict: For each mode the ``peak`` in bytes, and the ``seconds`` of
        each round; ``ran``, how often the blocks of Tune ran how.
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
        rounds: int = 50,
        work_dir: str = 'work_dirs/reproductions/scratch') -> dict:
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
        work_dir (str): For logs.

    Returns:
        dict: What was found, for :func:`page` and :func:`plot`.

    Raises:
        ValueError: If there is no run to compare with, or a control has
            none.
    """
    if None not in begins:
        raise ValueError('`begins` must hold None, the run that never freezes '
                         f'and is compared with, but got {begins!r}')
    if not {*controls} <= {*begins}:
        raise ValueError(f'`controls` must be of `begins`, {begins!r}, but '
                         f'got {controls!r}')
    kinds = [(begin, 'Tune') for begin in begins]
    kinds += [(begin, 'Eval') for begin in controls]
    plan = [(lr, *kind, seed) for lr in lrs for kind in kinds
            for seed in seeds]
    runs = in_processes(train, [(*arguments, epochs, size, batch_size,
                                 work_dir) for arguments in plan],
                        'Train from scratch')
    return dict(
        lrs=list(lrs),
        begins=list(begins),
        controls=list(controls),
        seeds=list(seeds),
        epochs=epochs,
        size=size,
        batch_size=batch_size,
        images=[len(part) for part in load_data(size)],
        runs=runs,
        step=measure_steps(batch_size, size, rounds))


def _runs(found: dict, lr: float, begin: int | None,
          mode: str = 'Tune') -> list[dict]:
    return [
        run for run in found['runs']
        if (run['lr'], run['begin'], run['mode']) == (lr, begin, mode)
    ]


def _final(runs: list[dict]) -> list[float]:
    return [run['accuracy'][-1] for run in runs]


def _name(begin: int | None) -> str:
    return 'never' if begin is None else str(begin)


def _failed(runs: list[dict]) -> int:
    return sum(accuracy < LEARNED for accuracy in _final(runs))


def _is_harmless(found: dict, lr: float, begin: int) -> bool:
    """Whether no seed ends far below its run that never freezes."""
    return all(
        accuracy >= never - TOLERANCE for accuracy, never in zip(
            _final(_runs(found, lr, begin)), _final(_runs(found, lr, None))))


def _loss(runs: list[dict]) -> str:
    losses = [run['loss'][-1] for run in runs]
    finite = [loss for loss in losses if loss is not None]
    if not finite:
        return 'not a number'
    text = mean_spread(finite, 4)
    failed = len(losses) - len(finite)
    return f'{text}; {failed} not a number' if failed else text


def _to_train(found: dict, mode: str) -> tuple[float, float, float]:
    """Quartiles of the time of a step, as a multiple of Train's."""
    seconds = found['step']['seconds']
    return quartiles(a / b for a, b in zip(seconds[mode], seconds['Train']))


def _row(found: dict, lr: float, begin: int | None, mode: str) -> list[str]:
    runs = _runs(found, lr, begin, mode)
    before = lr_then = spared = ''
    share = 0.
    if begin is not None:
        share = 1 - begin / found['epochs']
        lr_then = f'{lr * (1 - math.cos(math.pi * share)) / 2:.4f}'
    if begin:
        before = mean_spread([run['accuracy'][begin - 1] for run in runs])
    if mode == 'Tune' and begin is not None:
        low, median, high = _to_train(found, 'Tune')
        spared = 'unclear' if low <= 1 <= high else (
            f'{share * (1 - median):+.1%}')
    name = _name(begin) + (' (Eval)' if mode == 'Eval' else '')
    return [
        name, lr_then, before,
        mean_spread(_final(runs)), f'{min(_final(runs)):.3f}',
        _loss(runs), f'{share:.0%}', spared
    ]


def _results(found: dict, lr: float) -> str:
    rows = [_row(found, lr, begin, 'Tune') for begin in found['begins']]
    rows += [_row(found, lr, begin, 'Eval') for begin in found['controls']]
    titles = [
        'begin', 'learning rate then', 'accuracy before', 'accuracy',
        'of the worst seed', 'training loss', 'steps after', 'time spared'
    ]
    frozen = sorted(begin for begin in found['begins'] if begin is not None)
    harmful = [
        begin for begin in frozen if not _is_harmless(found, lr, begin)
    ]
    harmless = [begin for begin in frozen if begin not in harmful]
    text = f"""
        Freezing did no harm with `begin` = {_list(harmless)}: no seed ends
        more than {TOLERANCE:.0%} of the digits below its run that never
        freezes. It did with `begin` = {_list(harmful)}."""
    return '\n\n'.join([
        f'### Learning rate {lr:g}',
        table(titles, rows),
        paragraph(f'{text} {_collapse(found, lr, frozen)}'),
        _control(found, lr)
    ])


def _list(begins: Sequence[int]) -> str:
    return ', '.join(map(str, begins)) or 'none of those tried'


def _collapse(found: dict, lr: float, frozen: Sequence[int]) -> str:
    """Say whether networks failed that had learned before."""
    for begin in sorted(frozen, reverse=True):
        runs = _runs(found, lr, begin)
        before = [run['accuracy'][begin - 1] for run in runs if begin]
        if begin and min(before) > LEARNED and _failed(runs):
            return f"""
                Nor is it enough that a network works with the statistics that
                are frozen: before `begin={begin}` each recognised
                {min(before):.0%} of the digits or more with them, and
                {_failed(runs)} of {len(runs)} failed after (less than
                {LEARNED:.0%}). A likely reason is that frozen statistics no
                longer rescale the maps while the weights go on to move."""
    return ''


def _control(found: dict, lr: float) -> str:
    """Say whether what happened is Tune's doing."""
    tune, stock = ([
        accuracy for begin in found['controls']
        for accuracy in _final(_runs(found, lr, begin, mode))
    ] for mode in ('Tune', 'Eval'))
    alike = sum((a < LEARNED) == (b < LEARNED) for a, b in zip(tune, stock))
    failed = sum(accuracy < LEARNED for accuracy in stock)
    difference = max(abs(a - b) for a, b in zip(tune, stock))
    cause = ''
    if alike < len(tune):
        cause = 'Here the two modes do not agree.'
    elif failed:
        cause = 'What makes runs fail is freezing, not Tune.'
    return paragraph(f"""
        The control freezes at the same epochs in stock Eval mode
        ({', '.join(map(str, found['controls']))}; {failed} of {len(stock)}
        runs fail). It fails or learns as Tune does in {alike} of {len(tune)}
        runs, with accuracies that differ by at most {difference:.3f}.
        {cause}""")


def _from_the_start(found: dict) -> str:
    if 0 not in found['begins']:
        return ''
    texts = ["""
        With `begin=0`, every BatchNorm keeps what a new one has, mean 0 and
        variance 1, and is nothing but a scale and a shift that learn: a
        network without normalization."""]
    for lr in found['lrs']:
        runs = _runs(found, lr, 0)
        learned = len(runs) - _failed(runs)
        texts.append(f"""
            At a learning rate of {lr:g}, {learned} of {len(runs)} such runs
            learned (at least {LEARNED:.0%} of the test digits recognised).""")
    return paragraph(' '.join(texts))


def answer(found: dict) -> str:
    """Say in a sentence what came out."""
    tried = [(lr, begin) for lr in found['lrs']
             for begin in found['begins'] if begin]
    harmless = [f'begin={begin} at a learning rate of {lr:g}'
                for lr, begin in tried if _is_harmless(found, lr, begin)]
    return (f'Freezing the statistics in mid-run did no harm in '
            f'{len(harmless)} of {len(tried)} settings'
            + (f' ({", ".join(harmless)}).' if harmless else '.'))


def page(found: dict) -> str:
    """Write the page."""
    peak = found['step']['peak']
    rows = []
    for mode in peak:
        low, median, high = _to_train(found, mode)
        rows.append([
            mode,
            mib(peak[mode]), f'{peak[mode] / peak["Train"] - 1:+.1%}',
            f'{median:.3f} ({low:.3f}-{high:.3f})'
        ])
    train_images, test_images = found['images']
    ran = ', '.join(
        f'{count} {how}' for how, count in found['step']['ran'].items())
    parts = [
        paragraph(f"""
            A small residual network (10 convolutions) learns scikit-learn's
            handwritten digits at {found['size']} x {found['size']} pixels
            from new weights: {train_images} images to train on,
            {test_images} to test, {found['epochs']} epochs of
            {math.ceil(train_images / found['batch_size'])} steps at batch
            {found['batch_size']}, SGD with momentum, learning rate to 0 along
            a cosine. The runs of a seed differ in nothing but the Hook:"""),
        '```python\ncustom_hooks = [\n'
        "    dict(type='mmtune.TuneModeHook', modules=['backbone'], begin=5)\n"
        ']\n```',
        '## Accuracy',
        paragraph(f"""
            Mean and sample standard deviation over
            {len(found['seeds'])} seeds after the last epoch. "Accuracy
            before" is that at the moment when `begin` comes, with the
            statistics that are frozen then; where it is low, they had not
            settled."""),
        *(_results(found, lr) for lr in found['lrs']),
        _from_the_start(found),
        '## What a step spares',
        table(['mode', 'peak, MiB', 'to Train', 'time, Train = 1'], rows),
        paragraph(f"""
            Bytes are counted, times are taken in rounds in which the modes
            take turns (median and quartiles, forward and backward). Blocks of
            Tune by how they ran: {ran}. "Time spared" above is this ratio
            times the share of steps, where the ratio is beyond 1 by more than
            its spread, and "unclear" where it is not. Memory is
            another matter: a run needs what its most expensive step needs,
            and until `begin` that is a step of Train mode. What Tune spares
            from then on helps who raises the batch or image size at that
            point, or shares the device; only `begin=0` makes the whole run
            smaller."""),
        '## Not run here',
        paragraph("""
            Deep networks and large datasets, where statistics go on to drift
            for far longer than here, and where freezing them at a time that
            is a like share of the run may do harm; the answer above is for
            this network and these digits."""),
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def plot(found: dict, path: Path) -> None:
    """Plot test accuracy by epoch, and the final one by `begin`."""
    figure = Figure(figsize=(8, 3.6), layout='constrained')
    panels = figure.subplots(1, len(found['lrs']), sharey=True, squeeze=False)
    epochs = range(1, found['epochs'] + 1)
    for axes, lr in zip(panels[0], found['lrs']):
        for begin in found['begins']:
            # In one color; a mean of runs that fail and that do not is of
            # none of them.
            color = f'C{found["begins"].index(begin)}'
            for run in _runs(found, lr, begin):
                axes.plot(epochs, run['accuracy'], color=color, linewidth=.8)
            axes.plot([], [], color=color, label=_name(begin))
        axes.set(xlabel='epoch', title=f'learning rate {lr:g}')
    panels[0][0].set(ylabel='test accuracy, a line a seed')
    figure.legend(*panels[0][-1].get_legend_handles_labels(), title='begin',
                  loc='outside right center')
    figure.savefig(path, dpi=120)
