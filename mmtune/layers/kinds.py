"""What a kind says of its layers, whatever they are.

The tables that map classes to kinds lie in :mod:`mmtune.layers.convolutions`,
:mod:`mmtune.layers.normalizations` and :mod:`mmtune.layers.activations`.
"""
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from mmtune.functional.geometry import LinearMap, per_dimension
from mmtune.utils.attach import bare_copy

__all__ = ['ConvKind', 'LayerKind', 'NormKind', 'parameter']

_TENSORS = frozenset(('weight', 'bias', 'running_mean', 'running_var'))


@functools.cache
def _getter(names: tuple[str, ...]) -> Callable:
    if len(names) < 2:  # for which it would give no tuple
        return lambda owner: tuple(getattr(owner, name) for name in names)
    return operator.attrgetter(*names)


class LayerKind:
    """What kinds of convolutions, normalizations and others share.

    Attributes:
        methods (tuple[str, ...]): What a layer's call runs of its class.
        functions (tuple[str, ...]): Functions of ``torch.nn.functional`` in
            whose place the fold runs.
        operators (tuple[str, ...]): Functions of ``torch`` that those call.
    """

    methods: tuple[str, ...] = ('forward', )
    functions: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()

    def code(self, layer_type: type) -> tuple:
        """Give the functions that a call of a layer would run now.

        Args:
            layer_type (type): Class of a layer of this kind.

        Returns:
            tuple[Callable | None, ...]: To compare with what it was.
        """
        if torch.compiler.is_compiling():
            return (tuple([getattr(layer_type, n) for n in self.methods]),
                    tuple([getattr(F, n) for n in self.functions]),
                    tuple([getattr(torch, n) for n in self.operators]))
        # By a getter in C, which takes a tenth of the time.
        return (_getter(self.methods)(layer_type),
                _getter(self.functions)(F), _getter(self.operators)(torch))

    def reads(self, layer_type: type) -> tuple[str, ...]:
        """Give the names of what a call reads of a layer's class.

        Args:
            layer_type (type): Class of a layer of this kind.

        Returns:
            tuple[str, ...]: The same as in :meth:`code`.
        """
        return self.methods


def _finds_as_torch(layer: nn.Module) -> bool:
    """Whether parameters and buffers are found by torch's own code."""
    return type(layer).__getattr__ is nn.Module.__getattr__


def parameter(layer: nn.Module, name: str) -> Any:
    """Get a parameter, or what stands in its place.

    Args:
        layer (nn.Module): Any layer.
        name (str): Name of the parameter.

    Returns:
        Tensor | None: None where the layer has none.
    """
    # A lookup by attribute takes ten times as long.
    own = layer._parameters
    if name in own and name not in layer.__dict__ and _finds_as_torch(layer):
        return own[name]
    # With a default, torch.compile would have a parametrization run twice.
    if hasattr(type(layer), name):
        return getattr(layer, name)
    return getattr(layer, name, None)


class ConvKind(LayerKind):
    """Any layer whose output is linear in its weight, channel by channel.

    That is to say: multiplying ``weight[c]`` and ``bias[c]`` by a number
    multiplies channel ``c`` of the output by it, and nothing else; and the
    layer adds ``bias``, where it has one, to the output. This class runs such
    a layer by its own forward, with the folded weight in place of its own,
    whatever else that forward reads. A subclass that gives
    :meth:`linear_map` spares backward the folded weight as well.

    Attributes:
        gives_list (bool): Whether the layer takes a list of inputs and gives
            a list of outputs, see :meth:`branches`.
        needs_map (bool): Whether it is only known to be linear in a call for
            which :meth:`linear_map` gives the operator.
    """

    gives_list = False
    needs_map = False

    def weight(self, conv: nn.Module) -> Tensor:
        """Give what the input is multiplied with.

        Args:
            conv (nn.Module): A layer of this kind.

        Returns:
            Tensor: Shape (out_channels, ...), or see :meth:`coeff_shape`. It
            is asked for once a call, since it may be made anew each time.
        """
        return parameter(conv, 'weight')

    def shape(self, conv: nn.Module) -> tuple[int, ...]:
        """Give the shape of a weight, without asking for it.

        Args:
            conv (nn.Module): A layer of this kind, with the attributes of
                ``nn.Conv2d``.

        Returns:
            tuple[int, ...]: Zeros where the layer does not know it yet.
        """
        return (conv.out_channels, conv.in_channels // conv.groups,
                *conv.kernel_size)

    def coeff_shape(self, conv: nn.Module,
                    weight_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Give the shape in which a number per output channel multiplies.

        Args:
            conv (nn.Module): A layer of this kind.
            weight_shape (tuple[int, ...]): Of its weight.

        Returns:
            tuple[int, ...]: See :mod:`mmtune.functional.fold`; here the
            output channels are the weight's first dimension.
        """
        return (weight_shape[0], ) + (1, ) * (len(weight_shape) - 1)

    def outputs_per_input(self, conv: nn.Module) -> float:
        """Estimate how many elements of output an element of input gives.

        Args:
            conv (nn.Module): A layer of this kind.

        Returns:
            float: From the numbers of channels and the stride.
        """
        strides = per_dimension(conv.stride, len(conv.kernel_size))
        return conv.out_channels / conv.in_channels / math.prod(strides)

    def output_shape(self, conv: nn.Module, weight: Tensor,
                     *inputs: Any) -> tuple[int, ...] | None:
        """Give the shape of the output, without computing it.

        Args:
            conv (nn.Module): A layer of this kind.
            weight (Tensor): What :meth:`weight` gave.
            *inputs: What the layer was called with.

        Returns:
            tuple[int, ...] | None: None where it is not known, or the call
            would fail.
        """
        return None

    def flattened(self, *inputs: Any, start_dim: int,
                  end_dim: int) -> tuple | None:
        """Give inputs for which the output is the flattened one.

        Args:
            *inputs: What a layer of this kind was called with.
            start_dim (int): See ``Tensor.flatten``.
            end_dim (int): See ``Tensor.flatten``.

        Returns:
            tuple | None: None where there are none.
        """
        return None

    def run(self, conv: nn.Module, weight: Tensor, bias: Tensor | None,
            *inputs: Any) -> Tensor:
        """Run the layer with other tensors in the place of its own.

        Args:
            conv (nn.Module): Gives everything else; is not changed.
            weight (Tensor): In place of what :meth:`weight` gives.
            bias (Tensor, optional): In place of ``conv.bias``.
            *inputs: What the layer was called with.

        Returns:
            Tensor: Shape (batch, out_channels, ...).
        """
        layer = bare_copy(conv)
        # Without a parametrization of the weight.
        layer.__class__ = type_before_parametrizations(conv)
        vars(layer).update(
            _parameters={
                name: parameter
                for name, parameter in conv._parameters.items()
                if name not in ('weight', 'bias')
            },
            weight=weight,
            bias=bias)
        return layer.forward(*inputs)

    def linear_map(self, conv: nn.Module,
                   *inputs: Any) -> tuple[Tensor, LinearMap] | None:
        """Say what is done with the weight, where it is a known operator.

        Args:
            conv (nn.Module): A layer of this kind.
            *inputs: What it was called with.

        Returns:
            tuple[Tensor, LinearMap] | None: The input that the operator gets
            (padded, say), and the operator; None where :meth:`run` has to be
            called.
        """
        return None

    def geometry(self, conv: nn.Module) -> LinearMap | None:
        """Say what is done with the weight, whatever the input.

        Args:
            conv (nn.Module): A layer of this kind.

        Returns:
            LinearMap | None: None where :meth:`linear_map` has to be asked
            at each call, with its input.
        """
        return None

    def branches(self, conv: nn.Module,
                 *inputs: Any) -> list[tuple['ConvKind', nn.Module, tuple]]:
        """Split a call of a layer that gives a list.

        Args:
            conv (nn.Module): A layer of this kind.
            *inputs: What it was called with.

        Returns:
            list[tuple[ConvKind, nn.Module, tuple]]: A convolution for each
            output, by its kind, itself and its own inputs.
        """
        raise NotImplementedError


class NormKind(LayerKind):
    """A normalization by statistics that it keeps (``nn.BatchNorm2d``).

    Where its statistics are fixed it computes
    ``(x - running_mean) / sqrt(running_var + eps) * weight + bias`` for each
    channel, the second dimension of ``x``.

    Attributes:
        takes_half (bool): Whether float32 statistics and a half precision
            ``x`` give a half precision output.
        runs_forward (bool): Whether the fold takes the place of a call of
            ``F.batch_norm`` in the forward, not of the whole forward.
        does_more (bool): Whether a call may do more than normalize.
        is_plain (bool): Whether a call depends on nothing but the input, the
            module's ``__dict__`` and those in it, and the code of its class
            and of torch.
    """

    takes_half = True
    runs_forward = False
    does_more = False
    is_plain = False

    def tensors(self, norm: nn.Module) -> tuple[Tensor | None, ...]:
        """Give weight, bias, running_mean and running_var.

        Args:
            norm (nn.Module): A normalization of this kind.

        Returns:
            tuple[Tensor | None, ...]: Each of shape (num_features,) or None.
        """
        # Four lookups by attribute take as long as a short operator.
        learned, kept = norm._parameters, norm._buffers
        if norm.__dict__.keys() & _TENSORS or not _finds_as_torch(norm):
            return norm.weight, norm.bias, norm.running_mean, norm.running_var
        try:
            return (learned['weight'], learned['bias'], kept['running_mean'],
                    kept['running_var'])
        except KeyError:  # parametrized, frozen or a replica
            return norm.weight, norm.bias, norm.running_mean, norm.running_var

    def eps(self, norm: nn.Module) -> float:
        """Give what a call of now would add to the variance.

        Args:
            norm (nn.Module): A normalization of this kind.

        Returns:
            float: The attribute, or what the forward has in its place.
        """
        return norm.eps

    def computes_formula(self, norm: nn.Module, x: Tensor) -> bool:
        """Whether a call of now would compute it, if statistics are fixed.

        Args:
            norm (nn.Module): A normalization of this kind.
            x (Tensor): Of as many dimensions as its input would have.

        Returns:
            bool: False where the module is no longer what was known.
        """
        return True

    def is_fixed(self, norm: nn.Module) -> bool:
        """Whether a call of now would use the running statistics.

        Args:
            norm (nn.Module): A normalization of this kind.

        Returns:
            bool: False where it would use those of its input.
        """
        buffers = norm._buffers
        return (not norm.training and buffers.get('running_mean') is not None
                and buffers.get('running_var') is not None)

    def finish(self, norm: nn.Module, output: Tensor) -> Tensor:
        """Do what the forward does after it has normalized.

        Args:
            norm (nn.Module): A normalization of this kind.
            output (Tensor): Normalized.

        Returns:
            Tensor: What the forward gives.
        """
        return output

    def check_input(self, norm: nn.Module, x: Tensor) -> None:
        """Raise what the normalization would raise of its input's shape.

        Args:
            norm (nn.Module): A normalization of this kind.
            x (Tensor): Of as many dimensions as its input would have.
        """
        norm._check_input_dim(x)
