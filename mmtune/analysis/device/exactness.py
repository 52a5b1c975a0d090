"""Compare every kind of block with the stock modules, on a device.

What is right, a run of the stock modules on the CPU in float64 says, with the
same (rounded) parameters, input and gradient of the output. Tune may err at
most :data:`BOUND` times as much as the stock modules on the device do.
"""
import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmtune.analysis.device.ways import (
    PLANS,
    Forward,
    how_it_ran,
    run_plan,
)
from mmtune.api import turn_on
from mmtune.layers.convolutions import conv_kind

__all__ = ['BOUND', 'FORWARDS', 'KINDS', 'Check', 'Kind', 'Precision',
           'check_kind', 'precisions']

# The root of the mean square of Tune's error is at most this times Eval's.
BOUND = 1.5
# An error below this share of the value is none: a rounding to float32; and
# what results in float64 may differ by.
ROUNDING, ROUNDING_DOUBLE = 2.**-24, 1e-10
# Rounding a parameter is one event for all of its channel's map: hence many
# blocks, of 64 channels each.
BLOCKS = 6


@dataclass(frozen=True)
class Precision:
    """What a block computes in.

    Attributes:
        name (str): For the table.
        dtype (torch.dtype): Of parameters and input.
        autocast (torch.dtype, optional): What autocast has them cast to.
        tf32 (bool): Whether a GPU may round factors to TensorFloat-32.
    """

    name: str
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    tf32: bool = False


def precisions(device: str) -> list[Precision]:
    """List what to check on a device.

    Args:
        device (str): ``'cpu'`` or ``'cuda'``.

    Returns:
        list[Precision]: TensorFloat-32 on a GPU alone.
    """
    found = [
        Precision('float64', torch.float64),
        Precision('float32', torch.float32),
        Precision('TF32', torch.float32, tf32=True),
        Precision('float16', torch.float16),
        Precision('bfloat16', torch.bfloat16),
        Precision('autocast float16', torch.float32, torch.float16),
        Precision('autocast bfloat16', torch.float32, torch.bfloat16),
    ]
    return [p for p in found if device == 'cuda' or not p.tf32]


@dataclass(frozen=True)
class Kind:
    """A kind of block.

    Attributes:
        layer (Callable[[], nn.Module]): Makes the convolution.
        norm (Callable[..., nn.Module]): Makes the BatchNorm of so many
            channels.
        size (tuple[int, ...]): Of the input, in space.
        batch (int): How many inputs.
        frozen (tuple[str, ...]): What learns nothing: ``'x'`` or names of
            parameters.
        channels_last (bool): How input and weight lie in memory.
    """

    layer: Callable[[], nn.Module]
    norm: Callable[..., nn.Module] = nn.BatchNorm2d
    size: tuple[int, ...] = (9, 9)
    batch: int = 3
    frozen: tuple[str, ...] = ()
    channels_last: bool = False


_conv = partial(nn.Conv2d, 16, 64, 3, padding=1)
PARAMETERS = ('0.weight', '0.bias', '1.weight', '1.bias')
KINDS = {
    'Conv1d': Kind(partial(nn.Conv1d, 16, 64, 3), nn.BatchNorm1d, (60, )),
    'Conv2d': Kind(_conv),
    'Conv2d, 1 x 1, no bias': Kind(partial(nn.Conv2d, 32, 64, 1, bias=False)),
    'Conv2d, stride 2': Kind(partial(_conv, stride=2), size=(15, 16)),
    'Conv2d, dilation 2': Kind(partial(_conv, dilation=2)),
    'Conv2d, 4 groups': Kind(partial(_conv, groups=4)),
    'Conv2d, depthwise': Kind(
        partial(nn.Conv2d, 64, 64, 3, padding=1, groups=64)),
    'Conv2d, reflected padding': Kind(partial(_conv, padding_mode='reflect')),
    'Conv2d, channels_last': Kind(_conv, channels_last=True),
    'Conv2d, large map': Kind(_conv, size=(48, 64)),
    'Conv2d, affine=False': Kind(
        _conv, partial(nn.BatchNorm2d, affine=False)),
    'Conv2d, frozen input': Kind(_conv, frozen=('x', )),
    'Conv2d, frozen weight': Kind(_conv, frozen=('0.weight', '0.bias')),
    'Conv2d, frozen BatchNorm': Kind(_conv, frozen=('1.weight', '1.bias')),
    'Conv2d, only the input learns': Kind(_conv, frozen=PARAMETERS),
    'Conv3d': Kind(
        partial(nn.Conv3d, 8, 64, 2), nn.BatchNorm3d, (4, 5, 5)),
    'ConvTranspose1d': Kind(
        partial(nn.ConvTranspose1d, 16, 64, 3, 2), nn.BatchNorm1d, (30, )),
    'ConvTranspose2d': Kind(
        partial(nn.ConvTranspose2d, 16, 64, 3, 2, 1, 1), size=(5, 5)),
    'ConvTranspose2d, 4 groups': Kind(
        partial(nn.ConvTranspose2d, 16, 64, 3, 2, 1, groups=4), size=(5, 5)),
    'ConvTranspose3d': Kind(
        partial(nn.ConvTranspose3d, 8, 64, 2, 2), nn.BatchNorm3d, (2, 3, 3)),
    'Linear': Kind(partial(nn.Linear, 48, 64), nn.BatchNorm1d, (), 64),
}


@dataclass(frozen=True)
class Case:
    """A block with its input and the gradient of its output."""

    block: nn.Sequential
    x: Tensor
    grad: Tensor

    def to(self, *args: Any, **kwargs: Any) -> 'Case':
        """Do what ``Tensor.to`` does to a copy of all."""
        return Case(
            copy.deepcopy(self.block).to(*args, **kwargs),
            self.x.to(*args, **kwargs), self.grad.to(*args, **kwargs))


@torch.no_grad()
def make_case(kind: Kind, seed: int) -> Case:
    """Make a block whose statistics are about those of its input.

    Args:
        kind (Kind): Of what.
        seed (int): Of all that is random.

    Returns:
        Case: In float64, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = kind.layer()
        block = nn.Sequential(layer, kind.norm(64, momentum=1.)).double()
        features = (layer.in_features if isinstance(layer, nn.Linear) else
                    layer.in_channels)
        x = torch.randn(kind.batch, features, *kind.size, dtype=torch.float64)
        grad = torch.randn_like(block(x))
        # Else sums of ones would all round alike.
        grad *= 2**torch.rand(())
        norm = block[1].eval()
        deviation = norm.running_var.sqrt()
        # A folded bias of deviations is a limit, see docs/en/method.md: some
        # kernels start from it, and round at its size.
        norm.running_mean += deviation * torch.randn(64) / 2
        norm.running_var *= torch.randn(64).div(2).exp()
        if norm.affine:
            norm.weight.copy_(
                torch.randn(64).sign() * torch.randn(64).div(2).exp())
            norm.bias.copy_(norm.weight * torch.randn(64) / 2)
    if kind.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        block.to(memory_format=torch.channels_last)
    return Case(block, x, grad)


def differentiate(forward: Forward,
                  case: Case,
                  frozen: tuple[str, ...] = (),
                  autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Run a block forward and back.

    Args:
        forward (Forward): Gives the output of a block and an input.
        case (Case): Is not changed but for what needs a gradient.
        frozen (tuple[str, ...]): What needs none.
        autocast (torch.dtype, optional): Of the forward.

    Returns:
        dict[str, Tensor]: The output, and the gradient of all that learns.
    """
    leaves = {'x': case.x.detach(), **dict(case.block.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    with torch.autocast(case.x.device.type, autocast,
                        enabled=autocast is not None):
        output = forward(case.block, leaves['x'])
    learned = {name: leaf for name, leaf in leaves.items()
               if leaf.requires_grad}
    grads = torch.autograd.grad(output, list(learned.values()),
                                case.grad.to(output.dtype))
    return {'output': output.detach(), **dict(zip(learned, grads))}


def _stock(block: nn.Sequential, x: Tensor) -> Tensor:
    return block(x)


def _turned_on(block: nn.Sequential, x: Tensor) -> Tensor:
    turn_on(block)
    output = block(x)
    ran, = how_it_ran(block)
    # What is small runs as stock where there is no native node.
    if ran not in ('fused', 'small'):
        raise RuntimeError(f'the block ran as {ran}')
    return output


# The last as users have it: through the modules, by the plan that it chooses.
FORWARDS: Mapping[str, Forward] = {
    **{name: partial(run_plan, plan) for name, plan in PLANS.items()},
    'turned on': _turned_on,
}


@dataclass
class Check:
    """How exact a kind of block is in a precision, run in one way.

    Attributes:
        kind (str): Key of :data:`KINDS`.
        precision (str): Name of a :class:`Precision`.
        way (str): Key of :data:`FORWARDS`.
        ratios (dict[str, float]): Tune's error in units of Eval's, in
            float64 in units of 1e-10 of the value; of the output and of each
            gradient.
        raised (str): What it raised, else empty.
    """

    kind: str
    precision: str
    way: str
    ratios: dict[str, float]
    raised: str = ''

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor that is least exact, and its ratio."""
        if self.raised:
            return self.raised, math.nan
        # Not the `max` of the ratios, for which NaN is small.
        return max(self.ratios.items(),
                   key=lambda item: (math.isnan(item[1]), item[1]))

    @property
    def passed(self) -> bool:
        """Whether no error is larger than it may be."""
        return self.worst[1] <= BOUND

    def plain(self) -> dict[str, Any]:
        """Give what JSON can hold."""
        finite = {name: ratio if math.isfinite(ratio) else None
                  for name, ratio in self.ratios.items()}
        return dict(asdict(self), ratios=finite, passed=self.passed)


def check_kind(name: str,
               precision: Precision,
               device: str,
               ways: list[str],
               blocks: int = BLOCKS) -> list[Check]:
    """Check a kind of block in a precision.

    Args:
        name (str): Key of :data:`KINDS`.
        precision (Precision): What to compute in.
        device (str): Where.
        ways (list[str]): Keys of :data:`FORWARDS`.
        blocks (int): How many random blocks to see.

    Returns:
        list[Check]: One for each way; none where the stock modules cannot
        be run so on the device.
    """
    kind = KINDS[name]
    squares: dict[str, dict[str, list[list[float]]]] = {w: {} for w in ways}
    raised: dict[str, str] = {}
    with _tf32(precision.tf32):
        for seed in range(blocks):
            # Rounded once and for all: this is not the error in question.
            case = make_case(kind, seed).to(precision.dtype)
            rounded = precision.autocast or precision.dtype
            case = Case(case.block, case.x.to(rounded).to(precision.dtype),
                        case.grad.to(rounded))
            exact = differentiate(_stock, case.to(torch.float64))
            case = case.to(device)
            try:
                found = differentiate(_stock, case, (), precision.autocast)
            except RuntimeError:
                return []
            implied = dict(found)
            if '1.weight' in found:
                implied['1.weight'] = _implied_gamma(case.block, found)
            for way in ways:
                try:
                    tuned = _run_way(way, case, kind, precision)
                except RuntimeError as error:
                    raised[way] = str(error).strip().partition('\n')[0]
                    continue
                for key in tuned:
                    squares[way].setdefault(key, []).append(
                        [*(_square(step[key], exact[key])
                           for step in (tuned, found, implied)),
                         exact[key].square().sum().item()])
    double = precision.dtype == torch.float64
    return [Check(name, precision.name, way,
                  {key: _ratio(rows, double)
                   for key, rows in squares[way].items()},
                  raised.get(way, '')) for way in ways]


def _run_way(way: str, case: Case, kind: Kind,
             precision: Precision) -> dict[str, Tensor]:
    # A copy, since it may be turned on.
    case = case.to(case.x.device)
    return differentiate(FORWARDS[way], case, kind.frozen, precision.autocast)


def _ratio(rows: list[list[float]], double: bool) -> float:
    error, of_eval, implied, value = map(math.fsum, zip(*rows))
    if double:
        reference = value * ROUNDING_DOUBLE**2
    else:
        reference = max(of_eval, implied, value * ROUNDING**2)
    return math.sqrt(error / reference) if error else 0.


def _square(found: Tensor, exact: Tensor) -> float:
    return (found.cpu().double() - exact).square().sum().item()


def _implied_gamma(block: nn.Sequential,
                   grads: dict[str, Tensor]) -> Tensor:
    """What Eval's other gradients say of that of gamma.

    ``sum(dZ * Y) = <w, dw> / coeff`` is how Tune does without Y. It can be no
    more exact than the kernel that makes ``dw``, while Eval may add up
    ``dZ * (Y - mean)`` in a higher precision.
    """
    conv, norm = (copy.deepcopy(part).double() for part in block)
    kind = conv_kind(type(conv))
    assert kind is not None
    shape = kind.coeff_shape(conv, conv.weight.shape)
    product = conv.weight.detach() * grads['0.weight'].double()
    if len(shape) > product.dim():
        product = product.unflatten(0, (shape[0], -1))
    dot = product.sum_to_size(shape).view(-1)
    rstd = (norm.running_var + norm.eps).rsqrt()
    shift = -norm.running_mean
    if conv.bias is not None:
        shift = shift + conv.bias
    return (dot / (rstd * norm.weight) +
            shift * grads['1.bias'].double()).mul(rstd).detach()


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Let a GPU round the factors of products to TensorFloat-32, or not."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value
