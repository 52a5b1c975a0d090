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
from torch import Tensor, nn
from torch.autograd import forward_ad

from mmtune.attach import Hook, Override, TunedRepr, attach, overridden
from mmtune.clamp import ClampFunction
from mmtune.kinds import LayerKind, known_kind, patched, same_code
from mmtune.runs import thread
from mmtune.saved import (
    Call,
    add_spared,
    attach_scope,
    current_scope,
)

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

    # Whether a node of its own runs in the place of the stock forward, and
    # whether the input is kept, of which the output is made anew.
    has_node = False
    keeps_input = True

    def __init__(self, *functions: str) -> None:
        self.functions = functions

    def serves(self, module: nn.Module) -> bool:
        """Whether a module of this kind keeps more than one map in stock."""
        return True

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run the node, where there is one, and count what it spares.

        Args:
            module (nn.Module): An activation of this kind.
            x (Tensor): Its input, which needs a gradient.

        Returns:
            Tensor: What the stock forward gives.
        """
        raise NotImplementedError

    def remake(self, module: nn.Module, x: Tensor) -> Tensor:
        """Make the output anew, where no gradient is wanted.

        Args:
            module (nn.Module): An activation as it was set, that works out
                of place.
            x (Tensor): Its input.

        Returns:
            Tensor: What the stock forward gave, bit for bit.
        """
        return module.forward(x)


class _Elu(ActivationKind):
    """Where it runs in place, autograd keeps its output alone."""

    def serves(self, module):
        return not module.inplace


class _Clamp(ActivationKind):
    """``nn.Hardtanh``, ``nn.ReLU6``: a bit an element is enough."""

    has_node = True
    keeps_input = False

    def run(self, module, x):
        add_spared(x.nbytes - x.numel() // 8)
        return ClampFunction.apply(x, module.min_val, module.max_val,
                                   module.inplace)


class _Swish(ActivationKind):
    """MMCV's ``Swish``, of which autograd keeps the sigmoid as well."""

    has_node = True
    operators = ('sigmoid', )

    def run(self, module, x):
        add_spared(x.nbytes)
        return SwishFunction.apply(x)

    def remake(self, module, x):
        # In one new tensor, where stock's two take twice the memory.
        return torch.sigmoid(x).mul_(x)


_TORCH = 'torch.nn.modules.activation'
# Types of mmcv are named, not imported: mmtune works without.
ACTIVATION_KINDS: dict[str, ActivationKind] = {
    f'{_TORCH}.Hardtanh': _Clamp('hardtanh'),
    f'{_TORCH}.CELU': _Elu('celu'),
    f'{_TORCH}.ELU': _Elu('elu'),
    f'{_TORCH}.GELU': ActivationKind('gelu'),
    f'{_TORCH}.Hardshrink': ActivationKind('hardshrink'),
    f'{_TORCH}.Hardsigmoid': ActivationKind('hardsigmoid'),
    f'{_TORCH}.Hardswish': ActivationKind('hardswish'),
    f'{_TORCH}.LeakyReLU': _Elu('leaky_relu'),
    f'{_TORCH}.LogSigmoid': ActivationKind('logsigmoid'),
    f'{_TORCH}.Mish': ActivationKind('mish'),
    f'{_TORCH}.SELU': _Elu('selu'),
    f'{_TORCH}.SiLU': ActivationKind('silu'),
    f'{_TORCH}.Softplus': ActivationKind('softplus'),
    f'{_TORCH}.Softshrink': ActivationKind('softshrink'),
    f'{_TORCH}.Softsign': ActivationKind('softsign'),
    f'{_TORCH}.Tanhshrink': ActivationKind('tanhshrink'),
    'mmcv.cnn.bricks.activation.Clamp': ActivationKind(),
    'mmcv.cnn.bricks.hsigmoid.HSigmoid': ActivationKind(),
    'mmcv.cnn.bricks.hswish.HSwish': ActivationKind(),
    'mmcv.cnn.bricks.swish.Swish': _Swish(),
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
    if (kind is None or overridden(module, 'forward')
            or not same_code(type(module), known, '__call__', 'forward')):
        return None
    return kind if kind.serves(module) else None


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

    def run(self, module: nn.Module, x: Tensor) -> Any:
        """Run the activation, and drop what can be made anew.

        Args:
            module (nn.Module): The activation.
            x (Tensor): Its input, which needs a gradient.

        Returns:
            Tensor: Its output.
        """
        forward = type(module).forward
        if self.kind.has_node and _takes_node(module, x):
            forward = self.kind.run
            if not self.kind.keeps_input:
                self.ran = 'one map'
                return forward(module, x)
        scope = current_scope()
        # An activation within an activation is a part of it.
        if scope is None or scope.call is not None:
            return forward(module, x)
        scope.call = call = Call(scope, module, x, self.kind.remake)
        try:
            output = forward(module, x)
        except BaseException:
            call.finish(None)
            raise
        if call.finish(output):
            self.ran = 'one map'
        return output


# --------------------------------------------------------------------------
# A node of autograd
# --------------------------------------------------------------------------


class SwishFunction(torch.autograd.Function):
    """``x * sigmoid(x)`` that keeps ``x`` alone, with the bits of stock."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sigmoid(x).mul_(x)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return torch.ops.aten.silu_backward(grad, x)
        sigmoid = torch.sigmoid(x)
        return grad * sigmoid * (1 + x * (1 - sigmoid))


# --------------------------------------------------------------------------
# A call
# --------------------------------------------------------------------------

# By thread, the activation that runs next, be it a copy of another.
_CALLED: dict[int, nn.Module] = {}


@Hook
def note_called(module: nn.Module,
                args: tuple,
                kwargs: dict | None = None) -> None:
    """Forward pre-hook: note which module runs."""
    if not torch.compiler.is_compiling():
        _CALLED[thread()] = module


class ActivationForward(Override):
    """Runs an activation so that one map is kept, where that is sure."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.stock(*args, **kwargs)
        module = _CALLED.pop(thread(), None)
        if module is None or vars(module).get('forward') is not self:
            return self.stock(*args, **kwargs)
        state = vars(module).get('_tune_activation')
        if state is not None:
            state.ran = 'stock'
            if (len(args) == 1 and not kwargs and _needs_gradient(args[0])
                    and state.is_stock(module)):
                return state.run(module, args[0])
        return type(module).forward(module, *args, **kwargs)


def _needs_gradient(x: Any) -> bool:
    return (type(x) is Tensor and x.requires_grad and torch.is_grad_enabled()
            and x.layout == torch.strided)


def _takes_node(module: nn.Module, x: Tensor) -> bool:
    """Whether a node may run in the place of an operator."""
    if getattr(module, 'inplace', False) and (x.is_leaf or x._is_view()):
        return False
    return (not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
            and torch._C._get_tracing_state() is None
            and not torch._C._len_torch_function_stack())


def _attach(module: nn.Module) -> None:
    kind = activation_kind(module)
    assert kind is not None, 'found for its kind'
    attach(
        module,
        note_called,
        overrides=dict(forward=ActivationForward, extra_repr=TunedRepr),
        _tune_activation=ActivationState(kind, module))


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
    found: dict[str, nn.Module] = {}
    parts: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in parts or activation_kind(module) is None:
            continue
        # What an activation is made of runs as a part of it.
        parts.update(module.modules())
        if module in below:
            found[name] = module
    return found


def attach_activations(roots: Sequence[nn.Module],
                       activations: Sequence[nn.Module]) -> None:
    """Have activations keep one map.

    Args:
        roots (Sequence[nn.Module]): Modules that hold them.
        activations (Sequence[nn.Module]): From :func:`find_activations`.
    """
    for module in activations:
        _attach(module)
    own = {*activations}
    for root in roots:
        # Many run a backbone or a head by itself.
        for module in (root, *root.children()):
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
