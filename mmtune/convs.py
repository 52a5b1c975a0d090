"""What each kind of convolution is to the fold.

``CONV_KINDS`` maps the name of a type to its :class:`ConvKind`. A convolution
whose type is not in it, or that computes its output by code of its own, is
never folded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtune.functional import ConvArgs

__all__ = ['CONV_KINDS', 'ConvKind', 'conv_kind']


class ConvKind:
    """Convolutions that compute ``weight * x + bias`` (``nn.Conv{1,2,3}d``).

    Every method takes the module, whose ``weight`` has the shape
    (out_channels, in_channels / groups, *kernel_size).
    """

    @staticmethod
    def run(conv: nn.Module, x: Tensor, weight: Tensor,
            bias: Tensor | None) -> Tensor:
        """Run the convolution as its own module would.

        Args:
            conv (nn.Module): Gives the geometry.
            x (Tensor): Shape (batch, in_channels, ...).
            weight (Tensor): Used in place of ``conv.weight``.
            bias (Tensor, optional): Used in place of ``conv.bias``.

        Returns:
            Tensor: Shape (batch, out_channels, ...).
        """
        return conv._conv_forward(x, weight, bias)

    @staticmethod
    def geometry(conv: nn.Module, x: Tensor) -> tuple[Tensor, ConvArgs]:
        """Give what ``torch.convolution`` needs to run this convolution.

        Args:
            conv (nn.Module): The convolution.
            x (Tensor): Its input, shape (batch, in_channels, ...).

        Returns:
            tuple[Tensor, ConvArgs]: The input, padded where the padding is
            not with zeros or not symmetric, and the geometry.
        """
        padding = conv.padding
        if conv.padding_mode != 'zeros':
            x = F.pad(x, conv._reversed_padding_repeated_twice,
                      conv.padding_mode)
            padding = (0, ) * len(conv.stride)
        elif padding == 'valid':
            padding = (0, ) * len(conv.stride)
        elif padding == 'same':
            total = [
                d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)
            ]
            if any(t % 2 for t in total):
                x = F.pad(x, conv._reversed_padding_repeated_twice)
                total = [0] * len(total)
            padding = tuple(t // 2 for t in total)
        return x, ConvArgs(conv.stride, padding, conv.dilation, False,
                           conv.output_padding, conv.groups)


# Types of mmcv are named, not imported: mmtune works without mmcv.
CONV_KINDS: dict[str, ConvKind] = {
    'torch.nn.modules.conv.Conv1d': ConvKind(),
    'torch.nn.modules.conv.Conv2d': ConvKind(),
    'torch.nn.modules.conv.Conv3d': ConvKind(),
    'mmcv.cnn.bricks.wrappers.Conv2d': ConvKind(),
    'mmcv.cnn.bricks.wrappers.Conv3d': ConvKind(),
}


def conv_kind(conv_type: type) -> ConvKind | None:
    """Look up the kind of a convolution.

    A subclass counts as the nearest known type that it derives from as long
    as it runs that type's code, unchanged.

    Args:
        conv_type (type): Class of the module.

    Returns:
        ConvKind | None: None for anything that must run as it is.
    """
    for known in conv_type.__mro__:
        kind = CONV_KINDS.get(f'{known.__module__}.{known.__qualname__}')
        if kind is not None:
            same_code = all(
                getattr(conv_type, name, None) is getattr(known, name, None)
                for name in ('__call__', 'forward', '_conv_forward'))
            return kind if same_code else None
    return None


def looks_like_conv(module: nn.Module) -> bool:
    """Whether a module is some convolution, be it of a known kind or not."""
    return isinstance(module, nn.modules.conv._ConvNd) or (
        'conv' in type(module).__name__.lower()
        and isinstance(getattr(module, 'weight', None), torch.Tensor))
