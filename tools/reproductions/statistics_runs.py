"""Training in all modes side by side while the statistics jump."""
import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mmcv
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmtune.api import latest_runs
from reproductions.material import (
    digits,
    fetch_trees,
    pretrained_classifier,
    put_in_folding_mode,
)

# How many of MobileNetV2's seven stages the network has.
STAGES = 4
# Its blocks whose gamma, or variance, is made small.
SMALL_GAMMA = 'backbone.layer3.1.linear_conv.bn'
SMALL_VAR = 'backbone.layer4.2.depthwise_conv.bn'
# The mode of each run. One that is shuffled tells how far apart two runs get
# by rounding alone.
ONE_STEP = 'Tune, same point'
RUNS = {'Eval': 'Eval', 'Tune': 'Tune', 'Eval, shuffled': 'Eval',
        ONE_STEP: 'Tune', 'Deploy': 'Deploy'}


def norms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms of a model; in Deploy mode it has none."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def set_training(model: nn.Module, training: bool) -> None:
    for norm in norms(model):
        norm.train(training)


@torch.no_grad()
def reestimate(model: nn.Module, images: Sequence[Tensor]) -> None:
    """Take the statistics from batches, each with the same weight."""
    for norm in norms(model):
        norm.reset_running_stats()
        norm.momentum = None
    set_training(model, True)
    for batch in images:
        model(batch, None)
    set_training(model, False)
    for norm in norms(model):
        norm.momentum = 0.1


@torch.no_grad()
def shrink_gamma(model: nn.Module) -> None:
    """Half of a block's channels get a gamma of 0, the others 1e-8."""
    norm = model.get_submodule(SMALL_GAMMA)
    # In Deploy mode it is folded.
    if isinstance(norm, _BatchNorm):
        norm.weight.fill_(1e-8)[::2] = 0


@torch.no_grad()
def shrink_var(model: nn.Module) -> None:
    """A block's variances become 0, where rstd is 316."""
    norm = model.get_submodule(SMALL_VAR)
    if isinstance(norm, _BatchNorm):
        norm.running_var.zero_()


class Material:
    """Batches of digits to learn, which are used in turn, and of trees."""

    def __init__(self, size: int, batch_size: int, batches: int) -> None:
        images, labels = digits(size, batch_size * batches)
        self.batches = list(
            zip(images.split(batch_size), labels.split(batch_size)))
        self.digits = [images for images, _ in self.batches[:4]]
        files = sorted(Path('data/trees/train').glob('*.png'))
        trees = torch.stack([
            torch.tensor(mmcv.imread(file, channel_order='rgb'))
            .permute(2, 0, 1).float() for file in files[:4 * batch_size]
        ])
        trees = F.interpolate(trees, (size, size), mode='area')
        trees -= trees.mean((0, 2, 3), keepdim=True)
        trees /= trees.std((0, 2, 3), keepdim=True)
        self.trees = trees.split(batch_size)


def events(material: Material) -> dict[str, Callable]:
    """What happens to a model, in this order."""

    def on(images: Sequence[Tensor]) -> Callable:
        return lambda model: reestimate(
            model, [batch.to(model.head.weight.dtype) for batch in images])

    return {
        're-estimated on the digits': on(material.digits),
        'train mode: moved by momentum': lambda m: set_training(m, True),
        'eval mode again': lambda m: set_training(m, False),
        'from another domain, the trees': on(material.trees),
        're-estimated again': on(material.digits),
        'a gamma of 0 or 1e-8': shrink_gamma,
        'a variance of 0': shrink_var
    }


class Learner:
    """A copy of a model in some mode, that is trained step by step."""

    def __init__(self, start: nn.Module, mode: str,
                 dtype: torch.dtype) -> None:
        self.model = copy.deepcopy(start).to(dtype)
        put_in_folding_mode(self.model, mode)
        self.dtype = dtype
        # Adam divides a gradient by its size: with a smaller eps, those that
        # are zero but for rounding would move parameters at random.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, eps=1e-5)

    def look(self, images: Tensor, labels: Tensor) -> tuple[float, dict]:
        """Give the loss and the gradients of the point where it is."""
        self.optimizer.zero_grad()
        loss = self.model(images.to(self.dtype), labels, mode='loss')['loss']
        loss.backward()
        return loss.item(), {
            name: parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def go_to(self, other: 'Learner') -> None:
        """Take over the point where another is."""
        self.model.load_state_dict(other.model.state_dict())
        for own, norm in zip(norms(self.model), norms(other.model)):
            own.train(norm.training)


def worst(gradients: dict[str, Tensor], stock: dict[str, Tensor]) -> float:
    """The largest difference among the gradients of all parameters.

    Relative to the largest of the same convolution and BatchNorm: where
    another BatchNorm in train mode follows, that of a bias is zero but for
    rounding.
    """
    errors: dict[str, list[float]] = {}
    norms: dict[str, list[float]] = {}
    for name, value in stock.items():
        block = name.rsplit('.', 2)[0]
        error = gradients[name].double() - value.double()
        errors.setdefault(block, []).append(error.norm().item())
        norms.setdefault(block, []).append(value.norm().item())
    return max(max(errors[block]) / max(norms[block]) for block in norms)


def run(interval: int = 14, size: int = 48, batch_size: int = 8) -> dict:
    """Train in all modes side by side while statistics jump.

    Args:
        interval (int): Steps from one event to the next.
        size (int): Height and width of the images in pixels.
        batch_size (int): Images of a step.

    Returns:
        dict: ``events`` by step; ``runs`` by dtype and run, with curves of
        ``loss``, ``loss_difference``, ``difference`` and ``error``; ``ran``,
        how many blocks of Tune ran how in each step; ``smooth``, errors of
        steps in float32 where nothing bends: with SiLU for ReLU6.
    """
    fetch_trees()
    start = truncated()
    material = Material(size, batch_size, 24)
    happenings = events(material)
    steps = interval * (len(happenings) + 1)
    at = range(interval, steps, interval)
    batches = list(itertools.islice(itertools.cycle(material.batches), steps))
    runs, ran = {}, []
    for dtype in ('float64', 'float32'):
        runs[dtype], ran = side_by_side(
            start, RUNS, dtype, batches, dict(zip(at, happenings.values())))
    smooth, _ = side_by_side(
        with_silu(start), {'Eval': 'Eval', ONE_STEP: 'Tune'}, 'float32',
        batches[:2 * interval], {0: happenings['re-estimated on the digits']})
    return dict(
        size=size, batch_size=batch_size, blocks=len(norms(start)),
        interval=interval, steps=steps, events=dict(zip(at, happenings)),
        runs=runs, ran=ran,
        smooth=dict(Eval=smooth['Eval']['error'],
                    Tune=smooth[ONE_STEP]['error']))


def side_by_side(
        start: nn.Module, runs: Mapping[str, str], dtype: str,
        batches: Sequence[tuple[Tensor, Tensor]],
        happenings: Mapping[int, Callable]) -> tuple[dict, list[Counter]]:
    """Train copies of a model, and compare them at every step.

    Args:
        start (nn.Module): Stock.
        runs (Mapping[str, str]): Of :data:`RUNS`, with Eval and
            :data:`ONE_STEP`.
        dtype (str): In which to train.
        batches (Sequence[tuple[Tensor, Tensor]]): Images and labels.
        happenings (Mapping[int, Callable]): By step, what happens to each
            model before.

    Returns:
        tuple[dict, list[Counter]]: The curves of each run; how many blocks
        of Tune ran how in each step.
    """
    learners = {name: Learner(start, mode, getattr(torch, dtype))
                for name, mode in runs.items()}
    exact = Learner(start, 'Eval', torch.float64)
    curves: dict[str, dict] = {
        name: dict(loss=[], loss_difference=[], difference=[], error=[])
        for name in runs
    }
    ran = []
    for step, batch in enumerate(
            track(batches, f'Train side by side in {dtype}')):
        if step in happenings:
            for learner in learners.values():
                happenings[step](learner.model)
        take_step(learners, exact, batch, curves)
        ran.append(Counter(latest_runs(learners[ONE_STEP].model).values()))
    return curves, ran


def take_step(learners: dict[str, Learner], exact: Learner,
              batch: tuple[Tensor, Tensor], curves: dict[str, dict]) -> None:
    """Take a step in every run, and note how far each is from Eval.

    Args:
        learners (dict[str, Learner]): By the keys of :data:`RUNS`.
        exact (Learner): Eval in float64.
        batch (tuple[Tensor, Tensor]): Images and labels.
        curves (dict[str, dict]): What is known of each run goes there.
    """
    images, labels = batch
    learners[ONE_STEP].go_to(learners['Eval'])
    looks = {}
    for name, learner in learners.items():
        order = torch.arange(len(labels))
        if name == 'Eval, shuffled':
            order = order.flip(0)
        looks[name] = learner.look(images[order], labels[order])
    stock_loss, stock = looks['Eval']
    exact.go_to(learners['Eval'])
    _, truth = exact.look(images, labels)
    for name, (loss, gradients) in looks.items():
        curve = curves[name]
        curve['loss'].append(loss if math.isfinite(loss) else None)
        curve['loss_difference'].append(abs(loss / stock_loss - 1))
        if name != 'Deploy':
            curve['difference'].append(worst(gradients, stock))
        if name in ('Eval', ONE_STEP):
            curve['error'].append(worst(gradients, truth))
        learners[name].optimizer.step()


def with_silu(model: nn.Module) -> nn.Module:
    """Copy a model, with SiLU in place of ReLU6."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.SiLU())
    return model


def truncated() -> nn.Module:
    """A classifier with the first stages of MobileNetV2."""
    model = pretrained_classifier()
    backbone = model.backbone
    for name in backbone.layers[STAGES:]:
        delattr(backbone, name)
    del backbone.layers[STAGES:]
    backbone.out_indices = (STAGES - 1, )
    last = getattr(backbone, backbone.layers[-1])[-1]
    model.head = nn.Linear(last.linear_conv.conv.out_channels, 10)
    return model
