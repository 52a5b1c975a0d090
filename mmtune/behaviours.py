"""What modules do differently: a block, its convolution, its normalization.

Three behaviours are given to modules that already exist, by swapping their
class for one that puts a mixin before the stock class:

- :class:`BlockScope`, the module whose forward calls the pair: inside that
  forward, and nowhere else, the pair's convolution may wait;
- :class:`DeferringConv`: returns a :class:`~mmtune.deferred.DeferredConv`, a
  promise that holds the module and its input;
- :class:`FoldingNorm`: given a promise while its statistics are fixed, it
  runs the block as one convolution.

Anything else that touches a promise makes it run the plain convolution, so
that the result is the stock one whatever the control flow.
"""
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from mmtune.convs import ConvKind
from mmtune.deferred import (
    DeferredConv,
    fingerprint,
    inside_autograd_function,
    settle,
)
from mmtune.functional import (
    convolve,
    fold,
    fold_and_convolve,
    needs_gradient,
    norm_coefficients,
)

__all__ = [
    'BUFFERS', 'BlockScope', 'Deferral', 'DeferringConv', 'FoldingNorm',
    'HeldNorm', 'NormState', 'Pair', 'add_behaviour', 'behaviour_of',
    'remove_behaviour', 'stock_type', 'type_with'
]

BUFFERS = ('weight_coeff', 'bias_delta')


def _inside_backward() -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def _inside_transform() -> bool:
    """Whether something follows tensors that must meet stock modules."""
    if torch.compiler.is_compiling():
        return False
    return (torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or torch._C._get_tracing_state() is not None)


class Pair(NamedTuple):
    """A convolution and the normalization that follows it in one forward.

    Attributes:
        conv (nn.Module): The convolution.
        norm (nn.Module): The normalization.
        norm_path (tuple[str]): Where the block has the normalization.
    """

    conv: nn.Module
    norm: nn.Module
    norm_path: tuple[str, ...]

    def may_defer(self, block: nn.Module) -> bool:
        """Whether the norm can fold, and no hook sees what goes to it."""
        conv, norm = self.conv, self.norm
        module: Any = block
        for name in self.norm_path:
            module = None if module is None else module._modules.get(name)
        # Else the norm was replaced, or one of the two turned off.
        return (module is norm and '_tune_deferral' in vars(conv)
                and '_tune_state' in vars(norm) and not norm.training
                and not (_has_any_global_hook() or conv._forward_hooks
                         or conv._backward_hooks or conv._backward_pre_hooks
                         or norm._forward_pre_hooks or norm._backward_hooks))


class BlockRun:
    """One run of a block's forward, and the promises made in it."""

    def __init__(self) -> None:
        self.inside_function = inside_autograd_function()
        self.promises: list[weakref.ref] = []

    def promise(self, conv: nn.Module, input: Tensor) -> DeferredConv:
        """Promise the output of a convolution called in this run."""
        deferred = DeferredConv(conv, input)
        if not torch.compiler.is_compiling():
            self.promises.append(weakref.ref(deferred))
        return deferred

    def finish(self, output: Any) -> Any:
        """Let no promise outlive the block, wherever it was put."""
        output = settle(output)
        for reference in self.promises:
            deferred = reference()
            if deferred is not None:
                deferred.tensor()
        return output


class Deferral:
    """State of a :class:`DeferringConv`.

    Attributes:
        name (str): Of the convolution, for errors.
        kind (ConvKind): How the convolution runs.
        runs (dict[int, BlockRun]): By thread, the run of a block that calls
            the convolution and its normalization.
        deferred (bool): Whether the latest call in a forward deferred, or
            could have.
        stays_inside (bool): Whether an autograd function that called the
            convolution was seen to call the normalization as well.
    """

    def __init__(self, name: str, kind: ConvKind) -> None:
        self.name = name
        self.kind = kind
        self.runs: dict[int, BlockRun] = {}
        self.deferred = False
        self.stays_inside = False

    def run_of_call(self) -> BlockRun | None:
        """The run that a call of now may make a promise in, if any."""
        run = self.runs.get(_thread())
        if run is None and _inside_backward():
            # An activation checkpoint runs a part of the block's forward
            # anew, and has to meet there what it met the first time.
            return BlockRun() if self.deferred else None
        # A promise made inside an autograd function (a checkpoint is one)
        # could leave it, without its gradient.
        self.deferred = (
            run is not None and not _inside_transform()
            and (self.stays_inside
                 or run.inside_function == inside_autograd_function()))
        return run if self.deferred else None


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


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
        self.fingerprints = [fingerprint(t) for t in made_from]
        self.eps = eps
        self.folded = (folded[0].to(dtype), folded[1].to(dtype))

    def serves(self, made_from: tuple[Tensor | None, ...], eps: float,
               dtype: torch.dtype) -> bool:
        """Whether it still is the fold of these."""
        return (self.eps == eps and self.folded[0].dtype == dtype
                and all(new is old
                        for new, old in zip(made_from, self.made_from))
                # Tensors that count no versions could have changed unseen.
                and all(t is None or before[0] is not None
                        for t, before in zip(made_from, self.fingerprints))
                and self.fingerprints == [fingerprint(t) for t in made_from])


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
        run, thread = BlockRun(), _thread()
        runs = [
            pair.conv._tune_deferral.runs for pair in self._tune_pairs
            if pair.may_defer(self)
        ]
        before = [of_conv.get(thread) for of_conv in runs]
        for of_conv in runs:
            of_conv[thread] = run
        try:
            output = stock_forward(self, *args, **kwargs)
        finally:
            for of_conv, outer in zip(runs, before):
                if outer is None:
                    of_conv.pop(thread, None)
                else:
                    of_conv[thread] = outer
        return run.finish(output)

    return forward


class DeferringConv(nn.Module):
    """Behaviour of a convolution that is followed by a normalization."""

    _tune_deferral: Deferral | None = None

    def forward(self, input: Tensor) -> 'Tensor | DeferredConv':
        """Promise the output inside the block, compute it elsewhere."""
        input = settle(input)
        if self._tune_deferral is not None:
            run = self._tune_deferral.run_of_call()
            if run is not None and isinstance(input, Tensor):
                return run.promise(self, input)
        output = super().forward(input)
        if self._tune_deferral is not None and inside_autograd_function():
            output._tune_deferral = self._tune_deferral
        return output

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
            state.kept_fold = None
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

    def forward(self, input: Any) -> Tensor:
        """Run a promised convolution and itself as one where it can."""
        state = self._tune_state
        if type(input) is DeferredConv:
            if state is not None and _can_fold(self, input):
                return self._fold(input, state)
            input = input.tensor()
        elif inside_autograd_function() and not input.requires_grad:
            # With a gradient it would come from outside of the function.
            deferral = getattr(input, '_tune_deferral', None)
            if deferral is not None:
                deferral.stays_inside = deferral.deferred = True
        if state is not None:
            state.ran = 'train mode' if self.training else 'stock'
            # Statistics change without a change of version.
            state.kept_fold = None
        return super().forward(input)

    def _fold(self, deferred: DeferredConv, state: NormState) -> Tensor:
        conv, x = deferred.conv, deferred.input
        state.ran = 'fused'
        autocast_dtype = deferred.context[1]
        if autocast_dtype is not None and x.dtype != torch.float64:
            x = x.to(autocast_dtype)
        x, conv_args = deferred.kind.geometry(conv, x)
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
        # In place: in inference mode a new buffer would stay unusable.
        with torch.no_grad():
            conv.weight_coeff.copy_(weight_coeff)
            conv.bias_delta.copy_(bias_delta)
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
    return vars(type(module)).get('_tune_stock', type(module))


def behaviour_of(module: nn.Module) -> type | None:
    """The behaviour that was given to a module, None for a stock one."""
    active = any(name.startswith('_tune_') for name in vars(module))
    return getattr(type(module), '_tune_behaviour', None) if active else None


def type_with(module: nn.Module, behaviour: Any) -> Any:
    """The class that :func:`add_behaviour` gives to a module.

    Args:
        module (nn.Module): Not changed.
        behaviour (type): One of the behaviours of this file.

    Returns:
        type: A class that derives from the module's stock class.
    """
    stock = stock_type(module)
    # Somebody may have derived from our class since, as parametrizations do.
    if issubclass(stock, behaviour):
        return stock
    return _type_with(behaviour, stock)


def add_behaviour(module: nn.Module, behaviour: Any, **state: Any) -> None:
    """Swap the class of a module for one with a behaviour before it.

    Args:
        module (nn.Module): Keeps its parameters, buffers and state_dict
            keys, and stays an instance of its stock class.
        behaviour (type): One of the behaviours of this file.
        **state: Attributes of the behaviour.
    """
    module.__class__ = type_with(module, behaviour)
    # Not through `__setattr__`, which a module may restrict.
    vars(module).update(state)


def remove_behaviour(module: nn.Module) -> None:
    """Give a module its stock class back and drop what mmtune keeps in it."""
    # Where somebody derived from our class since, it stays: without its
    # state the behaviour is idle.
    module.__class__ = stock_type(module)
    for name in [key for key in vars(module) if key.startswith('_tune_')]:
        del vars(module)[name]
