"""See to which function of torch a layer's forward gives its tensors.

A subclass of BatchNorm that does more than normalize ends up in
``F.batch_norm`` all the same, one of a convolution that pads by itself in
``F.conv2d``. A stand-in for a tensor, which a forward cannot tell from one,
shows which, and with what beside it. What it is asked for its shape it
answers; whoever reads its numbers ends the trial.
"""
import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mmtune.layers.questions import is_question
from mmtune.utils.attach import bare_copy

__all__ = [
    'calls_batch_norm', 'convolution_of', 'convolves', 'forget_trials',
    'is_own_batch_norm', 'stand_in'
]

# Of what the forward of a normalization may take.
DIMENSIONS = (4, 3, 2, 5)
CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def stand_in(module: nn.Module) -> nn.Module:
    """Copy a module down to the containers, not the tensors.

    Args:
        module (nn.Module): Is not changed by what a forward of the copy
            assigns and appends, on it and on its children.

    Returns:
        nn.Module: Of the same class.
    """
    copies: dict[nn.Module, nn.Module] = {}
    for part in module.modules():
        copied = copies[part] = bare_copy(part)
        for name, value in vars(part).items():
            if isinstance(value, (dict, list, set)):
                vars(copied)[name] = copy.copy(value)
    for copied in copies.values():
        for name, child in copied._modules.items():
            if child is not None:
                copied._modules[name] = copies[child]
    return copies[module]


class _Read(Exception):
    """Somebody reads what stands in for a tensor."""


class _Watched(Tensor):
    """Stands in for a tensor; raises where it is read.

    Made by :func:`_watch`.

    Attributes:
        pattern (Tensor, optional): Whose shape, dtype and device it has.
        takes (Callable): Is given each call with it, and gives its result.
    """

    pattern: Tensor | None
    takes: Callable

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        watched = next((a for a in args if type(a) is cls), None)
        if watched is None:
            raise _Read
        if is_question(func) and watched.pattern is not None:
            return func(watched.pattern, *args[1:], **(kwargs or {}))
        return watched.takes(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise _Read


def _watch(real: Tensor | None, takes: Callable) -> Any:
    like = torch.empty(()) if real is None else real
    # The size is nobody's to see.
    watched: Any = Tensor._make_wrapper_subclass(
        _Watched, (), dtype=like.dtype, device=like.device)
    watched.pattern, watched.takes = real, takes
    return watched


# By module, the forward that was tried and what it showed.
_TRIED: weakref.WeakKeyDictionary[nn.Module, tuple] = (
    weakref.WeakKeyDictionary())


def forget_trials() -> None:
    """Have every forward run anew: code can change in ways unseen."""
    _TRIED.clear()


def _once(trial: Callable[[Any], bool]) -> Callable[[Any], bool]:

    @functools.wraps(trial)
    def tried(module: nn.Module) -> bool:
        forward = type(module).forward
        known = _TRIED.get(module)
        if known is None or known[0] is not forward:
            known = _TRIED[module] = forward, trial(module)
        return known[1]

    return tried


@_once
def calls_batch_norm(norm: nn.Module) -> bool:
    """Whether a normalization gives its input to ``F.batch_norm``, unread.

    And with it the running statistics, parameters and ``eps`` that it has. It
    runs on a copy, in eval mode, up to that call.

    Args:
        norm (nn.Module): A normalization that keeps statistics.

    Returns:
        bool: False where the forward does anything else with its input
        before, or fails.
    """
    mean = norm._buffers.get('running_mean')
    if mean is None or is_lazy(mean):
        return False
    return any(
        _arrives(norm, mean.new_zeros(()).expand(
            2, mean.numel(), *[1] * (dimensions - 2)))
        for dimensions in DIMENSIONS)


def _arrives(norm: nn.Module, x: Tensor) -> bool:
    trial: Any = stand_in(norm)
    for part in trial.modules():
        vars(part)['training'] = False
    calls = []

    def takes(function: Callable, args: tuple, kwargs: dict) -> Any:
        calls.append((function, args, kwargs))
        raise _Read

    watched = _watch(x, takes)
    try:
        type(trial).forward(trial, watched)
    except Exception:  # the above, or that of another number of dimensions
        pass
    if len(calls) != 1:
        return False
    (function, args, kwargs), = calls
    return (function is F.batch_norm and args[:1] == (watched, )
            and is_own_batch_norm(trial, *args[1:], **kwargs))


def is_own_batch_norm(norm: Any,
                      running_mean: Tensor | None,
                      running_var: Tensor | None,
                      weight: Tensor | None = None,
                      bias: Tensor | None = None,
                      training: bool = False,
                      momentum: float = 0.1,
                      eps: float = 1e-5) -> bool:
    """Whether a call of ``F.batch_norm`` is with what a module has.

    Args:
        norm (nn.Module): The module.
        running_mean (Tensor, optional): See ``F.batch_norm``.
        running_var (Tensor, optional): See ``F.batch_norm``.
        weight (Tensor, optional): See ``F.batch_norm``.
        bias (Tensor, optional): See ``F.batch_norm``.
        training (bool): See ``F.batch_norm``.
        momentum (float): Any, since no statistic changes.
        eps (float): See ``F.batch_norm``.

    Returns:
        bool: False for statistics of the batch, too.
    """
    return (not training and running_mean is not None
            and running_mean is norm.running_mean
            and running_var is norm.running_var
            and weight is getattr(norm, 'weight', None)
            and bias is getattr(norm, 'bias', None)
            and eps == getattr(norm, 'eps', None))


@_once
def convolves(conv: nn.Module) -> bool:
    """Whether the forward of a convolution ends in one, with its weight.

    Args:
        conv (nn.Module): Of a subclass of ``nn.Conv1d``, ``2d`` or ``3d``.

    Returns:
        bool: False where it does anything else with its weight, its bias or
        its output, or fails.
    """
    weight = conv._parameters.get('weight')
    if weight is None or is_lazy(weight):
        return False
    # With more than one position for the kernel.
    sizes = [kernel * dilation + stride for kernel, dilation, stride in zip(
        weight.shape[2:], conv.dilation, conv.stride)]
    x = weight.new_zeros((1, conv.in_channels, *sizes), requires_grad=False)
    with torch.no_grad():
        return convolution_of(conv, x) is not None


def convolution_of(conv: nn.Module, x: Tensor) -> dict[str, Any] | None:
    """Find what a convolution of unknown code convolves, and how.

    Its forward runs on a copy with stand-ins for its weight and its bias.

    Args:
        conv (nn.Module): A module with both.
        x (Tensor): What it is called with.

    Returns:
        dict[str, Any] | None: The arguments of ``F.conv2d`` (``1d``, ``3d``);
        None where the forward does anything else with its weight, its bias
        or its output, or fails.
    """
    weight = conv._parameters.get('weight')
    if weight is None:
        return None
    calls = []

    def takes(function: Callable, args: tuple, kwargs: dict) -> Any:
        calls.append((function, args, kwargs))
        if len(calls) > 1 or function not in CONVOLUTIONS:
            raise _Read
        return output

    output = _watch(None, takes)
    watched = _watch(weight, takes), _watch(weight.new_zeros(()).expand(
        weight.size(0)), takes)
    trial = bare_copy(conv)
    vars(trial).update(_parameters={}, weight=watched[0], bias=watched[1])
    before = dict(vars(trial))
    try:
        result = type(trial).forward(trial, x)
    except Exception:  # the above, or one that it raises for real later
        return None
    changed = vars(trial).keys() != before.keys() or any(
        vars(trial)[name] is not value for name, value in before.items())
    if result is not output or changed:
        return None
    (_, args, kwargs), = calls
    call = _arguments(*args, **kwargs)
    return call if (call['weight'] is watched[0]
                    and call['bias'] is watched[1]) else None


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None,
               stride: Any = 1, padding: Any = 0, dilation: Any = 1,
               groups: int = 1) -> dict[str, Any]:
    """Name the arguments as ``F.conv2d`` does."""
    return dict(locals())
