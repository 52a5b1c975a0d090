"""What convolutions and normalizations in Tune mode have in common.

A pre-hook does the work, and the forward on the instance lets its result
through. Anything else that touches a promise makes it run the plain
convolution, so that the result is the stock one whatever the control flow.
"""
from typing import Any

from torch import nn

from mmtune.behaviours.blocks import thread
from mmtune.behaviours.deferred import DeferredConv, settle
from mmtune.layers.code import methods_of, patched
from mmtune.utils.attach import Override

__all__ = ['PASSED', 'Forward', 'LayerState', 'positional']

# By thread, what a pre-hook hands to the forward on the instance that runs
# next: that forward, the module, its arguments, and the output, None where the
# stock forward is to run.
PASSED: dict[int, tuple] = {}


class Forward(Override):
    """Lets the result of the pre-hook through, or runs the stock forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See ``nn.Module.forward``."""
        if len(args) == 1 and type(args[0]) is DeferredConv:
            deferred = args[0]
            if deferred.handed is not None and deferred.handed[0] is self:
                return deferred.take()
        passed = PASSED.pop(thread(), None)
        if passed is None or passed[0] is not self:
            return self.run_stock(self.module, settle(args), settle(kwargs))
        _, module, made_of, output = passed
        # Another hook may have changed the arguments since.
        if (output is not None and not kwargs and len(args) == len(made_of)
                and all([new is old for new, old in zip(args, made_of)])):
            return output
        return self.run_stock(module, args, kwargs)

    def run_stock(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Run the forward that the class has now."""
        return type(module).forward(module, *args, **kwargs)


def positional(module: nn.Module, args: tuple,
                kwargs: dict) -> tuple[tuple, dict]:
    """Write arguments given by name in their places, where that is all."""
    code = getattr(type(module).forward, '__code__', None)
    if code is None:
        return args, kwargs
    names = code.co_varnames[1 + len(args):1 + len(args) + len(kwargs)]
    if set(names) != set(kwargs):
        return args, kwargs
    return (*args, *[kwargs[name] for name in names]), {}


class LayerState:
    """What the states of convolutions and normalizations have in common.

    Attributes:
        name (str): Name of the layer, for messages.
        kind (ConvKind | NormKind): Its kind.
        code (tuple, optional): The functions that it is known by; None where
            others were in their place when it was turned on.
        methods (frozenset[str]): What must not be replaced on the instance.
        is_on (bool): Whether it was not turned off.
    """

    def __init__(self, name: str, layer: nn.Module, kind: Any) -> None:
        self.name = name
        self.kind = kind
        # What a lazy layer turns into in its first call.
        final = getattr(layer, 'cls_to_become', None) or type(layer)
        self.code = None if patched(type(layer), kind) else kind.code(final)
        self.methods = methods_of(type(layer))
        self.is_on = True

    def is_stock(self, layer: nn.Module) -> bool:
        """Whether a layer runs the code that it is known by."""
        # A view goes through the shorter of the two.
        return (not layer.__dict__.keys() & self.methods
                and self.code == self.kind.code(type(layer)))
