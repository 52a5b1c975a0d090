"""The constants of the fold, as a convolution shows them.

The paper's convolutions carry two buffers, ``weight_coeff`` and
``bias_delta``. Here they are computed from the normalization whenever they
are read, and are no buffers of the model's: whatever pairs buffers by position
or by key would stumble over them.
"""
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from mmtune.functional.fold import norm_coefficients
from mmtune.utils.attach import Override

__all__ = ['CONSTANTS', 'ConvBuffers', 'NamedBuffers']

CONSTANTS = ('weight_coeff', 'bias_delta')


class ConvBuffers(dict):
    """The buffers of a convolution, which answer for two more by name.

    Args:
        buffers (dict): What the convolution has.
        conv_state (ConvState): Knows the normalization.
    """

    def __init__(self, buffers: dict, conv_state: Any) -> None:
        super().__init__(buffers)
        self.conv_state = conv_state

    def __contains__(self, name: Any) -> bool:
        return super().__contains__(name) or (
            name in CONSTANTS and self._constants() is not None)

    def __setitem__(self, name: str, value: Any) -> None:
        # What is computed cannot be set, as by code that moves all buffers.
        if name not in CONSTANTS:
            super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        if name not in CONSTANTS:
            super().__delitem__(name)

    def __missing__(self, name: str) -> Tensor:
        constants = self._constants()
        if name not in CONSTANTS or constants is None:
            raise KeyError(name)
        return constants[CONSTANTS.index(name)]

    def _constants(self) -> tuple[Tensor, Tensor] | None:
        state = self.conv_state
        _, _, mean, var = state.norm_kind.tensors(state.norm)
        if (mean is None or var is None or is_lazy(mean)
                or state.coeff_shape is None):
            return None
        with torch.no_grad():
            rstd, bias_delta = norm_coefficients(
                mean, var, state.norm_kind.eps(state.norm))
        return (rstd.view(state.coeff_shape).to(var.dtype),
                bias_delta.to(mean.dtype))


class NamedBuffers(Override):
    """Lists the two constants of the fold among a convolution's buffers."""

    def __call__(self, prefix: str = '', recurse: bool = True,
                 remove_duplicate: bool = True) -> Iterator:
        """See ``nn.Module.named_buffers``."""
        yield from self.stock(prefix, recurse, remove_duplicate)
        for name in CONSTANTS:
            if name in self.module._buffers:
                yield f'{prefix}.{name}'.lstrip('.'), getattr(
                    self.module, name)
