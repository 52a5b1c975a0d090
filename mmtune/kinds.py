"""What each kind of convolution and of normalization is to the fold.

``CONV_KINDS`` and ``NORM_KINDS`` map the dotted name of a class to its kind.
A module whose class is in neither, or that computes its output by code of its
own, is never folded. To have a layer of your own folded, add a line::

    from mmtune.kinds import CONV_KINDS, ConvKind

    CONV_KINDS['mypackage.layers.MyConv'] = ConvKind()
"""
import functools
import math
import operator
import os
import re
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtune.attach import bare_copy
from mmtune.calls import (
    calls_batch_norm,
    convolution_of,
    convolves,
)
from mmtune.frozen import Frozen, frozen, still_is
from mmtune.functional import Convolution, LinearMap, Product

__all__ = [
    'CONV_KINDS', 'NORM_KINDS', 'ConvKind', 'LayerKind', 'NormKind',
    'conv_kind', 'is_known_conv', 'known_kind', 'looks_like_conv',
    'looks_like_norm', 'methods_of', 'norm_kind', 'parameter', 'patched',
    'same_code', 'why_not_folded'
]

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


def _per_dimension(setting: Any, dimensions: int) -> tuple[int, ...]:
    """Write a setting as torch takes it, one number for all or for each."""
    if type(setting) is tuple and len(setting) == dimensions:
        return setting
    numbers = (setting, ) if isinstance(setting, int) else tuple(setting)
    return numbers * dimensions if len(numbers) == 1 else numbers


def _positive(*shape: int) -> tuple[int, ...] | None:
    """The shape, None where a convolution would not give it."""
    return shape if all(size > 0 for size in shape) else None


def _geometry(conv: nn.Module, padding: Any, transposed: bool,
              output_padding: Any) -> Convolution:
    dimensions = len(conv.kernel_size)
    return Convolution(
        _per_dimension(conv.stride, dimensions),
        _per_dimension(padding, dimensions),
        _per_dimension(conv.dilation, dimensions), transposed,
        _per_dimension(output_padding, dimensions), conv.groups)


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
            tuple[int, ...]: A shape that :mod:`mmtune.functional` describes;
            here the output channels are the weight's first dimension.
        """
        return (weight_shape[0], ) + (1, ) * (len(weight_shape) - 1)

    def outputs_per_input(self, conv: nn.Module) -> float:
        """Estimate how many elements of output an element of input gives.

        Args:
            conv (nn.Module): A layer of this kind.

        Returns:
            float: From the numbers of channels and the stride.
        """
        strides = _per_dimension(conv.stride, len(conv.kernel_size))
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
        known: Any = known_kind(type(conv), CONV_KINDS)[1]
        # Without a parametrization of the weight.
        layer.__class__ = known
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


class _Convolution(ConvKind):
    """``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``."""

    methods = (*ConvKind.methods, '_conv_forward')
    functions = ('conv1d', 'conv2d', 'conv3d')

    def output_shape(self, conv, weight, *inputs):
        x, = inputs
        _, _, *sizes = x.shape
        if x.dim() != weight.dim() or x.size(1) != weight.size(
                1) * conv.groups:
            return None
        return _positive(x.size(0), weight.size(0),
                         *self._output_sizes(conv, sizes, weight.shape[2:]))

    def _output_sizes(self, conv, sizes, kernel):
        reach = [d * (k - 1) for d, k in zip(
            _per_dimension(conv.dilation, len(kernel)), kernel)]
        if conv.padding == 'same':
            padded = reach
        elif conv.padding == 'valid':
            padded = [0] * len(kernel)
        else:
            padded = [2 * p for p in _per_dimension(conv.padding, len(kernel))]
        return [(size + p - r - 1) // stride + 1 for size, p, r, stride in zip(
            sizes, padded, reach, _per_dimension(conv.stride, len(kernel)))]

    def run(self, conv, weight, bias, *inputs):
        return conv._conv_forward(*inputs, weight, bias)

    def geometry(self, conv):
        if conv.padding_mode != 'zeros' or conv.padding == 'same':
            return None
        padding = 0 if conv.padding == 'valid' else conv.padding
        return _geometry(conv, padding, False, conv.output_padding)

    def linear_map(self, conv, *inputs):
        x, = inputs
        if conv.padding_mode != 'zeros':
            x = F.pad(x, conv._reversed_padding_repeated_twice,
                      conv.padding_mode)
            padding: Any = 0
        elif conv.padding == 'same':
            x, padding = self._pad_same(conv, x)
        else:
            return x, _Convolution.geometry(self, conv)
        return x, _geometry(conv, padding, False, conv.output_padding)

    def _pad_same(self, conv, x):
        # Of what the convolution has now, not when it was made.
        weight = conv._parameters.get('weight')
        kernel = conv.kernel_size if weight is None else weight.shape[2:]
        totals = [d * (k - 1) for d, k in zip(
            _per_dimension(conv.dilation, len(kernel)), kernel)]
        if not any(total % 2 for total in totals):
            return x, tuple(total // 2 for total in totals)
        # F.pad wants the last dimension first; the larger half comes last.
        sides = [side for total in reversed(totals)
                 for side in (total // 2, total - total // 2)]
        return F.pad(x, sides), 0


class _TransposedConvolution(ConvKind):
    """``nn.ConvTranspose1d``, ``nn.ConvTranspose2d``, ``nn.ConvTranspose3d``.

    The weight has the shape (in_channels, out_channels / groups, ...).
    """

    methods = (*ConvKind.methods, '_output_padding')
    functions = ('conv_transpose1d', 'conv_transpose2d', 'conv_transpose3d')

    def shape(self, conv):
        return (conv.in_channels, conv.out_channels // conv.groups,
                *conv.kernel_size)

    def coeff_shape(self, conv, weight_shape):
        _, out_channels, *kernel_size = weight_shape
        shape = (out_channels, *[1] * len(kernel_size))
        return (1, *shape) if conv.groups == 1 else (conv.groups, 1, *shape)

    def outputs_per_input(self, conv):
        strides = _per_dimension(conv.stride, len(conv.kernel_size))
        return conv.out_channels / conv.in_channels * math.prod(strides)

    def output_shape(self, conv, weight, x, output_size=None):
        if x.dim() != weight.dim() or x.size(1) != weight.size(0):
            return None
        *_, geometry = self.linear_map(conv, x, output_size)
        sizes = [
            (size - 1) * stride - 2 * p + dilation * (kernel - 1) + more + 1
            for size, kernel, stride, p, dilation, more in zip(
                x.shape[2:], weight.shape[2:], geometry.stride,
                geometry.padding, geometry.dilation, geometry.output_padding)
        ]
        return _positive(x.size(0), weight.size(1) * conv.groups, *sizes)

    def geometry(self, conv):
        return _geometry(conv, conv.padding, True, conv.output_padding)

    def linear_map(self, conv, x, output_size=None):
        output_padding = conv._output_padding(
            x, output_size, conv.stride, conv.padding, conv.kernel_size,
            len(conv.kernel_size), conv.dilation)
        return x, _geometry(conv, conv.padding, True, output_padding)

    def run(self, conv, weight, bias, *inputs):
        x, geometry = self.linear_map(conv, *inputs)
        run = (F.conv_transpose1d, F.conv_transpose2d,
               F.conv_transpose3d)[len(geometry.stride) - 1]
        return run(x, weight, bias, geometry.stride, geometry.padding,
                   geometry.output_padding, geometry.groups,
                   geometry.dilation)


class _Linear(ConvKind):
    """``nn.Linear``, whose output is a matrix, or is made one."""

    functions = ('linear', )

    def shape(self, conv):
        return conv.out_features, conv.in_features

    def outputs_per_input(self, conv):
        return conv.out_features / conv.in_features

    def output_shape(self, conv, weight, *inputs):
        x, = inputs
        if x.dim() < 2 or x.size(-1) != weight.size(1):
            return None
        return *x.shape[:-1], weight.size(0)

    def flattened(self, *inputs, start_dim, end_dim):
        x, = inputs
        # Not the last dimension, that of the channels.
        if (start_dim % x.dim(), end_dim % x.dim()) != (0, x.dim() - 2):
            return None
        return x.flatten(start_dim, end_dim),

    def run(self, conv, weight, bias, *inputs):
        x, = inputs
        return F.linear(x, weight, bias)

    def geometry(self, conv):
        return Product()

    def linear_map(self, conv, *inputs):
        x, = inputs
        return x, Product()


class _PaddedConvolution(_Convolution):
    """MMCV's ``Conv2dAdaptivePadding``: pads as TensorFlow's "same" does."""

    def run(self, conv, weight, bias, *inputs):
        return super().run(conv, weight, bias, self._pad(conv, *inputs))

    def geometry(self, conv):
        return None

    def linear_map(self, conv, *inputs):
        return super().linear_map(conv, self._pad(conv, *inputs))

    def _output_sizes(self, conv, sizes, kernel):
        if tuple(kernel) != tuple(conv.kernel_size):
            return [0]
        return [math.ceil(size / stride)
                for size, stride in zip(sizes, conv.stride)]

    def _pad(self, conv, x):
        padding = []
        # F.pad wants the last dimension first.
        for size, kernel, stride, dilation in zip(
                x.shape[:1:-1], conv.kernel_size[::-1], conv.stride[::-1],
                conv.dilation[::-1]):
            total = max((math.ceil(size / stride) - 1) * stride +
                        (kernel - 1) * dilation + 1 - size, 0)
            padding += [total // 2, total - total // 2]
        return F.pad(x, padding) if any(padding) else x


class _OwnForward(_Convolution):
    """A subclass of ``nn.Conv2d`` that ends in ``F.conv2d`` in its own way.

    It pads as TensorFlow does, say.
    """

    needs_map = True

    def output_shape(self, conv, weight, *inputs):
        # It would have to be padded twice.
        return None

    def geometry(self, conv):
        return None

    def run(self, conv, weight, bias, *inputs):
        layer = bare_copy(conv)
        vars(layer).update(_parameters={}, weight=weight, bias=bias)
        return type(conv).forward(layer, *inputs)

    def linear_map(self, conv, *inputs):
        x, = inputs
        call = convolution_of(conv, x)
        if call is None or isinstance(call['padding'], str):
            return None
        dimensions = len(conv.kernel_size)
        stride, padding, dilation = (
            _per_dimension(call[name], dimensions)
            for name in ('stride', 'padding', 'dilation'))
        return call['input'], Convolution(stride, padding, dilation, False,
                                          (0, ) * dimensions, call['groups'])


class _StandardizedConvolution(_Convolution):
    """MMCV's ``ConvWS2d``: a weight of mean 0 and deviation 1 per channel."""

    def weight(self, conv):
        flat = conv.weight.flatten(1)
        mean = flat.mean(dim=1).view(-1, 1, 1, 1)
        std = flat.std(dim=1).view(-1, 1, 1, 1)
        return (conv.weight - mean) / (std + conv.eps)


class _AdaptiveStandardizedConvolution(_Convolution):
    """MMCV's ``ConvAWS2d``."""

    methods = (*_Convolution.methods, '_get_weight')

    def weight(self, conv):
        return conv._get_weight(conv.weight)


class _DeformableConvolution(ConvKind):
    """MMCV's ``DeformConv2d``, which has no bias of its own."""

    def run(self, conv, weight, bias, *inputs):
        output = super().run(conv, weight, None, *inputs)
        # In place: no gradient needs the output itself.
        return output if bias is None else output.add_(bias.view(-1, 1, 1))


class _TridentBranch(_Convolution):
    """A branch of a ``TridentConv``, with the padding as dilation."""

    def run(self, conv, weight, bias, *inputs):
        x, = inputs
        return F.conv2d(x, weight, bias, conv.stride, conv.padding,
                        conv.dilation)

    def geometry(self, conv):
        return Convolution(conv.stride, conv.padding, conv.dilation, False,
                           (0, 0), 1)

    def linear_map(self, conv, *inputs):
        x, = inputs
        return x, self.geometry(conv)


class _Trident(ConvKind):
    """MMDetection's ``TridentConv``: one weight, several dilations."""

    gives_list = True

    def shape(self, conv):
        return conv.out_channels, conv.in_channels, *conv.kernel_size

    def branches(self, conv, *inputs):
        inputs, = inputs
        sizes = list(zip(conv.paddings, conv.dilations))
        if not conv.training and conv.test_branch_idx != -1:
            sizes = [(conv.paddings[conv.test_branch_idx],
                      conv.dilations[conv.test_branch_idx])]
        branches = []
        for x, (padding, dilation) in zip(inputs, sizes):
            branch = bare_copy(conv)
            vars(branch).update(
                padding=(padding, padding), dilation=(dilation, dilation))
            branches.append((_TRIDENT_BRANCH, branch, (x, )))
        return branches


_TRIDENT_BRANCH = _TridentBranch()


# Whose code is known, as it was written.
_LIBRARIES = ('torch', 'mmcv', 'mmdet', 'mmengine')
_TENSORS = frozenset(('weight', 'bias', 'running_mean', 'running_var'))


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


class _BatchNorm(NormKind):
    """``nn.BatchNorm1d``, ``nn.BatchNorm2d``, ``nn.BatchNorm3d``."""

    is_plain = True
    methods = (*NormKind.methods, '_check_input_dim')
    functions = ('batch_norm', )
    operators = ('batch_norm', )


class _CallsBatchNorm(NormKind):
    """What normalizes by ``F.batch_norm``, and does more (activates, say)."""

    functions = ('batch_norm', )
    operators = ('batch_norm', )
    runs_forward = True
    does_more = True

    def check_input(self, norm, x):
        pass


class _InstanceNorm(NormKind):
    """``nn.InstanceNorm2d`` with ``track_running_stats=True``."""

    is_plain = True
    methods = (*NormKind.methods, '_check_input_dim', '_apply_instance_norm')
    functions = ('instance_norm', )
    operators = ('instance_norm', )

    def is_fixed(self, norm):
        return norm.track_running_stats and super().is_fixed(norm)


class _SyncBatchNormOfMMCV(NormKind):
    """MMCV's ``MMSyncBN``."""

    is_plain = True
    functions = ('batch_norm', )

    def is_fixed(self, norm):
        return norm.track_running_stats and super().is_fixed(norm)

    def check_input(self, norm, x):
        pass


class _FrozenNorm(NormKind):
    """A ``FrozenBatchNorm2d``: four buffers, in train mode too.

    Args:
        found (Frozen): What trying its forward has shown.
    """

    takes_half = False
    is_plain = True

    def __init__(self, found: Frozen) -> None:
        self.found = found
        self.does_more = bool(found.rest)
        self.seen: tuple = ()

    def code(self, layer_type):
        # Whatever its forward may read or call of the class, which
        # torch.compile cannot list.
        if not torch.compiler.is_compiling():
            self.seen = tuple(
                (name, value) for base in layer_type.__mro__
                if base not in (nn.Module, object)
                for name, value in vars(base).items()
                if not name.startswith('__') or name == '__getattr__')
        return self.seen

    def reads(self, layer_type):
        return tuple(name for name, _ in self.code(layer_type))

    def eps(self, norm):
        return norm.eps if self.found.eps is None else self.found.eps

    def computes_formula(self, norm, x):
        return x.dim() == 4 and still_is(norm, self.found)

    def finish(self, norm, output):
        for name in self.found.rest:
            output = getattr(norm, name)(output)
        return output

    def is_fixed(self, norm):
        return True

    def check_input(self, norm, x):
        pass


# Types of mmcv and mmdet are named, not imported: mmtune works without.
CONV_KINDS: dict[str, ConvKind] = {
    'torch.nn.modules.conv.Conv1d': _Convolution(),
    'torch.nn.modules.conv.Conv2d': _Convolution(),
    'torch.nn.modules.conv.Conv3d': _Convolution(),
    'torch.nn.modules.conv.ConvTranspose1d': _TransposedConvolution(),
    'torch.nn.modules.conv.ConvTranspose2d': _TransposedConvolution(),
    'torch.nn.modules.conv.ConvTranspose3d': _TransposedConvolution(),
    'torch.nn.modules.linear.Linear': _Linear(),
    'mmcv.cnn.bricks.wrappers.Conv2d': _Convolution(),
    'mmcv.cnn.bricks.wrappers.Conv3d': _Convolution(),
    'mmcv.cnn.bricks.wrappers.ConvTranspose2d': _TransposedConvolution(),
    'mmcv.cnn.bricks.wrappers.ConvTranspose3d': _TransposedConvolution(),
    'mmcv.cnn.bricks.wrappers.Linear': _Linear(),
    'mmcv.cnn.bricks.conv2d_adaptive_padding.Conv2dAdaptivePadding':
    _PaddedConvolution(),
    'mmcv.cnn.bricks.conv_ws.ConvWS2d': _StandardizedConvolution(),
    'mmcv.cnn.bricks.conv_ws.ConvAWS2d': _AdaptiveStandardizedConvolution(),
    'mmdet.models.backbones.trident_resnet.TridentConv': _Trident(),
    'mmcv.ops.deform_conv.DeformConv2d': _DeformableConvolution(),
    'mmcv.ops.deform_conv.DeformConv2dPack': _DeformableConvolution(),
    'mmcv.ops.modulated_deform_conv.ModulatedDeformConv2d': ConvKind(),
    'mmcv.ops.modulated_deform_conv.ModulatedDeformConv2dPack': ConvKind(),
}
NORM_KINDS: dict[str, NormKind] = {
    'torch.nn.modules.batchnorm._BatchNorm': _BatchNorm(),
    'torch.nn.modules.batchnorm.SyncBatchNorm': _BatchNorm(),
    'torch.nn.modules.instancenorm._InstanceNorm': _InstanceNorm(),
    'mmcv.ops.sync_bn.SyncBatchNorm': _SyncBatchNormOfMMCV(),
}

_OWN_FORWARD = _OwnForward()
_CALLS_BATCH_NORM = _CallsBatchNorm()

Kind = TypeVar('Kind', bound=LayerKind)


@functools.cache
def _getter(names: tuple[str, ...]) -> Callable:
    if len(names) < 2:  # for which it would give no tuple
        return lambda owner: tuple(getattr(owner, name) for name in names)
    return operator.attrgetter(*names)


def conv_kind(conv_type: type) -> ConvKind | None:
    """Look up the kind of a convolution.

    A subclass counts as the nearest known type that it derives from as long
    as it runs that type's code, unchanged.

    Args:
        conv_type (type): Class of the module.

    Returns:
        ConvKind | None: None for anything that must run as it is. A kind
        that ``needs_map`` depends on the module, see :func:`is_known_conv`.
    """
    kind, known = known_kind(conv_type, CONV_KINDS)
    if same_code(conv_type, known, '__call__', 'forward', '_conv_forward',
                 '_output_padding', '_get_weight'):
        return kind
    if type(kind) is _Convolution and same_code(conv_type, known, '__call__'):
        return _OWN_FORWARD
    return None


def is_known_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution that may be folded.

    Args:
        module (nn.Module): Any module.
    """
    kind = conv_kind(type(module))
    return kind is not None and (not kind.needs_map or convolves(module))


def norm_kind(norm: nn.Module) -> NormKind | None:
    """Look up the kind of a normalization.

    Subclasses count as for :func:`conv_kind`. A ``FrozenBatchNorm2d`` needs
    no entry: it is known by its buffers, and by what it computes.

    Args:
        norm (nn.Module): The module.

    Returns:
        NormKind | None: None for anything that must run as it is.
    """
    norm_type = type(norm)
    kind, known = known_kind(norm_type, NORM_KINDS)
    if (kind is not None and not _checks_input(norm_type)
            and same_code(norm_type, known, '__call__', 'forward')):
        return kind
    if kind is None:
        found = frozen(norm)
        if isinstance(found, Frozen):
            return _FrozenNorm(found)
    if ('running_mean' in norm._buffers
            and norm_type.__call__ is nn.Module.__call__
            and not isinstance(norm, torch.jit.ScriptModule)
            and calls_batch_norm(norm)):
        return _CALLS_BATCH_NORM
    return None


def _checks_input(norm_type: type) -> bool:
    """Whether code of the user's looks at what the normalization gets."""
    owner = next((c for c in norm_type.__mro__
                  if '_check_input_dim' in vars(c)), torch.nn.Module)
    return owner.__module__.partition('.')[0] not in _LIBRARIES


def known_kind(
        cls: type,
        kinds: dict[str, Kind]) -> tuple[Kind | None, type | None]:
    """Look up the nearest class with a kind that a class derives from.

    Args:
        cls (type): Class of a layer.
        kinds (dict[str, Kind]): Kinds by the dotted names of classes.

    Returns:
        tuple[Kind | None, type | None]: The kind, and the class that has it.
    """
    for known in cls.__mro__:
        kind = kinds.get(f'{known.__module__}.{known.__qualname__}')
        if kind is not None:
            return kind, known
    return None, None


def same_code(cls: type, known: type | None, *names: str) -> bool:
    """Whether a class runs the code of one that is known.

    Args:
        cls (type): Class of a layer.
        known (type, optional): From :func:`known_kind`.
        *names (str): Methods that are to be the same.

    Returns:
        bool: True as well where neither has a method.
    """
    return all(
        getattr(cls, name, None) is getattr(known, name, None)
        for name in names)


def patched(layer_type: type, kind: LayerKind) -> str | None:
    """Look for code that somebody put in the place of a library's own.

    Args:
        layer_type (type): Class of a layer.
        kind (LayerKind): Its kind.

    Returns:
        str | None: Name of the method or function, None where all is the
        code that the kind was written for.
    """
    for name in kind.methods:
        owner = next((c for c in layer_type.__mro__ if name in vars(c)), None)
        if (owner is not None
                and owner.__module__.partition('.')[0] in _LIBRARIES
                and not _is_from(vars(owner)[name], owner.__module__)):
            return f'{owner.__name__}.{name}'
    for name in kind.functions:
        if not _is_from(getattr(F, name), F.__name__):
            return f'F.{name}'
    for name in kind.operators:
        if not _is_from(getattr(torch, name), torch.__name__):
            return f'torch.{name}'
    return None


def _is_from(function: Any, module: str) -> bool:
    """Whether a function was written in a module's file, or in C."""
    code = getattr(function, '__code__', None)
    if code is None:
        return isinstance(function, types.BuiltinFunctionType)
    path = module.replace('.', '/')
    return code.co_filename.replace(os.sep, '/').endswith(
        (f'{path}.py', f'{path}/__init__.py'))


def methods_of(layer_type: type) -> frozenset[str]:
    """Names that an instance may not have of its own.

    Args:
        layer_type (type): Class of a layer.

    Returns:
        frozenset[str]: Its methods but those that mmtune replaces itself, and
        those of ``nn.Module`` that do not run it.
    """
    names = {
        name
        for base in layer_type.__mro__ if base not in (nn.Module, object)
        for name, value in vars(base).items()
        if not name.startswith('__') and (
            callable(value) or isinstance(value, (staticmethod, classmethod)))
    }
    return frozenset(names | {'_call_impl'}) - {
        'forward', 'extra_repr', 'named_buffers', 'train'
    }


def looks_like_conv(module: nn.Module) -> bool:
    """Whether a module is some convolution, be it of a known kind or not."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return True
    # Not `module.weight`: asking for it may make it anew.
    return 'conv' in type(module).__name__.lower() and (
        'weight' in module._parameters or 'weight' in vars(module)
        or hasattr(type(module), 'weight'))


# They keep no statistics, or may be asked not to.
_OF_THE_INPUT = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm,
                 nn.CrossMapLRN2d, nn.modules.instancenorm._InstanceNorm,
                 *([nn.RMSNorm] if hasattr(nn, 'RMSNorm') else []))
# Not: normed weights, normal vectors, the normalizing of images.
_NORM_NAME = re.compile('norm(?!ed|al(?!ization))', re.IGNORECASE)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def looks_like_norm(module: nn.Module) -> bool:
    """Whether a module is some normalization, be it of a known kind or not.

    Args:
        module (nn.Module): The module.

    Returns:
        bool: False for what only holds normalizations or convolutions.
    """
    if isinstance(module, (nn.modules.batchnorm._NormBase, *_OF_THE_INPUT)):
        return True
    own = _own_tensors(module)
    if {'running_mean', 'running_var'} <= own.keys():
        return True
    if (looks_like_conv(module) or isinstance(module, nn.Identity)
            or type(module).__module__ == 'torch.nn.utils.parametrizations'):
        return False
    # A scale and a shift of each channel, as an AffineChannel has.
    affine = (own.keys() == {'weight', 'bias'}
              and own['weight'].dim() == own['bias'].dim() == 1)
    return (affine or _NORM_NAME.search(
        type(module).__name__) is not None) and not any(
        looks_like_conv(part) or looks_like_norm(part)
        for part in module.modules() if part is not module)


def why_not_folded(norm: nn.Module) -> str | None:
    """Say why a normalization is never folded, whatever comes before it.

    Args:
        norm (nn.Module): What looks like one.

    Returns:
        str | None: The reason; None for one that may be folded.
    """
    norm_type = type(norm)
    name = norm_type.__name__
    keeps = 'running_mean' in _own_tensors(norm)
    if keeps and norm_kind(norm) is not None:
        return None
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        if not keeps:
            return 'the BN has no running statistics'
        if _checks_input(norm_type):
            return f'{name} overrides `_check_input_dim`'
        return f'{name} overrides the forward of BatchNorm'
    if not keeps:
        if isinstance(norm, _OF_THE_INPUT) and norm_type.__module__.startswith(
                'torch.nn.'):
            return (f'{name} computes its statistics from the batch at hand: '
                    'there is nothing to fold')
        return f'{name} keeps no running statistics that could be folded'
    found = frozen(norm)
    if isinstance(found, str):
        return found
    return f'{name} is not a normalization that mmtune knows'
