"""Fine-tuning in every mode at many learning rates, and the controls."""
import copy
import functools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, islice, product
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mmtune import turn_on
from mmtune.analysis import BlockScale, best_lr, block_scales, lr_limit
from mmtune.api import latest_runs
from reproductions.material import (
    in_processes,
    put_in_folding_mode,
    small_resnet,
)

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
# Of the channels that `lr_limit` heeds.
SHARES = (1., 0.9, 0.5)


def build_model(classes: int) -> nn.Sequential:
    """Build a ResNet for images of 8 x 8 pixels.

    Nine convolutions, each with a BatchNorm, and a linear layer, which is the
    last module and starts from zero.
    """
    model = nn.Sequential(
        *small_resnet(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode='fan_out', nonlinearity='relu')
    reset_head(model)
    return model


def reset_head(model: nn.Sequential) -> None:
    """Let the last layer know nothing."""
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)


def load_data(classes: Sequence[int], seed: int) -> list[Tensor]:
    """Load scikit-learn's handwritten digits of some successive classes.

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


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int,
          lr: float, seed: int, weight_decay: float = 0.) -> list[float]:
    """Train by SGD with momentum, and give the loss of each step.

    Only the last may not be finite: there training stops.
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
    """Tell the share of images that is recognised."""
    return (model(images).argmax(1) == labels).float().mean().item()


@functools.cache
def pretrain(seed: int, steps: int) -> tuple[nn.Sequential, float]:
    """Train on the first five digits, in Train mode.

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


def find_scales(model: nn.Module) -> list[BlockScale]:
    """Compute the scales of the blocks of a stock model."""
    report = turn_on(copy.deepcopy(model), activations=False)
    return block_scales(model, report)


@torch.no_grad()
def multiply_scales(model: nn.Module, times: float) -> None:
    """Multiply every scale of a model, but leave its function alone.

    In Train mode a weight can be multiplied without any effect, so a
    checkpoint may as well have turned out like this.
    """
    for scale in find_scales(model):
        conv = model.get_submodule(scale.conv)
        norm = model.get_submodule(scale.bn)
        conv.weight.div_(times)
        norm.running_mean.div_(times)
        norm.running_var.add_(norm.eps).div_(times**2).sub_(norm.eps)


def learn_weights_alone(model: nn.Module) -> None:
    """Let the convolutions' weights learn, and nothing that has no scale."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.requires_grad_()


def put(model: nn.Module, mode: str) -> nn.Module:
    """Copy a stock model into one of :data:`MODES`, BatchNorms fixed."""
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


def describe(times: float, seed: int, pretrain_steps: int) -> dict[str, Any]:
    """Describe a checkpoint by its scales alone.

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

    With ``weights_alone`` the head learns first, alone, and then the weights
    of the convolutions; else all learns.

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
    return dict(times=times, mode=mode, seed=seed, losses=losses,
                accuracies=accuracies)


def control(times: float, seed: int, lr: float, steps: int,
            pretrain_steps: int) -> dict[str, Any]:
    """Compare runs in float64 that should, or should not, be the same.

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
    """Compare two loss curves; None where one became infinite."""
    if not all(map(math.isfinite, [*losses, *others])):
        return None
    return max(abs(a - b) for a, b in zip(losses, others))


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
    kinds = dict(
        pretrained=[(pretrained_accuracy, seed, pretrain_steps)
                    for seed in seeds],
        scales=[(describe, *of, pretrain_steps)
                for of in product(times, seeds)],
        sweeps=[(sweep, *of, lrs, steps, pretrain_steps)
                for of in product(times, MODES, seeds)],
        alone=[(sweep, *of, alone_lrs, steps, pretrain_steps, True)
               for of in product(times, ALONE_MODES, seeds)],
        controls=[(control, by, seed, control_lr / by, steps, pretrain_steps)
                  for by, seed in product(times, seeds)])
    # All at once: a process pretrains once for each seed.
    results = iter(in_processes(call, chain(*kinds.values()), 'Fine-tune'))
    found: dict[str, Any] = {
        kind: list(islice(results, len(tasks)))
        for kind, tasks in kinds.items()
    }
    found['alone'] = dict(lrs=list(alone_lrs), sweeps=found['alone'])
    return dict(lrs=list(lrs), steps=steps, **found)


def call(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function, in :func:`in_processes` one of several."""
    return function(*arguments)


def pretrained_accuracy(seed: int, steps: int) -> float:
    """See :func:`pretrain`."""
    return pretrain(seed, steps)[1]
