"""What is done with a weight: a convolution by its geometry, or a product."""
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    'Convolution', 'LinearMap', 'Product', 'geometry_of', 'per_dimension',
    'positive'
]


class Convolution(NamedTuple):
    """A convolution by its geometry, in the order of ``torch.convolution``.

    One number may stand for all dimensions, as ``F.conv2d`` takes it.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def expanded(self, dims: int) -> 'Convolution':
        """Give the same with one number for each dimension.

        Args:
            dims (int): How many there are.

        Returns:
            Convolution: One that the other methods take.
        """
        given = self.stride, self.padding, self.dilation, self.output_padding
        settings = [
            tuple(value) if isinstance(value, (tuple, list)) else (value, )
            for value in given
        ]
        stride, padding, dilation, output_padding = (
            value * dims if len(value) == 1 else value for value in settings)
        return Convolution(stride, padding, dilation, self.transposed,
                           output_padding, self.groups)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Convolve.

        Args:
            x (Tensor): Shape (batch, in_channels, ...).
            weight (Tensor): Of the shape that ``torch.convolution`` asks for.
            bias (Tensor): Shape (out_channels,).

        Returns:
            Tensor: Shape (batch, out_channels, ...).
        """
        return torch.convolution(x, weight, bias, *self)

    def gradients(self, grad_output: Tensor, x: Tensor, weight: Tensor,
                  needs_x: bool) -> tuple[Tensor | None, Tensor]:
        """Give the gradients of the input, where it is needed, and weight."""
        return torch.ops.aten.convolution_backward(grad_output, x, weight,
                                                   None, *self,
                                                   (needs_x, True, False))[:2]

    def input_gradient(self, grad_output: Tensor, weight: Tensor,
                       input_shape: torch.Size) -> Tensor:
        """Give the gradient of the input, which does not need the input.

        Written as the transposed convolution that it is, since
        ``aten.convolution_backward`` asks for the input itself.
        """
        if self.transposed:
            output_padding = (0, ) * len(self.stride)
        else:
            output_padding = tuple(
                size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
                for size, out, s, p, d, k in zip(
                    input_shape[2:], grad_output.shape[2:], self.stride,
                    self.padding, self.dilation, weight.shape[2:]))
        gradient = torch.convolution(grad_output, weight, None, self.stride,
                                     self.padding, self.dilation,
                                     not self.transposed, output_padding,
                                     self.groups)
        if gradient.shape == input_shape:
            return gradient
        # An output padding of a stride or more gives positions beyond those
        # of the input. Copied, to lie as densely as torch's own gradient.
        inside = [slice(size) for size in input_shape[2:]]
        return gradient[(..., *inside)].clone()


class Product:
    """``x @ weight.T + bias``, what a linear layer computes of a matrix.

    The methods are those of :class:`Convolution`, for ``x`` of shape
    (batch, in_features) and ``weight`` of (out_features, in_features).
    """

    def expanded(self, dims: int) -> 'Product':
        """See :meth:`Convolution.expanded`."""
        return self

    def run(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Multiply and add."""
        return torch.addmm(bias, x, weight.t())

    def gradients(self, grad_output: Tensor, x: Tensor, weight: Tensor,
                  needs_x: bool) -> tuple[Tensor | None, Tensor]:
        """See :meth:`Convolution.gradients`."""
        # In which order decides the strides of the result: as torch's own.
        if weight.stride() == (weight.size(1), 1):
            grad_weight = grad_output.t().mm(x)
        else:
            grad_weight = x.t().mm(grad_output).t()
        return grad_output.mm(weight) if needs_x else None, grad_weight

    def input_gradient(self, grad_output: Tensor, weight: Tensor,
                       input_shape: torch.Size) -> Tensor:
        """See :meth:`Convolution.input_gradient`."""
        return grad_output.mm(weight)


LinearMap = Convolution | Product


def per_dimension(setting: Any, dimensions: int) -> tuple[int, ...]:
    """Write a setting as torch takes it, one number for all or for each.

    Args:
        setting (int | Sequence[int]): What a layer has, as its ``stride``.
        dimensions (int): How many the layer convolves over.

    Returns:
        tuple[int, ...]: As many numbers.
    """
    if type(setting) is tuple and len(setting) == dimensions:
        return setting
    numbers = (setting, ) if isinstance(setting, int) else tuple(setting)
    return numbers * dimensions if len(numbers) == 1 else numbers


def positive(*shape: int) -> tuple[int, ...] | None:
    """Give a shape, or None where a convolution would not give it."""
    return shape if all(size > 0 for size in shape) else None


def geometry_of(conv: nn.Module, padding: Any, transposed: bool,
                output_padding: Any) -> Convolution:
    """Read the geometry of a convolution off its attributes.

    Args:
        conv (nn.Module): With the attributes of ``nn.Conv2d``.
        padding (int | Sequence[int]): In the place of its own.
        transposed (bool): Whether it is a transposed one.
        output_padding (int | Sequence[int]): In the place of its own.

    Returns:
        Convolution: With a number for each dimension.
    """
    dimensions = len(conv.kernel_size)
    return Convolution(
        per_dimension(conv.stride, dimensions),
        per_dimension(padding, dimensions),
        per_dimension(conv.dilation, dimensions), transposed,
        per_dimension(output_padding, dimensions), conv.groups)
