"""What an activation does differently: it keeps one map with its readers."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmtune.behaviours.blocks import thread
from mmtune.behaviours.remade import Call, add_spared
from mmtune.behaviours.saved import attach_scope, current_scope
from mmtune.layers.activations import ActivationKind, activation_kind
from mmtune.layers.code import patched
from mmtune.utils.attach import Hook, Override, TunedRepr, attach, overridden
from mmtune.utils.transforms import in_transform

__all__ = ['activation_runs', 'attach_activations', 'find_activations']


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
            add_spared(self.kind.spared(x))
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
    return not in_transform() and not torch._C._len_torch_function_stack()


def _attach(module: nn.Module) -> None:
    kind = activation_kind(module)
    assert kind is not None, 'found for its kind'
    attach(
        module,
        note_called,
        overrides=dict(forward=ActivationForward, extra_repr=TunedRepr),
        _tune_activation=ActivationState(kind, module))


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
            # A block is not fused where a layer has more hooks than its own.
            is_layer = vars(module).keys() & {'_tune_conv', '_tune_norm'}
            if (module not in own and not is_layer
                    and not own.isdisjoint(module.modules())):
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
