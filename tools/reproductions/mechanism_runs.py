"""Fine-tuning in every mode at many learning rates, and the controls."""
import copy
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import torch
from rich.progress import track
from torch import nn

from mmtune.analysis import best_lr, lr_limit
from mmtune.api import latest_runs
from reproductions.material import processes
from reproductions.mechanism_network import (
    FINE_TUNED_ON,
    MODES,
    PRETRAIN_LR,
    accuracy,
    find_scales,
    learn_weights_alone,
    load_data,
    multiply_scales,
    pretrain,
    put,
    train,
)

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
    with processes() as workers:

        def each(function: Callable, tasks: Iterable[tuple], what: str,
                 *more: object) -> Callable[[], list]:
            futures = [workers.submit(function, *task, *more)
                       for task in tasks]
            return lambda: [future.result() for future in
                            track(futures, what)]

        # All begin before one is waited for.
        pretrained = each(pretrained_accuracy, product(seeds), 'Pretrain',
                          pretrain_steps)
        scales = each(describe, product(times, seeds), 'Describe',
                      pretrain_steps)
        sweeps = each(sweep, product(times, MODES, seeds), 'Sweep', lrs,
                      steps, pretrain_steps)
        alone = each(sweep, product(times, ALONE_MODES, seeds),
                     'Sweep, weights alone', alone_lrs, steps, pretrain_steps,
                     True)
        controls = each(
            control, ((by, seed, control_lr / by) for by, seed in
                      product(times, seeds)), 'Control', steps,
            pretrain_steps)
        return dict(
            lrs=list(lrs), steps=steps, pretrained=pretrained(),
            scales=scales(), sweeps=sweeps(),
            alone=dict(lrs=list(alone_lrs), sweeps=alone()),
            controls=controls())


def pretrained_accuracy(seed: int, steps: int) -> float:
    """See :func:`pretrain`."""
    return pretrain(seed, steps)[1]
