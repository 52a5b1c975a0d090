"""MMCV's Swish, with one map kept."""
import torch
from torch import Tensor

__all__ = ['SwishFunction', 'swish']


def swish(x: Tensor) -> Tensor:
    """Compute ``x * sigmoid(x)``, without a gradient, in one new tensor.

    Args:
        x (Tensor): Any shape.

    Returns:
        Tensor: Stock's bits, for half of the memory that its two tensors
        take.
    """
    return torch.sigmoid(x).mul_(x)


class SwishFunction(torch.autograd.Function):
    """``x * sigmoid(x)`` that keeps ``x`` alone, with the bits of stock."""

    @staticmethod
    def forward(ctx, x):
        """See ``torch.autograd.Function``."""
        ctx.save_for_backward(x)
        return swish(x)

    @staticmethod
    def backward(ctx, grad):
        """See ``torch.autograd.Function``."""
        x, = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return torch.ops.aten.silu_backward(grad, x)
        sigmoid = torch.sigmoid(x)
        return grad * sigmoid * (1 + x * (1 - sigmoid))
