"""What each kind of convolution is to the fold.

``CONV_KINDS`` maps the dotted name of a class to its kind. A module whose
class is not in it, or that computes its output by code of its own, is never
folded. To have a layer of your own folded, add a line::

    from mmtune.layers import CONV_KINDS, ConvKind

    CONV_KINDS['mypackage.layers.MyConv'] = ConvKind()
"""
import math
from typing import Any

import torch.nn.functional as F
from torch import nn

from mmtune.functional.geometry import (
    Convolution,
    Product,
    geometry_of,
    per_dimension,
    positive,
)
from mmtune.layers.calls import convolution_of, convolves
from mmtune.layers.code import known_kind, same_code
from mmtune.layers.kinds import ConvKind
from mmtune.utils.attach import bare_copy

__all__ = ['CONV_KINDS', 'conv_kind', 'is_known_conv', 'looks_like_conv']


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
        return positive(x.size(0), weight.size(0),
                         *self._output_sizes(conv, sizes, weight.shape[2:]))

    def _output_sizes(self, conv, sizes, kernel):
        reach = [d * (k - 1) for d, k in zip(
            per_dimension(conv.dilation, len(kernel)), kernel)]
        if conv.padding == 'same':
            padded = reach
        elif conv.padding == 'valid':
            padded = [0] * len(kernel)
        else:
            padded = [2 * p for p in per_dimension(conv.padding, len(kernel))]
        return [(size + p - r - 1) // stride + 1 for size, p, r, stride in zip(
            sizes, padded, reach, per_dimension(conv.stride, len(kernel)))]

    def run(self, conv, weight, bias, *inputs):
        return conv._conv_forward(*inputs, weight, bias)

    def geometry(self, conv):
        if conv.padding_mode != 'zeros' or conv.padding == 'same':
            return None
        padding = 0 if conv.padding == 'valid' else conv.padding
        return geometry_of(conv, padding, False, conv.output_padding)

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
        return x, geometry_of(conv, padding, False, conv.output_padding)

    def _pad_same(self, conv, x):
        # Of what the convolution has now, not when it was made.
        weight = conv._parameters.get('weight')
        kernel = conv.kernel_size if weight is None else weight.shape[2:]
        totals = [d * (k - 1) for d, k in zip(
            per_dimension(conv.dilation, len(kernel)), kernel)]
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
        strides = per_dimension(conv.stride, len(conv.kernel_size))
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
        return positive(x.size(0), weight.size(1) * conv.groups, *sizes)

    def geometry(self, conv):
        return geometry_of(conv, conv.padding, True, conv.output_padding)

    def linear_map(self, conv, x, output_size=None):
        output_padding = conv._output_padding(
            x, output_size, conv.stride, conv.padding, conv.kernel_size,
            len(conv.kernel_size), conv.dilation)
        return x, geometry_of(conv, conv.padding, True, output_padding)

    def run(self, conv, weight, bias, *inputs):
        x, geometry = self.linear_map(conv, *inputs)
        run = getattr(F, self.functions[len(geometry.stride) - 1])
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
        return *inputs, Product()


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
    """A subclass of ``nn.Conv2d`` that pads, say, before ``F.conv2d``."""

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
            per_dimension(call[name], dimensions)
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


class _MaskedConvolution(_Convolution):
    """pytorchcv's ``XConv2d``: leaves most of its input channels out."""

    def weight(self, conv):
        return conv.weight.mul(conv.mask)


class _SpectralConvolution(_Convolution):
    """MMagic's ``SNConv2d``: its weight has a spectral norm of 1."""

    def weight(self, conv):
        return conv.sn_weight()


class _SpectralLinear(_Linear):
    """MMagic's ``SNLinear``."""

    weight = _SpectralConvolution.weight


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


# Types of other packages are named, not imported: mmtune works without.
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
    'mmagic.models.editors.biggan.biggan_snmodule.SNConv2d':
    _SpectralConvolution(),
    'mmagic.models.editors.biggan.biggan_snmodule.SNLinear':
    _SpectralLinear(),
    'pytorchcv.models.xdensenet.XConv2d': _MaskedConvolution(),
    'mmcv.ops.deform_conv.DeformConv2d': _DeformableConvolution(),
    'mmcv.ops.deform_conv.DeformConv2dPack': _DeformableConvolution(),
    'mmcv.ops.modulated_deform_conv.ModulatedDeformConv2d': ConvKind(),
    'mmcv.ops.modulated_deform_conv.ModulatedDeformConv2dPack': ConvKind(),
}

_OWN_FORWARD = _OwnForward()


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
    """Whether a module is a convolution that may be folded."""
    kind = conv_kind(type(module))
    return kind is not None and (not kind.needs_map or convolves(module))


def looks_like_conv(module: nn.Module) -> bool:
    """Whether a module is some convolution, be it of a known kind or not."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return True
    # Not `module.weight`: asking for it may make it anew.
    return 'conv' in type(module).__name__.lower() and (
        'weight' in module._parameters or 'weight' in vars(module)
        or hasattr(type(module), 'weight'))
