"""The mathematics of Tune mode on tensors.

A convolution ``Y = w * X + b`` followed by a normalization with fixed
statistics ``Z = (Y - mean) * rstd * gamma + beta`` equals one convolution
``Z = w' * X + b'`` (arXiv 2305.11624, section 3) with::

    coeff = gamma * rstd
    w'    = w * coeff
    b'    = (b - mean) * coeff + beta

and so does any other map that is linear in a weight, channel by channel.
Throughout, ``coeff_shape`` is the shape in which ``coeff`` multiplies the
weight. It says where the weight has its output channels:

- ``(out_channels, 1, ...)``: in the first dimension;
- ``(1, out_channels, 1, ...)``: in the second (transposed convolutions);
- ``(groups, 1, out_channels / groups, 1, ...)``, one dimension more than the
  weight: in the second, for each group of the first.
"""
import enum
from typing import Any

import torch
from torch import Tensor

from mmtune import native
from mmtune.functional.geometry import Convolution, LinearMap
from mmtune.utils.transforms import in_transform

__all__ = [
    'Plan', 'fold', 'fold_and_run', 'fold_and_run_norm', 'native_geometry',
    'native_node', 'needs_gradient', 'norm_coefficients', 'run_folded'
]

# The geometry of a product, as the native node takes it.
_NO_GEOMETRY = ((), (), (), False, (), 1)


class Plan(enum.IntEnum):
    """How the native node runs a block; each gives the same.

    Attributes:
        CHOOSE: By sizes, see ``csrc/fold.cpp``.
        FOLD: Convolve with the folded weight.
        SCALE: Convolve with the weight itself and normalize the output in
            place, in the range and, in the forward, with the bits of Eval.
    """

    CHOOSE = 0
    FOLD = 1
    SCALE = 2


def norm_coefficients(running_mean: Tensor, running_var: Tensor,
                      eps: float) -> tuple[Tensor, Tensor]:
    """Turn running statistics into the two constants of the fold.

    Args:
        running_mean (Tensor): Shape (out_channels,).
        running_var (Tensor): Shape (out_channels,).
        eps (float): Added to the variance.

    Returns:
        tuple[Tensor, Tensor]: ``rstd`` and ``-mean``, both of shape
        (out_channels,) and at least float32: half precision would lose the
        variance.
    """
    if running_var.dtype.itemsize < 4:
        running_mean, running_var = running_mean.float(), running_var.float()
    return (running_var + eps).rsqrt_(), -running_mean


def _scale(bn_weight: Tensor | None, rstd: Tensor) -> Tensor:
    """``coeff``, what multiplies the weight."""
    return rstd if bn_weight is None else rstd * bn_weight


def _shift(bias: Tensor | None, bias_delta: Tensor) -> Tensor:
    """``b - mean``, what the scale multiplies to give the folded bias."""
    return bias_delta if bias is None else bias + bias_delta


def _by_group(weight: Tensor, coeff_shape: tuple[int, ...]) -> Tensor:
    """The weight with the dimensions of what multiplies it."""
    if len(coeff_shape) == weight.dim():
        return weight
    return weight.unflatten(0, (coeff_shape[0], -1))


def _ungrouped(product: Tensor, weight: Tensor) -> Tensor:
    """The inverse of :func:`_by_group`, in the weight's order of dimensions.

    That of the product may be coeff's, in which the groups are outermost.
    """
    if product.dim() == weight.dim():
        return product
    order = sorted(range(weight.dim()), key=weight.stride, reverse=True)
    product = product.reshape(weight.shape).permute(order).contiguous()
    return product.permute([order.index(dim) for dim in range(weight.dim())])


def _fold_weight(weight: Tensor, coeff: Tensor,
                 coeff_shape: tuple[int, ...]) -> Tensor:
    folded = _by_group(weight, coeff_shape) * coeff.view(coeff_shape)
    return _strided_as(_ungrouped(folded, weight), weight.stride())


def _fold_weight_anew(weight: Tensor, coeff: Tensor,
                      coeff_shape: tuple[int, ...]) -> Tensor:
    """:func:`_fold_weight` in backward.

    Where ``torch.compile`` finds an expression of the forward in backward, it
    keeps the result, here the folded weight: it gets the factors swapped.
    """
    if not torch.compiler.is_compiling():
        return _fold_weight(weight, coeff, coeff_shape)
    folded = coeff.view(coeff_shape) * _by_group(weight, coeff_shape)
    return _strided_as(_ungrouped(folded, weight), weight.stride())


def _strided_as(product: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A product with the strides of its factor.

    Those of dimensions of size 1 say nothing of where the elements are, and
    products do not keep them; but from them kernels tell channels_last, by
    which they choose the strides of their results.
    """
    if product.stride() == strides or any(
            one != other and size != 1 for one, other, size in zip(
                product.stride(), strides, product.shape)):
        return product
    return product.as_strided(product.shape, strides)


def fold(weight: Tensor, bias: Tensor | None, bn_weight: Tensor | None,
         bn_bias: Tensor | None, rstd: Tensor, bias_delta: Tensor,
         coeff_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Fold a normalization with fixed statistics into what comes before it.

    Args:
        weight (Tensor): Of the convolution or linear layer.
        bias (Tensor, optional): Of the same, shape (out_channels,).
        bn_weight (Tensor, optional): gamma, shape (out_channels,).
        bn_bias (Tensor, optional): beta, shape (out_channels,).
        rstd (Tensor): From :func:`norm_coefficients`.
        bias_delta (Tensor): From :func:`norm_coefficients`, ``-mean``.
        coeff_shape (tuple[int, ...]): See above.

    Returns:
        tuple[Tensor, Tensor]: The folded weight and bias, in the dtype that
        the inputs promote to (float32 where all are half precision).
    """
    coeff = _scale(bn_weight, rstd)
    shift = _shift(bias, bias_delta)
    folded_weight = _fold_weight(weight, coeff, coeff_shape)
    if bn_bias is None:
        return folded_weight, shift * coeff
    return folded_weight, torch.addcmul(bn_bias, shift, coeff)


def fold_and_run(linear_map: LinearMap, x: Tensor, weight: Tensor,
                 bias: Tensor | None, bn_weight: Tensor | None,
                 bn_bias: Tensor | None, rstd: Tensor, bias_delta: Tensor,
                 coeff_shape: tuple[int, ...]) -> Tensor:
    """Run a convolution and a normalization with fixed statistics as one.

    Equal to the one followed by the other, for the output and for the
    gradients of ``x``, ``weight``, ``bias``, ``bn_weight`` and ``bn_bias``,
    of any order. Backward keeps ``x`` and ``weight``, never the folded
    weight or the convolution's own output; where no gradient depends on
    ``x`` it does not keep ``x`` either.

    Args:
        linear_map (LinearMap): What is done with the weight.
        x (Tensor): Shape (batch, in_channels, ...), padded beforehand where
            the padding is not with zeros. Its dtype is the one that the
            convolution runs in.
        weight (Tensor): See :func:`fold`, as for the next six. The fold
            runs in their dtype, at least float32.
        bias (Tensor, optional): Of the convolution.
        bn_weight (Tensor, optional): gamma.
        bn_bias (Tensor, optional): beta.
        rstd (Tensor): From :func:`norm_coefficients`.
        bias_delta (Tensor): From :func:`norm_coefficients`.
        coeff_shape (tuple[int, ...]): See above.

    Returns:
        Tensor: Shape (batch, out_channels, ...), the dtype of ``x``.
    """
    if needs_gradient(x, weight, bias, bn_weight, bn_bias):
        return _FoldAndRun.apply(x, weight, bias, bn_weight, bn_bias, rstd,
                                 bias_delta, coeff_shape,
                                 linear_map.expanded(weight.dim() - 2))
    folded = fold(weight, bias, bn_weight, bn_bias, rstd, bias_delta,
                  coeff_shape)
    return run_folded(linear_map, x, folded)


# Other types may follow what is done to them, operator by operator.
_PLAIN = (Tensor, torch.nn.Parameter)


def native_node(*tensors: Tensor) -> Any:
    """Give the native node where it may run.

    On a CPU alone, unless ``MMTUNE_NATIVE`` is 1: elsewhere it was never run.
    What traces or transforms needs to see operators of its own.

    Args:
        *tensors (Tensor): Input and weight.

    Returns:
        ModuleType | None: See :func:`mmtune.native.node`.
    """
    if torch.compiler.is_compiling() or in_transform():
        return None
    for tensor in tensors:
        if type(tensor) not in _PLAIN or not (tensor.is_cpu
                                              or native.is_wanted()):
            return None
    return native.node()


def native_geometry(linear_map: LinearMap) -> tuple:
    """Give what the native node takes in the place of a linear map.

    Args:
        linear_map (LinearMap): What is done with the weight.

    Returns:
        tuple: A :class:`Convolution`; of no dimensions for a product.
    """
    return linear_map if isinstance(linear_map, Convolution) else _NO_GEOMETRY


def fold_and_run_norm(linear_map: LinearMap,
                      x: Tensor,
                      weight: Tensor,
                      bias: Tensor | None,
                      bn_weight: Tensor | None,
                      bn_bias: Tensor | None,
                      running_mean: Tensor,
                      running_var: Tensor,
                      eps: float,
                      coeff_shape: tuple[int, ...],
                      plan: Plan = Plan.CHOOSE) -> Tensor:
    """Do what :func:`fold_and_run` does, from the running statistics.

    The whole block is one native node where there is one
    (:mod:`mmtune.native`), and else the one in Python.

    Args:
        linear_map (LinearMap): What is done with the weight.
        x (Tensor): See :func:`fold_and_run`, as for the next four.
        weight (Tensor): Of the convolution or linear layer.
        bias (Tensor, optional): Of the convolution.
        bn_weight (Tensor, optional): gamma.
        bn_bias (Tensor, optional): beta.
        running_mean (Tensor): Shape (out_channels,).
        running_var (Tensor): Shape (out_channels,).
        eps (float): Added to the variance.
        coeff_shape (tuple[int, ...]): See above.
        plan (Plan): How the native node is to run it; the one in Python
            always folds.

    Returns:
        Tensor: Shape (batch, out_channels, ...), the dtype of ``x``.

    Raises:
        ValueError: If a vector does not have one number for each channel.
    """
    node = native_node(x, weight)
    if node is not None:
        return node.fold_and_run(x, weight, bias, bn_weight, bn_bias,
                                 running_mean, running_var, eps,
                                 *native_geometry(linear_map), plan)
    coefficients = norm_coefficients(running_mean, running_var, eps)
    return fold_and_run(linear_map, x, weight, bias, bn_weight, bn_bias,
                        *coefficients, coeff_shape)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done to the tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def run_folded(linear_map: LinearMap, x: Tensor,
               folded: tuple[Tensor, Tensor]) -> Tensor:
    """Run a convolution with what :func:`fold` returns.

    Args:
        linear_map (LinearMap): What is done with the weight.
        x (Tensor): Shape (batch, in_channels, ...).
        folded (tuple[Tensor, Tensor]): Weight and bias, of any dtype.

    Returns:
        Tensor: Shape (batch, out_channels, ...), the dtype of ``x``.
    """
    weight, bias = folded
    linear_map = linear_map.expanded(weight.dim() - 2)
    return linear_map.run(x, weight.to(x.dtype), bias.to(x.dtype))


class _FoldAndRun(torch.autograd.Function):
    """:func:`fold_and_run` with a backward that folds anew."""

    @staticmethod
    def forward(
            ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None,
            bn_weight: Tensor | None, bn_bias: Tensor | None, rstd: Tensor,
            bias_delta: Tensor, coeff_shape: tuple[int, ...],
            linear_map: LinearMap) -> Tensor:
        _, needs_weight, _, needs_scale, _ = ctx.needs_input_grad[:5]
        ctx.coeff_shape, ctx.linear_map = coeff_shape, linear_map
        ctx.input_shape = x.shape
        ctx.bn_bias_dtype = None if bn_bias is None else bn_bias.dtype
        ctx.save_for_backward(x if needs_weight or needs_scale else None,
                              weight, bias, bn_weight, rstd, bias_delta)
        folded = fold(weight, bias, bn_weight, bn_bias, rstd, bias_delta,
                      coeff_shape)
        return run_folded(linear_map, x, folded)

    @staticmethod
    def backward(
            ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, bn_weight, rstd, bias_delta = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_scale, needs_shift = \
            ctx.needs_input_grad[:5]
        coeff_shape = ctx.coeff_shape
        coeff = _scale(bn_weight, rstd)
        folded_weight = _fold_weight_anew(weight, coeff, coeff_shape).to(
            grad_output.dtype)

        # The gradients that a plain convolution with the folded weight has;
        # those of the folded tensors still lack the chain through the fold.
        grad_x = grad_folded_weight = None
        grad_folded_bias: Any = None
        if x is not None:
            grad_x, grad_folded_weight = ctx.linear_map.gradients(
                grad_output, x, folded_weight, needs_x)
            grad_folded_weight = grad_folded_weight.to(coeff.dtype)
            strides = grad_folded_weight.stride()
            grad_folded_weight = _by_group(grad_folded_weight, coeff_shape)
        elif needs_x:
            grad_x = ctx.linear_map.input_gradient(grad_output, folded_weight,
                                                   ctx.input_shape)
        # Else its memory would be held through the rest, at the peak.
        del folded_weight
        if needs_bias or needs_scale or needs_shift:
            # The convolution's kernel would sum less exactly.
            grad_folded_bias = grad_output.sum(
                (0, *range(2, grad_output.dim())), dtype=coeff.dtype)

        grad_weight = grad_bias = grad_scale = grad_shift = None
        if needs_scale:
            # sum(dZ * Y) = <w, dw'>: the reason why Y need not be kept.
            product = grad_folded_weight * _by_group(weight, coeff_shape)
            dot = product.sum_to_size(coeff_shape).view(-1)
            del product
            grad_coeff = torch.addcmul(dot, grad_folded_bias,
                                       _shift(bias, bias_delta))
            grad_scale = (grad_coeff * rstd).to(bn_weight.dtype)
        if needs_weight:
            # In place it takes half the time; a second derivative needs both.
            multiply = torch.mul if torch.is_grad_enabled() else Tensor.mul_
            grad_weight = multiply(grad_folded_weight,
                                   coeff.view(coeff_shape))
            grad_weight = _strided_as(
                grad_weight.view_as(weight), strides).to(weight.dtype)
        if needs_bias:
            grad_bias = (grad_folded_bias * coeff).to(bias.dtype)
        if needs_shift:
            grad_shift = grad_folded_bias.to(ctx.bn_bias_dtype)
        return (grad_x, grad_weight, grad_bias, grad_scale, grad_shift, None,
                None, None, None)
