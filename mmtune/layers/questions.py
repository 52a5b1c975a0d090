"""Questions to a tensor that its numbers do not answer.

Where the forward of a block asks them of a convolution's output, before the
normalization, the convolution need not run: its geometry gives the answer.
"""
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

__all__ = [
    'ASKING_ATTRIBUTES', 'ASKING_METHODS', 'RESHAPING_METHODS', 'answer',
    'convolved_dtype', 'is_question'
]

# Attributes and methods of tensors, by name.
ASKING_ATTRIBUTES = ('shape', 'ndim', 'dtype', 'device')
ASKING_METHODS = ('size', 'dim', 'ndimension', 'numel', 'nelement',
                  'is_floating_point', '__len__')
# Methods that ask their second argument for its shape, and nothing else.
RESHAPING_METHODS = ('reshape_as', 'view_as')

_DIMENSIONS = {
    Tensor.ndim.__get__,
    Tensor.dim, Tensor.ndimension
}
_OF_THE_TENSOR = {
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.is_floating_point, torch.is_floating_point
}
_OF_THE_SHAPE = {
    Tensor.shape.__get__,
    Tensor.size, Tensor.numel, Tensor.nelement, torch.numel, Tensor.__len__
}
_RESHAPING = {Tensor.reshape_as, Tensor.view_as}
_QUESTIONS = _DIMENSIONS | _OF_THE_TENSOR | _OF_THE_SHAPE


def is_question(function: Any) -> bool:
    """Whether a function of torch only asks for what numbers do not say."""
    return function in _QUESTIONS


def convolved_dtype(tensor: Tensor,
                    autocast_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a convolution takes a tensor.

    Autocast leaves float64 and what is no floating point number as they are.

    Args:
        tensor (Tensor): Input, weight or bias of a convolution.
        autocast_dtype (torch.dtype, optional): None where autocast is off.

    Returns:
        torch.dtype: That of the output, where all three have the same.
    """
    if (autocast_dtype is None or tensor.dtype == torch.float64
            or not tensor.is_floating_point()):
        return tensor.dtype
    return autocast_dtype


def answer(promise: Any, function: Callable, args: tuple,
           kwargs: dict) -> Any:
    """Answer a question to a promised output, without its numbers.

    Args:
        promise (DeferredConv): What is asked.
        function (Callable): Of torch, as ``__torch_function__`` gets it.
        args (tuple): Its arguments.
        kwargs (dict): Its other arguments.

    Returns:
        The answer; None where the convolution has to run.
    """
    if _asked_by_checkpoint():
        # It will run a part of the forward anew, with what it is given now.
        return None
    if function in _RESHAPING:
        if len(args) != 2 or args[1] is not promise or args[0] is promise:
            return None
        stand_in = _stand_in(promise, _shape(promise))
        return None if stand_in is None else function(args[0], stand_in)
    if function not in _QUESTIONS or not args or args[0] is not promise:
        return None
    weight = promise.call.weight
    if function in _DIMENSIONS and promise.inputs[0].dim() == weight.dim():
        return weight.dim()
    shape = () if function in _OF_THE_TENSOR else _shape(promise)
    stand_in = _stand_in(promise, shape)
    return None if stand_in is None else function(stand_in, *args[1:],
                                                  **kwargs)


def _asked_by_checkpoint() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get('__name__', '')
        if not name.startswith('mmtune.'):
            return name == 'torch.utils.checkpoint'
        frame = frame.f_back
    return False


def _shape(promise: Any) -> tuple[int, ...] | None:
    call = promise.call
    return call.kind.output_shape(call.conv, call.weight, *promise.inputs)


def _stand_in(promise: Any, shape: tuple[int, ...] | None) -> Tensor | None:
    """A tensor of the output's shape, dtype and device, without memory."""
    x, call = promise.inputs[0], promise.call
    autocast_dtype = call.context[1]
    dtype = convolved_dtype(x, autocast_dtype)
    if shape is None or any(
            convolved_dtype(t, autocast_dtype) != dtype
            or t.device != x.device for t in (call.weight, call.bias)
            if t is not None):
        return None
    return torch.empty((), dtype=dtype, device=x.device).expand(shape)
