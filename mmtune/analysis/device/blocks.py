"""Measure what a Conv+BN block costs on a device, in each way to run it."""
import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from mmtune.analysis.device.ways import (
    PLANS,
    WAYS,
    how_it_ran,
    put_in_way,
    run_plan,
    way_context,
)
from mmtune.analysis.memory import saved_bytes
from mmtune.analysis.modes import randomize_new_norms
from mmtune.analysis.timing import interleaved_seconds, quartiles

__all__ = ['BLOCK_WAYS', 'Shape', 'count_operators', 'measure_blocks',
           'shapes']

BATCH = 2
# In a row, of which each figure is the share of one.
BLOCKS = 8
# Those of a model, and the native plans called past the modules.
BLOCK_WAYS = (*WAYS[:-1], *list(PLANS)[1:], WAYS[-1])


@dataclass(frozen=True)
class Shape:
    """A block of as many channels out as in.

    Attributes:
        channels (int): How many.
        kernel (int): Height and width.
        height (int): Of the map.
        width (int): Of the map.
    """

    channels: int
    kernel: int
    height: int
    width: int


def shapes(image: tuple[int, int]) -> list[Shape]:
    """List what to measure.

    Args:
        image (tuple[int, int]): Height and width in pixels.

    Returns:
        list[Shape]: Small ones, where what is computed is least; and those
        of a ResNet-50 on such an image.
    """
    small = [Shape(8, 1, 4, 4), Shape(64, 1, 16, 16), Shape(64, 3, 16, 16),
             Shape(512, 1, 8, 8)]
    stages = [(64, 4), (128, 8), (256, 16), (512, 32)]
    return small + [
        Shape(channels, kernel, *(math.ceil(side / stride) for side in image))
        for planes, stride in stages
        for channels, kernel in ((4 * planes, 1), (planes, 3))
    ]


class _Chain:
    """Blocks in a row, and a step through them."""

    def __init__(self, shape: Shape, way: str, device: str,
                 amp: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential()
        for _ in range(BLOCKS):
            self.model.append(
                nn.Conv2d(shape.channels, shape.channels, shape.kernel,
                          padding=shape.kernel // 2, bias=False))
            self.model.append(nn.BatchNorm2d(shape.channels))
        randomize_new_norms(self.model)
        self.model.to(device).eval()
        self._plan = PLANS.get(way)
        if self._plan is None:
            put_in_way(self.model, way)
        self._way = way
        self._dtype = torch.float16 if device == 'cuda' else torch.bfloat16
        self._amp = amp
        self.x = torch.randn(BATCH, shape.channels, shape.height, shape.width,
                             device=device, requires_grad=True)
        self.grad = torch.randn_like(self.x)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        with way_context(self._way), torch.autocast(
                self.x.device.type, self._dtype, enabled=self._amp):
            yield

    def forward(self) -> Tensor:
        if self._plan is None:
            return self.model(self.x)
        x = self.x
        for conv, norm in zip(self.model[::2], self.model[1::2]):
            x = run_plan(self._plan, nn.Sequential(conv, norm), x)
        return x

    def step(self) -> None:
        with self.context():
            output = self.forward()
        leaves = [self.x, *self.model.parameters()]
        # Deploy leaves parameters behind that nothing depends on.
        torch.autograd.grad(output, [leaf for leaf in leaves
                                     if leaf.requires_grad],
                            self.grad.to(output.dtype), allow_unused=True)

    def kept(self) -> float:
        """Bytes for a block, the input of the first among them."""
        with self.context(), saved_bytes(self.model) as saved:
            output = self.forward()
            total = saved.total
        del output  # which held all of it
        return total / BLOCKS


def measure_blocks(shape: Shape, ways: list[str], device: str, amp: bool,
                   rounds: int) -> dict[str, dict[str, Any]]:
    """Measure a block in ways that are compared with Eval.

    Args:
        shape (Shape): Of the block; the batch is 2.
        ways (list[str]): Of :data:`BLOCK_WAYS`; Eval among them.
        device (str): Where.
        amp (bool): Whether to run under autocast, in float16 on a GPU and
            in bfloat16 on a CPU.
        rounds (int): How often to time each way.

    Returns:
        dict[str, dict[str, Any]]: By way: ``seconds`` of a forward and
        backward, ``ratio`` to Eval's with its ``ratio_quartiles``, bytes
        ``kept`` for backward, how blocks ``ran`` in Tune mode.
    """
    chains = {way: _Chain(shape, way, device, amp) for way in ways}
    kept = {way: chain.kept() for way, chain in chains.items()}
    times = list(interleaved_seconds(
        {way: chain.step for way, chain in chains.items()}, rounds,
        at_least=.01))
    found = {}
    for way, chain in chains.items():
        low, ratio, high = quartiles(t[way] / t['Eval'] for t in times)
        found[way] = dict(
            seconds=quartiles(t[way] for t in times)[1] / BLOCKS,
            ratio=ratio,
            ratio_quartiles=[low, high],
            kept=kept[way],
            ran=how_it_ran(chain.model))
    return found


def count_operators(way: str, device: str) -> dict[str, int | None]:
    """Count what a block asks of a device where no kernel of its own serves.

    Args:
        way (str): One of :data:`BLOCK_WAYS`.
        device (str): Where.

    Returns:
        dict[str, int | None]: Operators of the ``forward`` and of the
        ``backward``, views aside; on a GPU, ``kernels`` of both, copies
        counted, else None.
    """
    chain = _Chain(Shape(16, 3, 64, 64), way, device, False)
    chain.step()
    with chain.context(), _Operators() as forward:
        output = chain.forward()
    leaves = [chain.x, *chain.model.parameters()]
    with _Operators() as backward:
        torch.autograd.grad(output, leaves, chain.grad, allow_unused=True)
    kernels = _count_kernels(chain.step) if device == 'cuda' else None
    return dict(forward=forward.count // BLOCKS,
                backward=backward.count // BLOCKS,
                kernels=kernels and kernels // BLOCKS)


class _Operators(TorchDispatchMode):
    """Counts operators that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self,
                           func: torch._ops.OpOverload,
                           types: Any,
                           args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        self.count += not _is_view(func)
        return func(*args, **(kwargs or {}))


@functools.cache
def _is_view(func: torch._ops.OpOverload) -> bool:
    """Whether what it gives lies where an argument does, unchanged."""
    if func.overloadpacket is torch.ops.aten.detach:
        return True
    returned = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write
               for alias in returned)


def _count_kernels(call: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA
               for event in profiler.events())
