"""A clamp that keeps a bit an element for backward (``nn.ReLU6``).

Its gradient is that of its output where the input lies between the bounds,
and 0 elsewhere. Autograd keeps the input for that, and clones it where the
clamp works in place; the output, which readers often keep in any case, may be
changed later. A bit an element is a 32nd of a map in float32, and is the
clamp's own.
"""
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtune import native

__all__ = ['ClampFunction', 'inside', 'select']

# Eight bytes of 0 or 1 as one integer: its product with the first number has
# their bits in its highest byte. That byte times the second is eight copies
# of it, of which the third keeps another bit each.
GATHER = 0x0102040810204080
SPREAD = 0x0101010101010101
ONE_EACH = 0x8040201008040201 - (1 << 64)

FORMATS = (torch.contiguous_format, torch.channels_last,
           torch.channels_last_3d)


class ClampFunction(torch.autograd.Function):
    """``F.hardtanh``, in place or not; with derivatives of every order."""

    @staticmethod
    def forward(ctx, x, low, high, inplace):
        """See ``torch.autograd.Function``."""
        ctx.layout = _layout(x)
        ctx.save_for_backward(inside(x, low, high, ctx.layout))
        if inplace:
            ctx.mark_dirty(x)
        return F.hardtanh(x, low, high, inplace)

    @staticmethod
    def backward(ctx, grad):
        """See ``torch.autograd.Function``."""
        bits, = ctx.saved_tensors
        return SelectFunction.apply(grad, bits, ctx.layout), None, None, None


class SelectFunction(torch.autograd.Function):
    """The backward of :class:`ClampFunction`, which is its own backward."""

    @staticmethod
    def forward(ctx, grad, bits, layout):
        """See ``torch.autograd.Function``."""
        ctx.save_for_backward(bits)
        ctx.layout = layout
        return select(grad, bits, layout)

    @staticmethod
    def backward(ctx, grad):
        """See ``torch.autograd.Function``."""
        bits, = ctx.saved_tensors
        return SelectFunction.apply(grad, bits, ctx.layout), None, None


def inside(x: Tensor, low: float, high: float,
           layout: torch.memory_format) -> Tensor:
    """Find which elements of a map a clamp lets through.

    Args:
        x (Tensor): Any shape, floating point. A NaN is outside on most CPUs,
            inside on CUDA, as in stock.
        low (float): What is at or below it is outside.
        high (float): What is at or above it is outside.
        layout (torch.memory_format): In which order the elements are taken.

    Returns:
        Tensor: Shape (ceil(numel / 8),), uint8, a bit an element.
    """
    x = x.contiguous(memory_format=layout)
    node = _node(x)
    if node is not None:
        return node.inside(x, low, high)
    # By stock's own kernel, which knows how bounds are rounded.
    flat = _flat(x)
    passes = torch.ops.aten.hardtanh_backward(
        torch.ones_like(flat), flat, low, high).to(torch.uint8)
    padded = F.pad(passes, (0, -len(passes) % 8))
    words = padded.view(torch.int64) * GATHER
    return (words >> 56).to(torch.uint8)


def select(grad: Tensor, bits: Tensor, layout: torch.memory_format) -> Tensor:
    """Let a gradient through where a bit is set.

    Args:
        grad (Tensor): Shape and dtype of the map.
        bits (Tensor): From :func:`inside`.
        layout (torch.memory_format): As there.

    Returns:
        Tensor: As ``grad``, 0 where the bit is not set.
    """
    grad = grad.contiguous(memory_format=layout)
    node = _node(grad)
    if node is not None:
        return node.select(grad, bits)
    words = (bits.to(torch.int64) * SPREAD) & ONE_EACH
    passes = words.view(torch.uint8)[:grad.numel()].to(grad.dtype)
    selected = torch.ops.aten.threshold_backward(_flat(grad), passes, 0)
    return selected.as_strided(grad.shape, grad.stride())


def _layout(x: Tensor) -> torch.memory_format:
    return next((layout for layout in FORMATS
                 if x.is_contiguous(memory_format=layout)), FORMATS[0])


def _flat(x: Tensor) -> Tensor:
    """The elements as they lie in memory."""
    return x.as_strided((x.numel(), ), (1, ))


def _node(x: Tensor) -> ModuleType | None:
    """The native node, where it has a loop for a tensor."""
    is_served = x.device.type == 'cpu' and x.dtype in (torch.float32,
                                                       torch.float64)
    return native.node() if is_served else None
