"""Whether a convolution and a normalization may run as one, and that run."""
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmtune.behaviours.calls import Call
from mmtune.functional.fold import (
    fold,
    fold_and_run_norm,
    native_node,
    norm_coefficients,
)
from mmtune.functional.geometry import LinearMap
from mmtune.layers.kinds import NormKind
from mmtune.layers.questions import convolved_dtype

__all__ = ['FoldablePair', 'HalfRange', 'foldable_pair', 'follows',
           'inside_backward']

# How much a folded weight may change before it leaves float16's range, where
# numbers overflow or lose their digits, and how many folds may pass before it
# is looked at again.
HALF_MARGIN = 16
HALF_CHECK_INTERVAL = 64


class HalfRange:
    """Whether float16 can hold a folded weight and bias well.

    On other devices than the CPU, which would have to wait for the answer, it
    is asked now and then: hence the margin.
    """

    def __init__(self) -> None:
        self._fits = True
        self._folds = 0

    def fits(self, pair: 'FoldablePair') -> bool:
        """Whether a folded pair can be held.

        Args:
            pair (FoldablePair): The pair.

        Returns:
            bool: What was found the last time; True in a compiled forward,
            which cannot ask.
        """
        if torch.compiler.is_compiling():
            return True
        # An activation checkpoint has to meet what its forward met.
        if inside_backward():
            return self._fits
        weight = pair.call.weight
        if weight.device.type == 'cpu' or (
                self._folds % HALF_CHECK_INTERVAL == 0):
            with torch.no_grad():
                self._fits = _fits_half(*pair.fold())
        self._folds += 1
        return self._fits


def _fits_half(weight: Tensor, bias: Tensor) -> bool:
    info = torch.finfo(torch.float16)
    low, high = info.tiny * HALF_MARGIN, info.max / HALF_MARGIN
    largest = float(weight.abs().amax())
    return (float(bias.abs().amax()) <= high
            # Zeros are what they are: gamma starts as zero in places.
            and (largest == 0 or low <= largest <= high))


def inside_backward() -> bool:
    """Whether autograd's engine runs the caller."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


class FoldablePair(NamedTuple):
    """A convolution that was called, and the normalization to fold into it.

    Attributes:
        call (Call): The convolution.
        norm (nn.Module): The normalization.
        norm_kind (NormKind): Its kind.
        half_range (HalfRange): Of the normalization.
        tensors (tuple[Tensor | None, ...]): Its weight, bias, running_mean
            and running_var, each of shape (out_channels,) or None.
        eps (float): Added to the variance.
        coeff_shape (tuple[int, ...]): See :mod:`mmtune.functional.fold`.
        dtype (torch.dtype): Of the convolution's output.
        geometry (LinearMap, optional): What is done with the weight; None
            where that depends on the input.
    """

    call: Call
    norm: nn.Module
    norm_kind: NormKind
    half_range: HalfRange
    tensors: tuple[Any, Any, Any, Any]
    eps: float
    coeff_shape: tuple[int, ...]
    dtype: torch.dtype
    geometry: LinearMap | None

    def fold(self) -> tuple[Tensor, Tensor]:
        """Fold the normalization into the convolution's weight and bias."""
        weight, bias, mean, var = self.tensors
        return fold(self.call.weight, self.call.bias, weight, bias,
                    *norm_coefficients(mean, var, self.eps), self.coeff_shape)

    def run(self, inputs: tuple) -> Tensor | None:
        """Run the two as one.

        Args:
            inputs (tuple): What the convolution was called with.

        Returns:
            Tensor | None: Shape (batch, out_channels, ...); None where the
            two have to run apart: float16 cannot hold the fold, say.
        """
        call = self.call
        x, linear_map = inputs[0], self.geometry
        if linear_map is None:
            # What was given is padded, not what is convolved: autocast has
            # some paddings run in float32 whatever they get.
            mapped = call.kind.linear_map(call.conv, *inputs)
            if mapped is not None:
                x, linear_map = mapped
            elif call.kind.needs_map:
                return None
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        # The native node scales such maps, in the range that Eval computes in.
        if x.dtype == torch.float16 and (
                linear_map is None or native_node(x, call.weight) is None
        ) and not self.half_range.fits(self):
            return None
        if linear_map is None:
            return call.kind.run(call.conv, *self.fold(), *inputs)
        return fold_and_run_norm(linear_map, x, call.weight, call.bias,
                                 *self.tensors, self.eps, self.coeff_shape)


def foldable_pair(norm: nn.Module, kind: NormKind, half_range: HalfRange,
                  deferred: Any) -> FoldablePair | None:
    """Pair a promised convolution and the normalization that is given it.

    Args:
        norm (nn.Module): The normalization.
        kind (NormKind): Its kind.
        half_range (HalfRange): Of the normalization.
        deferred (DeferredConv): What it is called with.

    Returns:
        FoldablePair | None: None where the stock modules have to run.
    """
    call, x = deferred.call, deferred.inputs[0]
    tensors: Any = kind.tensors(norm)
    coeff_shape = call.kind.coeff_shape(call.conv, call.weight.shape)
    if (not kind.is_fixed(norm) or not deferred.foldable()
            or not _is_affine(kind, norm, call, x, tensors, coeff_shape)):
        return None
    return FoldablePair(call, norm, kind, half_range, tensors,
                        kind.eps(norm), coeff_shape,
                        convolved_dtype(x, call.context[1]),
                        None if len(deferred.inputs) > 1 else
                        call.kind.geometry(call.conv))


def _is_affine(kind: NormKind, norm: nn.Module, call: Call, x: Tensor,
               tensors: tuple[Any, Any, Any, Any],
               coeff_shape: tuple[int, ...]) -> bool:
    """Whether the stock pair takes this input, as one affine map."""
    *_, mean, var = tensors
    weight, bias, autocast_dtype = call.weight, call.bias, call.context[1]
    if (mean is None or var is None or follows(weight) or follows(bias)
            or not kind.computes_formula(norm, x)):
        return False
    # Without a batch dimension the normalization would take the channels
    # for the batch.
    if x.dim() != weight.dim() or mean.numel() != torch.Size(
            coeff_shape).numel():
        return False
    output_dtype = convolved_dtype(x, autocast_dtype)
    if any(t is not None
           and convolved_dtype(t, autocast_dtype) != output_dtype
           for t in (weight, bias)):
        return False
    norm_dtype = var.dtype
    if any(t is not None and t.dtype != norm_dtype for t in tensors):
        return False
    if norm_dtype != output_dtype and not (
            kind.takes_half and norm_dtype == torch.float32
            and output_dtype.itemsize == 2):
        return False
    kind.check_input(norm, x)
    return True


def follows(tensor: Any) -> bool:
    """Whether a tensor's own type sees what functions do with it."""
    kind = type(tensor)
    return kind is not Tensor and isinstance(tensor, Tensor) and (
        kind.__torch_function__ is not torch._C._disabled_torch_function_impl)
