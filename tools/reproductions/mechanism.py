"""When Deploy is unstable to train, and whether the scales foretell it."""
import copy
import functools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mmtune import turn_on
from mmtune.analysis import BlockScale, best_lr, block_scales, lr_limit
from mmtune.api import latest_runs
from reproductions.material import processes, put_in_folding_mode
from reproductions.pages import mean_spread, paragraph, table, track

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

# Deploy with the gradient of its weights multiplied by coeff^2.
CORRECTED = 'Deploy, gradient x coeff^2'
MODES = ('Eval', 'Tune', 'Deploy', CORRECTED)

PRETRAINED_ON, FINE_TUNED_ON = range(5), range(5, 10)
BATCH_SIZE = 32
MOMENTUM = 0.9
PRETRAIN_LR = 0.05
# A run's final loss is the mean of so many steps.
FINAL_STEPS = 10
# By which the scales are multiplied while the function is left alone.
TIMES = (10., 1., 0.1)
LRS = tuple(2.**power for power in range(-12, 2))
# Where the weights of convolutions learn and nothing else does, Tune bears a
# learning rate as many times as large as the scales are small, squared.
ALONE_LRS = tuple(2.**power for power in range(-13, 8))
ALONE_MODES = ('Tune', 'Deploy')
# By how much a step of Deploy may differ from Tune's for `best_lr`.
FACTOR = 10.
# Accuracies no farther apart than this count as alike.
COMPARABLE = 0.02
# Of the channels that `lr_limit` heeds.
SHARES = (1., 0.9, 0.5)


# --------------------------------------------------------------------------
# A small ResNet, pretrained
# --------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """A basic block of a ResNet.

    Args:
        in_channels (int): Of the input.
        out_channels (int): Of the output.
        stride (int): Of the first convolution and of the shortcut, which
            has a convolution where this is not 1.
    """

    def __init__(self, in_channels: int, out_channels: int,
                 stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(
            out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
            nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def build_model(classes: int) -> nn.Sequential:
    """Build a ResNet for images of 8 x 8 pixels.

    Args:
        classes (int): How many there are.

    Returns:
        nn.Sequential: Nine convolutions, each with a BatchNorm, and a linear
        layer, the last module, which starts from zero.
    """
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
        nn.ReLU(), ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode='fan_out', nonlinearity='relu')
    reset_head(model)
    return model


def reset_head(model: nn.Sequential) -> None:
    """Let the last layer know nothing.

    Args:
        model (nn.Sequential): Is changed.
    """
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)


def load_data(classes: Sequence[int], seed: int) -> list[Tensor]:
    """Load scikit-learn's handwritten digits.

    Args:
        classes (Sequence[int]): Which digits, one after the other.
        seed (int): Of the split.

    Returns:
        list[Tensor]: Images of shape (n, 1, 8, 8) and labels from 0 on, to
        train with, and then a fourth of all, to test with.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(digits.target) - classes[0]
    chosen = torch.nonzero((labels >= 0) & (labels < len(classes))).flatten()
    generator = torch.Generator().manual_seed(seed)
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    parts = chosen.tensor_split([len(chosen) * 3 // 4])
    return [data[part] for part in parts for data in (images, labels)]


def train(model: nn.Module,
          images: Tensor,
          labels: Tensor,
          steps: int,
          lr: float,
          seed: int,
          weight_decay: float = 0.) -> list[float]:
    """Train by SGD with momentum.

    Args:
        model (nn.Module): Is trained, in the mode that it is in.
        images (Tensor): To draw batches from.
        labels (Tensor): Of the images.
        steps (int): How many, fewer where the loss is not finite any more.
        lr (float): Learning rate.
        seed (int): Of the batches.
        weight_decay (float): Defaults to 0.

    Returns:
        list[float]: The loss of each step; only the last may not be finite.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        learning, lr=lr, momentum=MOMENTUM, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    while len(losses) < steps and all(map(math.isfinite, losses[-1:])):
        batch = torch.randint(
            len(labels), (BATCH_SIZE, ), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Count what is recognised.

    Args:
        model (nn.Module): In a mode in which BatchNorms are fixed.
        images (Tensor): To test with.
        labels (Tensor): Of the images.

    Returns:
        float: The share.
    """
    return (model(images).argmax(1) == labels).float().mean().item()


@functools.cache
def pretrain(seed: int, steps: int) -> tuple[nn.Sequential, float]:
    """Train on the first five digits, in Train mode.

    Args:
        seed (int): Of weights, split and batches.
        steps (int): How many.

    Returns:
        tuple[nn.Sequential, float]: The model, to be copied, with a head
        that has learned nothing; and its accuracy before that.
    """
    torch.manual_seed(seed)
    model = build_model(len(PRETRAINED_ON))
    *training, images, labels = load_data(PRETRAINED_ON, seed)
    train(model, *training, steps, PRETRAIN_LR, seed, weight_decay=5e-4)
    reached = accuracy(model.eval(), images, labels)
    reset_head(model)
    return model, reached


# --------------------------------------------------------------------------
# Scales
# --------------------------------------------------------------------------


def find_scales(model: nn.Module) -> list[BlockScale]:
    """Compute the scales of a model's blocks.

    Args:
        model (nn.Module): Stock; is not changed.

    Returns:
        list[BlockScale]: One for each block.
    """
    report = turn_on(copy.deepcopy(model), activations=False)
    return block_scales(model, report)


@torch.no_grad()
def multiply_scales(model: nn.Module, times: float) -> None:
    """Multiply every scale of a model, but leave its function alone.

    In Train mode a weight can be multiplied without any effect, so a
    checkpoint may as well have turned out like this.

    Args:
        model (nn.Module): Stock; is changed.
        times (float): What its scales are multiplied by, above 0.
    """
    for scale in find_scales(model):
        conv = model.get_submodule(scale.conv)
        norm = model.get_submodule(scale.bn)
        conv.weight.div_(times)
        norm.running_mean.div_(times)
        norm.running_var.add_(norm.eps).div_(times**2).sub_(norm.eps)


def learn_weights_alone(model: nn.Module) -> None:
    """Let the convolutions' weights learn, and nothing that has no scale.

    Args:
        model (nn.Module): Is changed; in any mode.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.requires_grad_()


def put(model: nn.Module, mode: str) -> nn.Module:
    """Copy a model into a mode.

    Args:
        model (nn.Module): Stock, in eval mode.
        mode (str): One of :data:`MODES`.

    Returns:
        nn.Module: In that mode, with fixed BatchNorms.
    """
    scales = find_scales(model)
    model = copy.deepcopy(model)
    put_in_folding_mode(model, mode.split(',')[0])
    if mode == CORRECTED:
        for scale in scales:
            weight = model.get_submodule(scale.conv).weight
            square = scale.coeff.square().to(weight.dtype)
            weight.register_hook(
                lambda grad, square=square: grad * square.view(-1, 1, 1, 1))
    return model


# --------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------


def describe(times: float, seed: int, pretrain_steps: int) -> dict[str, Any]:
    """Describe a checkpoint by its scales alone.

    Args:
        times (float): What its scales are multiplied by.
        seed (int): Of the pretraining.
        pretrain_steps (int): See :func:`pretrain`.

    Returns:
        dict[str, Any]: ``min``, ``median`` and ``max`` of the scales;
        ``limits``, of :func:`mmtune.analysis.lr_limit` for each of
        :data:`SHARES`, and ``best_lr`` of
        :func:`mmtune.analysis.best_lr`, as multiples of Tune's learning
        rate; ``upper_limit``, the multiple beyond which Tune would be
        stable as well wherever Deploy is, with gamma fixed.
    """
    model = copy.deepcopy(pretrain(seed, pretrain_steps)[0])
    multiply_scales(model, times)
    coeff = torch.cat([scale.coeff for scale in find_scales(model)])
    return dict(
        times=times,
        seed=seed,
        min=coeff.min().item(),
        median=coeff.median().item(),
        max=coeff.max().item(),
        limits=[lr_limit(coeff, 1., share=share) for share in SHARES],
        upper_limit=max(1., coeff.max().item()**2),
        best_lr=best_lr(coeff, FACTOR)[0])


def sweep(times: float, mode: str, seed: int, lrs: Sequence[float],
          steps: int, pretrain_steps: int,
          weights_alone: bool = False) -> dict[str, Any]:
    """Fine-tune on the other five digits, once a learning rate.

    Args:
        times (float): What the checkpoint's scales are multiplied by.
        mode (str): One of :data:`MODES`.
        seed (int): Of pretraining, split and batches.
        lrs (Sequence[float]): Learning rates.
        steps (int): Of each run.
        pretrain_steps (int): See :func:`pretrain`.
        weights_alone (bool): Whether the head learns first, alone, and then
            the weights of the convolutions. Defaults to False: all learns.

    Returns:
        dict[str, Any]: ``losses`` and ``accuracies``, one a learning rate:
        the mean training loss of the last steps, None where the loss became
        infinite; and the share of the test images that is recognised.
    """
    start = copy.deepcopy(pretrain(seed, pretrain_steps)[0])
    *training, images, labels = load_data(FINE_TUNED_ON, seed)
    if weights_alone:
        start.requires_grad_(False)
        start[-1].requires_grad_(True)
        train(start, *training, pretrain_steps, PRETRAIN_LR, seed)
    multiply_scales(start, times)
    losses, accuracies = [], []
    for lr in lrs:
        model = put(start, mode)
        if weights_alone:
            # After `put`: Deploy makes biases that would learn.
            learn_weights_alone(model)
        path = train(model, *training, steps, lr, seed)
        finite = math.isfinite(path[-1])
        losses.append(
            statistics.mean(path[-FINAL_STEPS:]) if finite else None)
        accuracies.append(accuracy(model, images, labels))
    return dict(
        times=times,
        mode=mode,
        seed=seed,
        losses=losses,
        accuracies=accuracies)


def control(times: float, seed: int, lr: float, steps: int,
            pretrain_steps: int) -> dict[str, Any]:
    """Compare runs in float64 that should, or should not, be the same.

    Args:
        times (float): What the checkpoint's scales are multiplied by.
        seed (int): Of pretraining, split and batches.
        lr (float): Learning rate.
        steps (int): Of each run.
        pretrain_steps (int): See :func:`pretrain`.

    Returns:
        dict[str, Any]: ``function``, by how much multiplying the scales
        changes the features of the test images, as a share of them; the
        largest difference of two runs' losses over all steps, with gamma
        ``fixed`` and ``learning``, between Tune and each other mode;
        ``rescaled``, the same between Deploy from this checkpoint and from
        the original one; ``runs``, how the blocks of Tune ran.
    """
    original = copy.deepcopy(pretrain(seed, pretrain_steps)[0]).double()
    start = copy.deepcopy(original)
    multiply_scales(start, times)
    images, labels, test_images, _ = load_data(FINE_TUNED_ON, seed)
    with torch.no_grad():
        features, other = (
            model[:-1](test_images.double()) for model in (original, start))

    def losses(model: nn.Module, mode: str) -> list[float]:
        model = put(model, mode)
        found = train(model, images.double(), labels, steps, lr, seed)
        if mode == 'Tune':
            runs.update(latest_runs(model))
        return found

    def distances(start: nn.Module) -> dict[str, float | None]:
        tuned = losses(start, 'Tune')
        return {
            mode: largest_difference(tuned, losses(start, mode))
            for mode in MODES if mode != 'Tune'
        }

    runs: dict[str, str] = {}
    learning = distances(start)
    rescaled = largest_difference(
        losses(start, 'Deploy'), losses(original, 'Deploy'))
    for scale in find_scales(start):
        start.get_submodule(scale.bn).weight.requires_grad_(False)
    return dict(
        times=times,
        seed=seed,
        lr=lr,
        function=((features - other).norm() / features.norm()).item(),
        learning=learning,
        fixed=distances(start),
        rescaled=rescaled,
        runs=dict(Counter(runs.values())))


def largest_difference(losses: Sequence[float],
                       others: Sequence[float]) -> float | None:
    """Compare two loss curves.

    Args:
        losses (Sequence[float]): A loss a step.
        others (Sequence[float]): The same of another run.

    Returns:
        float | None: The largest absolute difference; None where one of them
        became infinite.
    """
    if not all(map(math.isfinite, [*losses, *others])):
        return None
    return max(abs(a - b) for a, b in zip(losses, others))


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


def run(times: Sequence[float] = TIMES,
        lrs: Sequence[float] = LRS,
        seeds: Sequence[int] = (0, 1, 2),
        steps: int = 60,
        pretrain_steps: int = 300,
        control_lr: float = 2.**-8,
        alone_lrs: Sequence[float] = ALONE_LRS) -> dict[str, Any]:
    """Sweep the learning rate in each mode, and run the controls.

    Args:
        times (Sequence[float]): What the scales are multiplied by.
        lrs (Sequence[float]): Learning rates, increasing.
        seeds (Sequence[int]): Of pretraining, split and batches.
        steps (int): Of each fine-tuning.
        pretrain_steps (int): Of the pretraining.
        control_lr (float): Learning rate of the controls at the original
            scales; divided by what they are multiplied by.
        alone_lrs (Sequence[float]): The same as ``lrs``, for the sweep in
            which nothing learns but weights.

    Returns:
        dict[str, Any]: Plain data; see :func:`describe`, :func:`sweep` and
        :func:`control`.
    """
    with processes() as workers:
        pretrained = [
            workers.submit(pretrained_accuracy, seed, pretrain_steps)
            for seed in seeds
        ]
        described = [
            workers.submit(describe, *task, pretrain_steps)
            for task in product(times, seeds)
        ]
        sweeps = [
            workers.submit(sweep, *task, lrs, steps, pretrain_steps)
            for task in product(times, MODES, seeds)
        ]
        alone = [
            workers.submit(sweep, *task, alone_lrs, steps, pretrain_steps,
                           weights_alone=True)
            for task in product(times, ALONE_MODES, seeds)
        ]
        controls = [
            workers.submit(control, by, seed, control_lr / by, steps,
                           pretrain_steps)
            for by, seed in product(times, seeds)
        ]
        return dict(
            lrs=list(lrs),
            steps=steps,
            pretrained=[future.result() for future in pretrained],
            scales=[future.result() for future in described],
            sweeps=[future.result() for future in track(sweeps, 'Sweep')],
            alone=dict(
                lrs=list(alone_lrs),
                sweeps=[
                    future.result()
                    for future in track(alone, 'Sweep, weights alone')
                ]),
            controls=[
                future.result() for future in track(controls, 'Control')
            ])


def pretrained_accuracy(seed: int, steps: int) -> float:
    """See :func:`pretrain`."""
    return pretrain(seed, steps)[1]


# --------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------


def answer(found: dict[str, Any]) -> str:
    """Say in a sentence what came out.

    Args:
        found (dict): From :func:`run`.

    Returns:
        str: One sentence.
    """
    limits = '; '.join(f'x {by:g}: {span(ratios(group))}'
                       for by, group in by_times(summarize(found)).items())
    return ("The largest learning rate that Deploy bears, as a multiple of "
            f"Tune's, by what the scales are multiplied by: {limits}.")


def page(found: dict[str, Any]) -> str:
    """Describe what came out.

    Args:
        found (dict[str, Any]): From :func:`run`.

    Returns:
        str: In Markdown.
    """
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


def summarize(found: dict[str, Any],
              swept: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Put together what each checkpoint led to.

    Args:
        found (dict[str, Any]): From :func:`run`.
        swept (dict[str, Any], optional): With ``lrs`` and ``sweeps``.
            Defaults to None: those of ``found`` itself.

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

    Args:
        rows (Sequence[dict[str, Any]]): From :func:`summarize`.
        other (str): The other mode. Defaults to Tune.

    Returns:
        list[float]: For each checkpoint on which both learned at all.
    """
    return [
        row['limit']['Deploy'] / row['limit'][other] for row in rows
        if row['limit']['Deploy'] and row['limit'][other]
    ]


def span(values: Sequence[float | None]) -> str:
    """Write from where to where numbers go.

    Args:
        values (Sequence[float | None]): Numbers; None is left out.

    Returns:
        str: With two digits.
    """
    known = [value for value in values if value is not None]
    if not known:
        return 'none'
    ends = dict.fromkeys(f'{end:.2g}' for end in (min(known), max(known)))
    return ' to '.join(ends)


def by_times(
        rows: Sequence[dict[str, Any]]) -> dict[float, list[dict[str, Any]]]:
    """Group summaries by what the scales were multiplied by.

    Args:
        rows (Sequence[dict[str, Any]]): From :func:`summarize`.

    Returns:
        dict[float, list[dict[str, Any]]]: The groups.
    """
    return {
        times: [row for row in rows if row['times'] == times]
        for times in dict.fromkeys(row['times'] for row in rows)
    }


def limit_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the limits of all modes.

    Args:
        rows (Sequence[dict[str, Any]]): From :func:`summarize`.

    Returns:
        str: In Markdown.
    """
    return table(['scales', 'coeff', *MODES], [[
        f'x {times:g}',
        span([row[end] for row in group for end in ('min', 'max')]),
        *(span([row['limit'][mode] for row in group]) for mode in MODES)
    ] for times, group in by_times(rows).items()])


def verdict(times: float, rows: Sequence[dict[str, Any]]) -> str:
    """Say which of Deploy and of Eval and Tune fails first.

    Args:
        times (float): What the scales were multiplied by.
        rows (Sequence[dict[str, Any]]): From :func:`summarize`, of these.

    Returns:
        str: A paragraph.
    """
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
    """Lay out the limits where nothing learns but weights.

    Args:
        rows (Sequence[dict[str, Any]]): From :func:`summarize`.

    Returns:
        str: In Markdown.
    """
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

    Args:
        rows (Sequence[dict[str, Any]]): From :func:`summarize`.

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
    """Say whether the scales tell Deploy's limit where nothing hides them.

    Args:
        rows (Sequence[dict[str, Any]]): From :func:`summarize`.

    Returns:
        str: A paragraph.
    """
    inside, learned = foretold(rows)
    if not learned:
        return 'Nothing learned, so that there is nothing to foretell.'
    from_median = [
        ratios([row])[0] / row['median']**2 for row in rows if ratios([row])
    ]
    return (f'Deploy / Tune is in that range on {inside} of {learned} '
            'checkpoints, as far as limits are known; it is '
            f'{span(from_median)} times the square of the median scale.')


def conclusion(found: dict[str, Any], rows: Sequence[dict[str, Any]],
               alone: Sequence[dict[str, Any]]) -> str:
    """Say what was confirmed of the paper's explanation, and what not.

    Args:
        found (dict[str, Any]): From :func:`run`.
        rows (Sequence[dict[str, Any]]): From :func:`summarize`.
        alone (Sequence[dict[str, Any]]): The same, where nothing but weights
            learned.

    Returns:
        str: A paragraph.
    """
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

    Args:
        row (dict[str, Any]): From :func:`summarize`.

    Returns:
        bool: True also where Deploy fails at all learning rates.
    """
    limit = row['limit']
    return (limit['Deploy'] or 0) < (limit['Tune'] or 0)


def judge_stock(stock: Sequence[dict[str, Any]],
                smaller: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Say whether checkpoints as they come show the paper's instability.

    Args:
        stock (Sequence[dict[str, Any]]): From :func:`summarize`, with scales
            as pretraining left them.
        smaller (Sequence[Sequence[dict[str, Any]]]): The same with smaller
            scales, by what these were multiplied by.

    Returns:
        str: A sentence, and a space.
    """
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
    """Say what multiplying the scales changes, and what it does not.

    Args:
        found (dict[str, Any]): From :func:`run`.

    Returns:
        str: A paragraph.
    """
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


def best_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out what Deploy reaches at Eval's learning rate and at its own.

    Args:
        rows (Sequence[dict[str, Any]]): From :func:`summarize`.

    Returns:
        str: In Markdown.
    """

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
    """Say whether Deploy wants no more than another learning rate.

    Args:
        rows (Sequence[dict[str, Any]]): From :func:`summarize`.

    Returns:
        str: A paragraph.
    """
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
    """Lay out Deploy's limits beside what the scales say.

    Args:
        rows (Sequence[dict[str, Any]]): From :func:`summarize`.

    Returns:
        str: In Markdown.
    """
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
    """Say how well the scales foretell Deploy's limit.

    Args:
        rows (Sequence[dict[str, Any]]): From :func:`summarize`.

    Returns:
        str: A paragraph.
    """
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


def control_table(controls: Sequence[dict[str, Any]]) -> str:
    """Lay out how far runs lie apart that should be the same, or not.

    Args:
        controls (Sequence[dict[str, Any]]): From :func:`control`.

    Returns:
        str: In Markdown.
    """
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

    Args:
        controls (Sequence[dict[str, Any]]): Of :func:`run`.
        gamma (str): ``'fixed'`` or ``'learning'``.
        mode (str): The mode.
        end (Callable[[list[float]], float]): ``min`` or ``max``.

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
    """Say whether Deploy with its gradient multiplied follows Tune.

    Args:
        controls (Sequence[dict[str, Any]]): From :func:`control`.

    Returns:
        str: A paragraph.
    """
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
    """Plot final losses against learning rates.

    Args:
        found (dict[str, Any]): From :func:`run`.
        path (Path): The picture to write.
    """
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
