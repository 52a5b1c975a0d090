"""A convolution that waits, and the normalization that runs both as one.

Three behaviours are given to modules that already exist, by swapping their
class for one that puts a mixin before the stock class:

- :class:`BlockScope`, the module whose forward calls the pair: inside that
  forward, and nowhere else, the pair's convolution may wait;
- :class:`DeferringConv`: returns a :class:`DeferredConv`, a promise that
  holds the module and its input;
- :class:`FoldingNorm`: given a promise while its statistics are fixed, it
  runs the block as one convolution.

Anything else that touches a promise makes it run the plain convolution, so
that the result is the stock one whatever the control flow.
"""
import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mmtune.convs import ConvKind
from mmtune.functional import (
    convolve,
    fold,
    fold_and_convolve,
    needs_gradient,
    norm_coefficients,
)

__all__ = [
    'BlockScope', 'DeferredConv', 'DeferringConv', 'FoldingNorm', 'HeldNorm',
    'add_behaviour', 'behaviour_of', 'remove_behaviour', 'stock_type'
]

BUFFERS = ('weight_coeff', 'bias_delta')


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives convolutions here, None where off."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _version(x: Tensor | None) -> int | None:
    """Counts in-place changes, where they are counted.

    Inference tensors do not count them, and the compiler cannot ask; there
    the trace has to be believed, which found nothing between the two.
    """
    if x is None or torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version


class DeferredConv:
    """The output of a convolution that has not run yet.

    Stands in for that output wherever a tensor is expected: every function
    and method of ``torch`` sees the plain convolution's output.

    Args:
        conv (nn.Module): A :class:`DeferringConv`.
        input (Tensor): Its input, shape (batch, in_channels, ...).
    """

    def __init__(self, conv: nn.Module, input: Tensor) -> None:
        self.conv = conv
        self.input = input
        # Read now: what comes between may replace them.
        self.weight = conv.weight
        self.bias = conv.bias
        self.context = self._current_context()
        self.output: Tensor | None = None

    def _current_context(self) -> tuple:
        return (torch.is_grad_enabled(),
                _autocast_dtype(self.input.device.type),
                _version(self.input))

    def foldable(self) -> bool:
        """Whether a fold would still see what the convolution was given."""
        return (self.output is None
                and self.context == self._current_context())

    def tensor(self) -> Tensor:
        """Run the plain convolution, once.

        Returns:
            Tensor: Shape (batch, out_channels, ...).

        Raises:
            RuntimeError: If the input was changed in place since the
                convolution was called, or if the promise was handed to a
                ``torch.autograd.Function``, which would lose its gradient.
        """
        if self.output is None:
            grad_enabled, autocast_dtype, version = self.context
            if version != self._current_context()[-1]:
                raise RuntimeError(
                    f'The input of {self.conv} was changed in place between '
                    'its call and the use of its output; exclude the block '
                    'by the `modules` argument of `mmtune.turn_on`.')
            if grad_enabled and _inside_autograd_function():
                raise RuntimeError(
                    f'The output of {self.conv} went into a '
                    '`torch.autograd.Function` where its normalization was '
                    'expected; exclude the block by the `modules` argument '
                    'of `mmtune.turn_on`.')
            with contextlib.ExitStack() as stack:
                if grad_enabled != torch.is_grad_enabled():
                    stack.enter_context(torch.set_grad_enabled(grad_enabled))
                device_type = self.input.device.type
                if autocast_dtype != _autocast_dtype(device_type):
                    stack.enter_context(
                        torch.autocast(
                            device_type,
                            autocast_dtype,
                            enabled=autocast_dtype is not None))
                self.output = self.conv._tune_deferral.kind.run(
                    self.conv, self.input, self.weight, self.bias)
        return self.output

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func(*settle(args), **settle(kwargs or {}))


def _inside_autograd_function() -> bool:
    """Tell ``Function.forward`` from a mere ``no_grad``."""
    # Both turn gradients off; forward-mode gradients only the first, and
    # inference mode.
    return not (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled()
                or torch.is_inference_mode_enabled())


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _delegate_to_tensor() -> None:
    """Give :class:`DeferredConv` every attribute of a tensor.

    One by one, since ``torch.compile`` cannot see through ``__getattr__``.
    """

    def method(name):

        def call(self, *args, **kwargs):
            return getattr(self.tensor(), name)(*settle(args),
                                                **settle(kwargs))

        return call

    def attribute(name):
        return property(lambda self: getattr(self.tensor(), name),
                        lambda self, value: setattr(self.tensor(), name,
                                                    value))

    own = {name for name in vars(DeferredConv)} - {'__doc__'}
    lifecycle = {
        '__class__', '__class_getitem__', '__del__', '__delattr__', '__dir__',
        '__doc__', '__getattribute__', '__getstate__', '__init__',
        '__init_subclass__', '__new__', '__setattr__', '__sizeof__',
        '__subclasshook__'
    }
    for name in dir(Tensor):
        if name in own or name in lifecycle:
            continue
        delegate = method if callable(getattr(Tensor, name)) else attribute
        setattr(DeferredConv, name, delegate(name))
    # Defining `__eq__` takes the default `__hash__` away.
    setattr(DeferredConv, '__hash__', object.__hash__)  # noqa: B010


def settle(value: Any) -> Any:
    """Replace each promise in (nested) containers by its tensor.

    Args:
        value: Anything; tuples, lists and dicts are searched.

    Returns:
        The value itself where it holds no promise.
    """
    if isinstance(value, Tensor):
        return value
    if type(value) is DeferredConv:
        return value.tensor()
    if isinstance(value, (tuple, list)):
        settled = [settle(item) for item in value]
        if all(new is old for new, old in zip(settled, value)):
            return value
        if hasattr(value, '_fields'):
            return type(value)(*settled)
        return type(value)(settled)
    if isinstance(value, dict):
        settled_items = {key: settle(item) for key, item in value.items()}
        if all(settled_items[key] is value[key] for key in value):
            return value
        copied = value.copy()
        copied.update(settled_items)
        return copied
    return value


_delegate_to_tensor()


class Pair(NamedTuple):
    """A convolution and the normalization that follows it in one forward."""

    conv: nn.Module
    norm: nn.Module

    def may_defer(self) -> bool:
        """Whether the norm can fold, and no hook sees what goes to it."""
        conv, norm = self
        return not (norm.training or _has_any_global_hook()
                    or conv._forward_hooks or conv._backward_hooks
                    or conv._backward_pre_hooks or norm._forward_pre_hooks
                    or norm._backward_hooks)


class Deferral:
    """State of a :class:`DeferringConv`.

    Attributes:
        kind (ConvKind): How the convolution runs.
        pairs (list[Pair]): The pairs that it is in.
        armed (bool): Whether a forward that calls such a pair is running.
    """

    def __init__(self, kind: ConvKind) -> None:
        self.kind = kind
        self.pairs: list[Pair] = []
        self.armed = False

    def may_defer(self) -> bool:
        """Whether a promise would be understood where it goes."""
        # An activation checkpoint runs a part of the block's forward anew,
        # from within the backward pass.
        called_by_block = self.armed or _inside_backward()
        return called_by_block and any(p.may_defer() for p in self.pairs)


class KeptFold:
    """A fold that serves until what it was made from is changed.

    Args:
        made_from (tuple[Tensor | None]): Parameters and statistics.
        eps (float): Of the normalization.
        folded (tuple[Tensor, Tensor]): Weight and bias.
        dtype (torch.dtype): What the convolution runs in.
    """

    def __init__(self, made_from: tuple[Tensor | None, ...], eps: float,
                 folded: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        self.made_from = made_from
        self.versions = [_version(t) for t in made_from]
        self.eps = eps
        self.folded = tuple(t.to(dtype) for t in folded)

    def serves(self, made_from: tuple[Tensor | None, ...], eps: float,
               dtype: torch.dtype) -> bool:
        """Whether it still is the fold of these."""
        return (self.eps == eps and self.folded[0].dtype == dtype
                and all(new is old
                        for new, old in zip(made_from, self.made_from))
                and self.versions == [_version(t) for t in made_from])


class NormState:
    """State of a :class:`HeldNorm` or :class:`FoldingNorm`.

    Attributes:
        hold (bool, optional): The ``training`` flag that is kept whatever is
            asked for, None to obey.
        asked (bool): The ``training`` flag that was asked for last.
        ran (str, optional): How the latest forward ran: 'fused', 'stock',
            or 'train mode' (stock, with the statistics of the batch).
        keeps_fold (bool): Whether a fold that no gradient needs may serve
            again.
        kept_fold (KeptFold, optional): That fold.
    """

    def __init__(self, asked: bool, hold: bool | None = None) -> None:
        self.asked = asked
        self.hold = hold
        self.ran: str | None = None
        self.keeps_fold = False
        self.kept_fold: KeptFold | None = None


class BlockScope(nn.Module):
    """Behaviour of the module whose forward calls Conv+BN pairs."""

    _tune_pairs: tuple[Pair, ...] = ()


def _scoped(stock_forward: Callable) -> Callable:
    """The forward of a :class:`BlockScope`, with the stock signature."""

    @functools.wraps(stock_forward)
    def forward(self, *args, **kwargs):
        deferrals = [pair.conv._tune_deferral for pair in self._tune_pairs]
        before = [deferral.armed for deferral in deferrals]
        for deferral in deferrals:
            deferral.armed = True
        try:
            return settle(stock_forward(self, *args, **kwargs))
        finally:
            for deferral, armed in zip(deferrals, before):
                deferral.armed = armed

    return forward


class DeferringConv(nn.Module):
    """Behaviour of a convolution that is followed by a normalization."""

    _tune_deferral: Deferral | None = None

    def forward(self, input: Tensor) -> 'Tensor | DeferredConv':
        """Promise the output inside the block, compute it elsewhere."""
        deferral = self._tune_deferral
        if (deferral is not None and deferral.may_defer()
                and isinstance(input, Tensor)):
            return DeferredConv(self, input)
        return super().forward(input)

    def extra_repr(self) -> str:
        """Mark the convolution in ``print(model)``."""
        return _marked(super().extra_repr(), tune=self._tune_deferral)


class HeldNorm(nn.Module):
    """Behaviour of a normalization held in train or in eval mode."""

    _tune_state: NormState | None = None

    def train(self, mode: bool = True) -> 'HeldNorm':
        """Note what is asked for, and do what is held."""
        state = self._tune_state
        if state is not None:
            state.asked = mode
            if state.hold is not None:
                mode = state.hold
        return super().train(mode)

    def extra_repr(self) -> str:
        """Mark the normalization in ``print(model)``."""
        state = self._tune_state
        return _marked(
            super().extra_repr(), norm_eval=state and state.hold is False,
            norm_train=state and state.hold)


class FoldingNorm(HeldNorm):
    """Behaviour of a normalization that runs itself and a promise as one."""

    def forward(self, input: 'Tensor | DeferredConv') -> Tensor:
        """Run a promised convolution and itself as one where it can."""
        state = self._tune_state
        if type(input) is DeferredConv:
            if state is not None and _can_fold(self, input):
                return self._fold(input, state)
            input = input.tensor()
        if state is not None:
            state.ran = 'train mode' if self.training else 'stock'
        return super().forward(input)

    def _fold(self, deferred: DeferredConv, state: NormState) -> Tensor:
        conv, x = deferred.conv, deferred.input
        state.ran = 'fused'
        autocast_dtype = deferred.context[1]
        if autocast_dtype is not None and x.dtype != torch.float64:
            x = x.to(autocast_dtype)
        x, conv_args = conv._tune_deferral.kind.geometry(conv, x)
        tensors = (deferred.weight, deferred.bias, self.weight, self.bias)
        if state.keeps_fold and not needs_gradient(x, *tensors):
            kept = state.kept_fold
            made_from = (*tensors, self.running_mean, self.running_var)
            if kept is None or not kept.serves(made_from, self.eps, x.dtype):
                folded = fold(*tensors, *self._refresh(conv))
                kept = state.kept_fold = KeptFold(made_from, self.eps, folded,
                                                  x.dtype)
            return convolve(x, kept.folded, conv_args)
        return fold_and_convolve(x, *tensors, *self._refresh(conv), conv_args)

    def _refresh(self, conv: nn.Module) -> tuple[Tensor, Tensor]:
        """Bring the convolution's buffers up to date with the statistics."""
        weight_coeff, bias_delta = norm_coefficients(
            self.running_mean, self.running_var, self.eps,
            conv.weight.dim())
        conv.weight_coeff = weight_coeff.to(self.running_var.dtype)
        conv.bias_delta = bias_delta.to(self.running_mean.dtype)
        return weight_coeff, bias_delta

    def extra_repr(self) -> str:
        """Mark the normalization in ``print(model)``."""
        return _marked(super().extra_repr(), tune=self._tune_state)


def _marked(text: str, **marks: Any) -> str:
    return text + ''.join(f', {name}=True' for name, on in marks.items() if on)


def _can_fold(norm: nn.Module, deferred: DeferredConv) -> bool:
    """Whether the stock pair takes this input, as one affine map."""
    x, weight = deferred.input, deferred.weight
    if (norm.training or norm.running_mean is None
            or norm.running_var is None or not deferred.foldable()):
        return False
    # Without a batch dimension the normalization would take the channels
    # for the batch.
    if x.dim() != weight.dim() or norm.num_features != weight.size(0):
        return False
    autocast_dtype = deferred.context[1]
    if autocast_dtype is None and x.dtype != weight.dtype:
        return False
    output_dtype = autocast_dtype or x.dtype
    norm_dtype = norm.running_var.dtype
    if norm_dtype != output_dtype and not (
            norm_dtype == torch.float32 and output_dtype.itemsize == 2):
        return False
    norm._check_input_dim(x)
    return True


# --------------------------------------------------------------------------
# Giving behaviours to modules and taking them away again
# --------------------------------------------------------------------------


@functools.cache
def _type_with(behaviour: Any, stock: Any) -> Any:
    """The class ``stock`` with ``behaviour`` before it.

    It carries the name of ``stock``, since users compare names.
    """
    body = dict(
        __module__=stock.__module__,
        __qualname__=stock.__qualname__,
        __doc__=stock.__doc__,
        __reduce_ex__=_reduce,
        _tune_behaviour=behaviour,
        _tune_stock=stock)
    if behaviour is BlockScope:
        body['forward'] = _scoped(stock.forward)
    return type(stock.__name__, (behaviour, stock), body)


def _reduce(self, protocol):
    """Pickle as stock class and behaviour: the class itself has no path."""
    state = self._tune_stock.__reduce_ex__(self, max(protocol, 2))[2]
    return _restore, (self._tune_behaviour, self._tune_stock), state


def _restore(behaviour: Any, stock: Any) -> nn.Module:
    cls = _type_with(behaviour, stock)
    return cls.__new__(cls)


def stock_type(module: nn.Module) -> Any:
    """The class that a module has without any behaviour of this file."""
    return getattr(type(module), '_tune_stock', type(module))


def behaviour_of(module: nn.Module) -> type | None:
    """The behaviour that was given to a module, None for a stock one."""
    active = any(name.startswith('_tune_') for name in vars(module))
    return type(module)._tune_behaviour if active else None


def add_behaviour(module: nn.Module, behaviour: Any) -> None:
    """Swap the class of a module for one with a behaviour before it.

    Args:
        module (nn.Module): Keeps its parameters, buffers and state_dict
            keys, and stays an instance of its stock class.
        behaviour (type): One of the behaviours of this file.
    """
    module.__class__ = _type_with(behaviour, stock_type(module))


def remove_behaviour(module: nn.Module) -> None:
    """Give a module its stock class back and drop what mmtune keeps in it."""
    if '_tune_stock' in vars(type(module)):
        module.__class__ = stock_type(module)
    # Else somebody derived from our class since (as parametrizations do);
    # without its state the behaviour is idle.
    for name in [key for key in vars(module) if key.startswith('_tune_')]:
        delattr(module, name)
