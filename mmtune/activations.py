"""Activations that keep one feature map, with their neighbours.

Most activations keep their input for backward, and whoever reads their output
keeps that: two maps that tell the same. ``ACTIVATION_KINDS`` maps the dotted
name of a class to how one is enough. A module whose class is not in it, or
that computes its output by code of its own, stays as it is. To add one of
your own, whose output depends on its input and its attributes alone, element
by element, and on no parameter and no chance::

    from mmtune.activations import ACTIVATION_KINDS, ActivationKind

    ACTIVATION_KINDS['mypackage.layers.MyActivation'] = ActivationKind()

ReLU, Sigmoid and Tanh, and LeakyReLU and ELU in place, need no line: their
gradient follows from their output, which is all that autograd keeps of them.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from mmtune.attach import Hook, Override, TunedRepr, attach, overridden
from mmtune.kinds import LayerKind, known_kind, patched, same_code
from mmtune.runs import thread
from mmtune.saved import Call, add_spared, attach_scope, current_scope

__all__ = [
    'ACTIVATION_KINDS', 'ActivationKind', 'activation_kind',
    'activation_runs', 'attach_activations', 'find_activations'
]


class ActivationKind(LayerKind):
    """Keeps the input; readers of the output make it anew in backward.

    Args:
        *functions (str): What the forward calls of ``torch.nn.functional``:
            where somebody has replaced it, the activation runs as stock.
    """

    def __init__(self, *functions: str) -> None:
        self.functions = functions

    def attach(self, state: 'ActivationState', module: nn.Module) -> None:
        """Give an activation what it does differently.

        Args:
            state (ActivationState): Of the activation.
            module (nn.Module): The activation.
        """
        attach(
            module,
            begin_call,
            end_call,
            overrides=dict(extra_repr=TunedRepr),
            _tune_activation=state)


class _Clamp(ActivationKind):
    """``nn.Hardtanh``, ``nn.ReLU6``: the gradient follows from the output."""

    def attach(self, state, module):
        attach(
            module,
            note_call,
            overrides=dict(forward=ClampForward, extra_repr=TunedRepr),
            _tune_activation=state)


_TORCH = 'torch.nn.modules.activation'
# Types of mmcv are named, not imported: mmtune works without.
ACTIVATION_KINDS: dict[str, ActivationKind] = {
    f'{_TORCH}.Hardtanh': _Clamp('hardtanh'),
    f'{_TORCH}.CELU': ActivationKind('celu'),
    f'{_TORCH}.ELU': ActivationKind('elu'),
    f'{_TORCH}.GELU': ActivationKind('gelu'),
    f'{_TORCH}.Hardshrink': ActivationKind('hardshrink'),
    f'{_TORCH}.Hardsigmoid': ActivationKind('hardsigmoid'),
    f'{_TORCH}.Hardswish': ActivationKind('hardswish'),
    f'{_TORCH}.LeakyReLU': ActivationKind('leaky_relu'),
    f'{_TORCH}.LogSigmoid': ActivationKind('logsigmoid'),
    f'{_TORCH}.Mish': ActivationKind('mish'),
    f'{_TORCH}.SELU': ActivationKind('selu'),
    f'{_TORCH}.SiLU': ActivationKind('silu'),
    f'{_TORCH}.Softplus': ActivationKind('softplus'),
    f'{_TORCH}.Softshrink': ActivationKind('softshrink'),
    f'{_TORCH}.Softsign': ActivationKind('softsign'),
    f'{_TORCH}.Tanhshrink': ActivationKind('tanhshrink'),
    'mmcv.cnn.bricks.activation.Clamp': ActivationKind(),
    'mmcv.cnn.bricks.hsigmoid.HSigmoid': ActivationKind(),
    'mmcv.cnn.bricks.hswish.HSwish': ActivationKind(),
    'mmcv.cnn.bricks.swish.Swish': ActivationKind(),
}


def activation_kind(module: nn.Module) -> ActivationKind | None:
    """Look up the kind of an activation.

    A subclass counts as the nearest known type that it derives from as long
    as it runs that type's code, unchanged.

    Args:
        module (nn.Module): Any module.

    Returns:
        ActivationKind | None: None for anything that must stay as it is.
    """
    kind, known = known_kind(type(module), ACTIVATION_KINDS)
    same = same_code(type(module), known, '__call__', 'forward')
    return kind if same and not overridden(module, 'forward') else None


class ActivationState:
    """State of an activation that is to keep one map.

    Attributes:
        kind (ActivationKind): Its kind.
        code (tuple, optional): The functions that it is known by; None where
            others were in their place when it was turned on.
        ran (str): How the latest forward ran: 'one map', 'stock' or
            'not run'.
    """

    def __init__(self, kind: ActivationKind, module: nn.Module) -> None:
        self.kind = kind
        changed = patched(type(module), kind)
        self.code = None if changed else kind.code(type(module))
        self.ran = 'not run'

    def is_stock(self, module: nn.Module) -> bool:
        """Whether an activation runs the code that it is known by."""
        return self.code == self.kind.code(type(module)) and not overridden(
            module, 'forward')


# --------------------------------------------------------------------------
# Those that keep their input
# --------------------------------------------------------------------------


@Hook
def begin_call(module: nn.Module,
               args: tuple,
               kwargs: dict | None = None) -> None:
    """Forward pre-hook: collect what the activation keeps."""
    scope = current_scope()
    # An activation within an activation is a part of it.
    if scope is None or scope.call is not None or kwargs != {}:
        return
    state = vars(module).get('_tune_activation')
    if (state is not None and len(args) == 1 and _needs_gradient(args[0])
            and state.is_stock(module)
            # Another's may have changed the output before it is seen here.
            and len(module._forward_hooks) == 1
            and not _has_any_global_hook()):
        scope.call = Call(scope, module, args[0])


@Hook
def end_call(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook: drop what can be made anew."""
    state = vars(module).get('_tune_activation')
    if state is None or torch.compiler.is_compiling():
        return
    scope = current_scope()
    call = None if scope is None else scope.call
    if call is None or call.module is not module:
        state.ran = 'stock'
        return
    scope.call = None
    state.ran = 'one map' if call.finish(args, output) else 'stock'


def _needs_gradient(x: Any) -> bool:
    return (type(x) is Tensor and x.requires_grad and torch.is_grad_enabled()
            and x.layout == torch.strided)


# --------------------------------------------------------------------------
# Those that keep their output
# --------------------------------------------------------------------------


class _FromOutput(torch.autograd.Function):
    """``hardtanh`` that keeps its output."""

    @staticmethod
    def forward(ctx, x, low, high, inplace):
        if inplace:
            ctx.mark_dirty(x)
        output = F.hardtanh(x, low, high, inplace)
        ctx.save_for_backward(output)
        ctx.range = low, high
        return output

    @staticmethod
    def backward(ctx, grad):
        output, = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, output,
                                                *ctx.range), None, None, None


# By thread, the activation that runs next, be it a copy of another.
_CALLED: dict[int, nn.Module] = {}


@Hook
def note_call(module: nn.Module,
              args: tuple,
              kwargs: dict | None = None) -> None:
    """Forward pre-hook: note which module runs."""
    if not torch.compiler.is_compiling():
        _CALLED[thread()] = module


class ClampForward(Override):
    """Runs :class:`_FromOutput` where that is all that happens."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.stock(*args, **kwargs)
        module = _CALLED.pop(thread(), None)
        if module is None or vars(module).get('forward') is not self:
            return self.stock(*args, **kwargs)
        state = vars(module).get('_tune_activation')
        if (state is None or kwargs or len(args) != 1
                or not _takes_function(args[0], module.inplace)
                or not state.is_stock(module)):
            if state is not None:
                state.ran = 'stock'
            return type(module).forward(module, *args, **kwargs)
        state.ran = 'one map'
        add_spared(args[0].nbytes)
        return _FromOutput.apply(args[0], module.min_val, module.max_val,
                                 module.inplace)


def _takes_function(x: Any, inplace: bool) -> bool:
    """Whether a function in Python may run in the place of an operator."""
    return (_needs_gradient(x)
            and not (inplace and (x.is_leaf or x._is_view()))
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
            and torch._C._get_tracing_state() is None
            and not torch._C._len_torch_function_stack())


# --------------------------------------------------------------------------
# A model's
# --------------------------------------------------------------------------


def find_activations(
        model: nn.Module,
        roots: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """List the activations that are to keep one map. Changes nothing.

    Args:
        model (nn.Module): Gives the names.
        roots (Sequence[nn.Module]): Modules of ``model`` to search.

    Returns:
        dict[str, nn.Module]: By name.
    """
    below = {module for root in roots for module in root.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if module in below and activation_kind(module) is not None
    }


def attach_activations(roots: Sequence[nn.Module],
                       activations: Sequence[nn.Module]) -> None:
    """Have activations keep one map.

    Args:
        roots (Sequence[nn.Module]): Modules that hold them.
        activations (Sequence[nn.Module]): From :func:`find_activations`.
    """
    for module in activations:
        kind = activation_kind(module)
        assert kind is not None, 'found for its kind'
        kind.attach(ActivationState(kind, module), module)
    own = {*activations}
    for root in roots:
        for module in root.modules():
            if module not in own and not own.isdisjoint(module.modules()):
                attach_scope(module)


def activation_runs(model: nn.Module) -> dict[str, str]:
    """How each activation that is to keep one map ran the last time.

    Args:
        model (nn.Module): After :func:`mmtune.turn_on`.

    Returns:
        dict[str, str]: By its name: ``'one map'``, ``'stock'`` or
        ``'not run'``.
    """
    return {
        name: vars(module)['_tune_activation'].ran
        for name, module in model.named_modules()
        if '_tune_activation' in vars(module)
    }
