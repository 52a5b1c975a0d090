"""Activations that keep one feature map, with their neighbours.

Most activations keep their input for backward, and whoever reads their output
keeps that: two maps that tell the same. ``ACTIVATION_KINDS`` maps the dotted
name of a class to how one is enough. A module whose class is not in it, or
that computes its output by code of its own, stays as it is. To add one of
your own, whose output depends on its input and its attributes alone, element
by element, and on no parameter and no chance::

    from mmtune.layers import ACTIVATION_KINDS, ActivationKind

    ACTIVATION_KINDS['mypackage.layers.MyActivation'] = ActivationKind()

ReLU, Sigmoid and Tanh, and LeakyReLU and ELU in place, need no line: their
gradient follows from their output, which is all that autograd keeps of them.
"""
from torch import Tensor, nn

from mmtune.functional.clamp import ClampFunction
from mmtune.functional.swish import SwishFunction, swish
from mmtune.layers.code import known_kind, same_code
from mmtune.layers.kinds import LayerKind
from mmtune.utils.attach import overridden

__all__ = ['ACTIVATION_KINDS', 'ActivationKind', 'activation_kind']


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
        """Run the node, where there is one.

        Args:
            module (nn.Module): An activation of this kind.
            x (Tensor): Its input, which needs a gradient.

        Returns:
            Tensor: What the stock forward gives.
        """
        raise NotImplementedError

    def spared(self, x: Tensor) -> int:
        """Give how many bytes the node keeps less than stock.

        Args:
            x (Tensor): The input.

        Returns:
            int: Those of a map.
        """
        return x.nbytes

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
        return ClampFunction.apply(x, module.min_val, module.max_val,
                                   module.inplace)

    def spared(self, x):
        return x.nbytes - x.numel() // 8


class _Swish(ActivationKind):
    """MMCV's ``Swish``, of which autograd keeps the sigmoid as well."""

    has_node = True
    operators = ('sigmoid', )

    def run(self, module, x):
        return SwishFunction.apply(x)

    def remake(self, module, x):
        return swish(x)


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
