"""What a normalization does differently: it folds what waits for it.

Given a promise while its statistics are fixed, it runs the convolution and
itself as one convolution.
"""
import functools
from typing import Any

import torch
from torch import Tensor, nn

from mmtune.behaviours.blocks import COMPILING, thread
from mmtune.behaviours.convolution import (
    inside_transform,
    why_not_defer,
)
from mmtune.behaviours.deferred import (
    DeferredConv,
    inside_autograd_function,
    is_deferred,
    settle,
)
from mmtune.behaviours.folding import (
    FoldablePair,
    HalfRange,
    foldable_pair,
    inside_backward,
)
from mmtune.behaviours.forward import (
    PASSED,
    Forward,
    LayerState,
    positional,
)
from mmtune.behaviours.known import know
from mmtune.layers.calls import is_own_batch_norm
from mmtune.layers.kinds import NormKind
from mmtune.utils.attach import Hook, TunedRepr, attach, heal

__all__ = ['NormState', 'attach_norm']


class NormState(LayerState):
    """State of a normalization that folds.

    Attributes:
        ran (str, optional): How the latest forward ran: 'fused', 'stock',
            or 'train mode' (stock, with the statistics of the batch).
        why_stock (str, optional): Why the convolution did not wait.
        half_range (HalfRange): Whether float16 holds what it folds.
    """

    kind: NormKind

    def __init__(self, name: str, norm: nn.Module, kind: NormKind) -> None:
        super().__init__(name, norm, kind)
        self.ran: str | None = None
        self.why_stock: str | None = None
        self.half_range = HalfRange()

    def latest_run(self) -> str:
        """How the latest forward ran, see :func:`mmtune.api.latest_runs`."""
        if self.ran == 'stock' and self.why_stock == 'small':
            return 'small'
        return self.ran or 'not run'

    def fold(self, norm: nn.Module, deferred: Any) -> Tensor | None:
        """Run a promised convolution and the normalization as one.

        Args:
            norm (nn.Module): The normalization.
            deferred (DeferredConv): What it was given.

        Returns:
            Tensor | None: Shape (batch, out_channels, ...); None where the
            stock modules have to run.
        """
        if not self.is_stock(norm):
            return None
        pair = foldable_pair(norm, self.kind, self.half_range, deferred)
        if pair is None:
            return None
        _note_fold(pair)
        if not torch.compiler.is_compiling():
            _remember(pair, deferred)
        return pair.run(deferred.inputs)

    def fold_again(self, norm: nn.Module, deferred: Any) -> Tensor | None:
        """Fold what was folded before, where nothing has changed.

        Args:
            norm (nn.Module): The normalization.
            deferred (DeferredConv): What it was given.

        Returns:
            Tensor | None: None where all has to be checked.
        """
        known = deferred.known
        if (known is None or known.pair.norm is not norm
                or deferred.output is not None
                or not known.holds(deferred.inputs[0]) or deferred.changed()):
            return None
        _note_fold(known.pair)
        return known.run(*deferred.inputs)

    def receive(self, norm: nn.Module, promise: Any, *args: Any,
                **kwargs: Any) -> Tensor | None:
        """Fold where the forward of a normalization calls ``F.batch_norm``.

        Args:
            norm (nn.Module): The normalization.
            promise (DeferredConv): What its forward was given, and the call.
            *args: Other arguments of the call.
            **kwargs: Other arguments of the call.

        Returns:
            Tensor | None: See :meth:`fold`.
        """
        if not is_own_batch_norm(norm, *args, **kwargs):
            return None
        output = self.fold(norm, promise)
        if output is not None:
            _note_fused(self, promise, output)
        return output


def _note_fold(pair: FoldablePair) -> None:
    state = vars(pair.call.conv).get('_tune_conv')
    if state is not None:
        state.note_fold(pair.norm, pair.norm_kind, pair.coeff_shape)


def _remember(pair: FoldablePair, deferred: Any) -> None:
    """Spare the next call of a pair that was checked in full just now."""
    conv, norm, run = pair.call.conv, pair.norm, deferred.run
    x = deferred.inputs[0]
    if (run is None or run.inside_function or inside_backward()
            or inside_autograd_function() or inside_transform()
            # A shallow copy shares its block's state.
            or any(vars(layer)['forward'].module is not layer
                   for layer in (conv, norm) if 'forward' in vars(layer))
            or (conv, norm) not in run.state.pairs_in(run.block, False)
            # What has changed since the convolution was called.
            or why_not_defer(conv, conv._tune_conv, norm, x)):
        return
    known = know(run.state.facts(run.block), pair, x)
    if known is not None:
        run.state.known[conv] = known


@Hook
def call_norm(norm: nn.Module, args: tuple,
              kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a normalization: fold what it is given, or not."""
    if kwargs is None:
        return None
    own = norm.__dict__
    state = own.get('_tune_norm')
    if state is None:
        return settle(args), settle(kwargs)
    if len(args) == 1 and not kwargs and type(args[0]) is DeferredConv:
        output = state.fold_again(norm, args[0])
        if output is not None:
            _note_fused(state, args[0], output)
            output = state.kind.finish(norm, output)
            args[0].handed = own['forward'], output
            return None
    if type(own.get('forward')) is not Forward:
        heal(norm, 'forward', Forward)
        args, kwargs = settle(args), settle(kwargs)
        _note_stock(norm, state, args)
        return args, kwargs
    if kwargs:
        args, kwargs = positional(norm, args, kwargs)
    output = None
    if len(args) == 1 and is_deferred(args[0]) and not kwargs:
        if not state.kind.runs_forward:
            output = state.fold(norm, args[0])
        elif thread() != COMPILING and state.is_stock(norm):
            # The fold waits until the forward calls F.batch_norm.
            state.ran = 'stock'
            args[0].receiver = functools.partial(state.receive, norm)
            PASSED[thread()] = own['forward'], norm, args, None
            return args, kwargs
    if output is not None:
        _note_fused(state, args[0], output)
        output = state.kind.finish(norm, output)
    else:
        args, kwargs = settle(args), settle(kwargs)
        _note_stock(norm, state, args)
    PASSED[thread()] = own['forward'], norm, args, output
    return args, kwargs


def _note_fused(state: NormState, deferred: Any, output: Tensor) -> None:
    state.ran = 'fused'
    deferred.folded = output.requires_grad


def _note_stock(norm: nn.Module, state: NormState, args: tuple) -> None:
    state.ran = 'stock' if state.kind.is_fixed(norm) else 'train mode'
    if inside_autograd_function() and args and not args[0].requires_grad:
        # With a gradient it would come from outside of the function.
        conv_state = getattr(args[0], '_tune_conv', None)
        if conv_state is not None:
            conv_state.stays_inside = conv_state.deferred = True


def attach_norm(name: str, norm: nn.Module, kind: NormKind) -> NormState:
    """Make a normalization fold the convolutions that wait for it.

    Args:
        name (str): Name of the normalization, for messages.
        norm (nn.Module): Of a known kind.
        kind (NormKind): That kind.

    Returns:
        NormState: The one that it has already, where it has.
    """
    state = vars(norm).get('_tune_norm')
    if state is None:
        state = NormState(name, norm, kind)
        attach(
            norm,
            call_norm,
            overrides=dict(forward=Forward, extra_repr=TunedRepr),
            _tune_norm=state)
    return state
