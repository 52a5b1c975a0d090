"""The mathematics of Tune mode on tensors.

A convolution ``Y = w * X + b`` followed by a normalization with fixed
statistics ``Z = (Y - mean) * rstd * gamma + beta`` equals one convolution
``Z = w' * X + b'`` (arXiv 2305.11624, section 3) with::

    coeff = gamma * rstd
    w'    = w * coeff
    b'    = (b - mean) * coeff + beta

Throughout, ``weight_coeff`` is ``rstd`` shaped to multiply the weight and
``bias_delta`` is ``-mean``; their shapes are ``(out_channels, 1, ...)`` and
``(out_channels,)``.
"""
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    'ConvArgs', 'convolve', 'fold', 'fold_and_convolve', 'norm_coefficients'
]


class ConvArgs(NamedTuple):
    """Geometry of a convolution, in the order of ``torch.convolution``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def norm_coefficients(running_mean: Tensor, running_var: Tensor, eps: float,
                      weight_dim: int) -> tuple[Tensor, Tensor]:
    """Turn running statistics into the two constants of the fold.

    Args:
        running_mean (Tensor): Shape (out_channels,).
        running_var (Tensor): Shape (out_channels,).
        eps (float): Added to the variance.
        weight_dim (int): Number of dimensions of the convolution's weight.

    Returns:
        tuple[Tensor, Tensor]: ``weight_coeff`` of shape
        (out_channels, 1, ...) and ``bias_delta`` of shape (out_channels,),
        both at least float32: half precision would lose the variance.
    """
    dtype = torch.promote_types(running_var.dtype, torch.float32)
    weight_coeff = (running_var.to(dtype) + eps).rsqrt()
    weight_coeff = weight_coeff.view(-1, *[1] * (weight_dim - 1))
    return weight_coeff, -running_mean.to(dtype)


def _scale(bn_weight: Tensor | None, weight_coeff: Tensor) -> Tensor:
    """``gamma * rstd``, shaped to multiply the weight."""
    if bn_weight is None:
        return weight_coeff
    return weight_coeff * bn_weight.view_as(weight_coeff)


def _shift(bias: Tensor | None, bias_delta: Tensor) -> Tensor:
    """``b - mean``, what the scale multiplies to give the folded bias."""
    return bias_delta if bias is None else bias + bias_delta


def fold(weight: Tensor, bias: Tensor | None, bn_weight: Tensor | None,
         bn_bias: Tensor | None, weight_coeff: Tensor,
         bias_delta: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a normalization with fixed statistics into a convolution.

    Args:
        weight (Tensor): Of the convolution, shape
            (out_channels, in_channels / groups, *kernel_size).
        bias (Tensor, optional): Of the convolution, shape (out_channels,).
        bn_weight (Tensor, optional): gamma, shape (out_channels,).
        bn_bias (Tensor, optional): beta, shape (out_channels,).
        weight_coeff (Tensor): From :func:`norm_coefficients`.
        bias_delta (Tensor): From :func:`norm_coefficients`.

    Returns:
        tuple[Tensor, Tensor]: The folded weight and bias, in the dtype that
        the inputs promote to (float32 where all are half precision).
    """
    coeff = _scale(bn_weight, weight_coeff)
    shift = _shift(bias, bias_delta)
    if bn_bias is None:
        return weight * coeff, shift * coeff.view(-1)
    return weight * coeff, torch.addcmul(bn_bias, shift, coeff.view(-1))


def fold_and_convolve(x: Tensor, weight: Tensor, bias: Tensor | None,
                      bn_weight: Tensor | None, bn_bias: Tensor | None,
                      weight_coeff: Tensor, bias_delta: Tensor,
                      conv_args: ConvArgs) -> Tensor:
    """Run a Conv+BN block with fixed statistics as one convolution.

    Equal to the convolution followed by the normalization, for the output
    and for the gradients of ``x``, ``weight``, ``bias``, ``bn_weight`` and
    ``bn_bias``, of any order. Backward keeps ``x`` and ``weight``, never the
    folded weight or the convolution's own output; where no gradient depends
    on ``x`` it does not keep ``x`` either.

    Args:
        x (Tensor): Shape (batch, in_channels, ...), padded beforehand where
            the padding is not with zeros. Its dtype is the one that the
            convolution runs in.
        weight (Tensor): See :func:`fold`, as for the next five. The fold
            runs in their dtype, at least float32.
        bias (Tensor, optional): Of the convolution.
        bn_weight (Tensor, optional): gamma.
        bn_bias (Tensor, optional): beta.
        weight_coeff (Tensor): From :func:`norm_coefficients`.
        bias_delta (Tensor): From :func:`norm_coefficients`.
        conv_args (ConvArgs): Geometry of the convolution.

    Returns:
        Tensor: Shape (batch, out_channels, ...), the dtype of ``x``.
    """
    if needs_gradient(x, weight, bias, bn_weight, bn_bias):
        return _FoldAndConvolve.apply(x, weight, bias, bn_weight, bn_bias,
                                      weight_coeff, bias_delta, conv_args)
    return convolve(
        x, fold(weight, bias, bn_weight, bn_bias, weight_coeff, bias_delta),
        conv_args)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done to the tensors."""
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors)


def convolve(x: Tensor, folded: tuple[Tensor, Tensor],
             conv_args: ConvArgs) -> Tensor:
    """Run a convolution with what :func:`fold` returns.

    Args:
        x (Tensor): Shape (batch, in_channels, ...).
        folded (tuple[Tensor, Tensor]): Weight and bias, of any dtype.
        conv_args (ConvArgs): Geometry of the convolution.

    Returns:
        Tensor: Shape (batch, out_channels, ...), the dtype of ``x``.
    """
    weight, bias = folded
    return torch.convolution(x, weight.to(x.dtype), bias.to(x.dtype),
                             *conv_args)


class _FoldAndConvolve(torch.autograd.Function):
    """:func:`fold_and_convolve` with a backward that folds anew."""

    @staticmethod
    def forward(
            x: Tensor, weight: Tensor, bias: Tensor | None,
            bn_weight: Tensor | None, bn_bias: Tensor | None,
            weight_coeff: Tensor, bias_delta: Tensor,
            conv_args: ConvArgs) -> Tensor:
        folded = fold(weight, bias, bn_weight, bn_bias, weight_coeff,
                      bias_delta)
        return convolve(x, folded, conv_args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, bias, bn_weight, bn_bias, weight_coeff, bias_delta, \
            conv_args = inputs
        _, needs_weight, _, needs_scale, _ = ctx.needs_input_grad[:5]
        ctx.conv_args = conv_args
        ctx.input_shape = x.shape
        ctx.bn_bias_dtype = None if bn_bias is None else bn_bias.dtype
        ctx.save_for_backward(x if needs_weight or needs_scale else None,
                              weight, bias, bn_weight, weight_coeff,
                              bias_delta)

    @staticmethod
    def backward(
            ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, bn_weight, weight_coeff, bias_delta = \
            ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_scale, needs_shift = \
            ctx.needs_input_grad[:5]
        coeff = _scale(bn_weight, weight_coeff)
        folded_weight = (weight * coeff).to(grad_output.dtype)
        needs_sum = needs_bias or needs_scale or needs_shift
        # In half precision the kernel would round the sum.
        kernel_sums = x is not None and grad_output.dtype == coeff.dtype

        # The gradients that a plain convolution with the folded weight has;
        # those of the folded tensors still lack the chain through the fold.
        grad_x = grad_folded_weight = None
        grad_folded_bias: Any = None
        if x is not None:
            grad_x, grad_folded_weight, grad_folded_bias = \
                torch.ops.aten.convolution_backward(
                    grad_output, x, folded_weight, [bias_delta.numel()],
                    *ctx.conv_args, (needs_x, True, needs_sum and kernel_sums))
            grad_folded_weight = grad_folded_weight.to(coeff.dtype)
        elif needs_x:
            grad_x = _input_gradient(grad_output, folded_weight,
                                     ctx.input_shape, ctx.conv_args)
        if needs_sum and not kernel_sums:
            grad_folded_bias = grad_output.sum(
                (0, *range(2, grad_output.dim())), dtype=coeff.dtype)

        grad_weight = grad_bias = grad_scale = grad_shift = None
        if needs_scale:
            # sum(dZ * Y) = <w, dw'>: the reason why Y need not be kept.
            dot = (grad_folded_weight * weight).sum_to_size(
                weight_coeff.shape).view(-1)
            grad_coeff = torch.addcmul(dot, grad_folded_bias,
                                       _shift(bias, bias_delta))
            grad_scale = (grad_coeff * weight_coeff.view(-1)).to(
                bn_weight.dtype)
        if needs_weight:
            # In place it takes half the time; a second derivative needs both.
            multiply = torch.mul if torch.is_grad_enabled() else Tensor.mul_
            grad_weight = multiply(grad_folded_weight, coeff).to(weight.dtype)
        if needs_bias:
            grad_bias = (grad_folded_bias * coeff.view(-1)).to(bias.dtype)
        if needs_shift:
            grad_shift = grad_folded_bias.to(ctx.bn_bias_dtype)
        return (grad_x, grad_weight, grad_bias, grad_scale, grad_shift, None,
                None, None)


def _input_gradient(grad_output: Tensor, weight: Tensor,
                    input_shape: torch.Size, conv_args: ConvArgs) -> Tensor:
    """Gradient of a convolution's input, which does not need the input.

    Written as the transposed convolution that it is, since
    ``aten.convolution_backward`` asks for the input itself.
    """
    stride, padding, dilation, transposed, _, groups = conv_args
    if transposed:
        output_padding = (0, ) * len(stride)
    else:
        output_padding = tuple(
            size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
            for size, out, s, p, d, k in zip(input_shape[2:],
                                             grad_output.shape[2:], stride,
                                             padding, dilation,
                                             weight.shape[2:]))
    return torch.convolution(grad_output, weight, None, stride, padding,
                             dilation, not transposed, output_padding, groups)
