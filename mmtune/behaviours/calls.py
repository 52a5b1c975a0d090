"""A convolution as it was when it was called."""
import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmtune import native
from mmtune.layers.kinds import ConvKind, parameter
from mmtune.utils.attach import bare_copy

__all__ = ['PLAIN', 'Call', 'autocast_dtype', 'call_of', 'fingerprints']

# What the forward of a convolution reads beside its parameters.
SETTINGS = ('stride', 'padding', 'dilation', 'groups', 'padding_mode')
# Other types may have no memory, or follow what is done to them.
PLAIN = (Tensor, nn.Parameter)
# Older versions of torch do not tell.
_is_any_autocast_enabled = getattr(
    torch._C, '_is_any_autocast_enabled', lambda: True)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Give the dtype that autocast gives convolutions, None where it is off.

    Args:
        device_type (str): Where they run.
    """
    if not torch.compiler.is_compiling() and not _is_any_autocast_enabled():
        return None
    if (torch.amp.is_autocast_available(device_type)
            and torch.is_autocast_enabled(device_type)):
        return torch.get_autocast_dtype(device_type)
    return None


def fingerprints(*tensors: Tensor | None) -> Any:
    """What tells that tensors were changed: their versions and memory.

    Args:
        *tensors (Tensor, optional): Input, weight and bias of a convolution,
            or what it has in their place.

    Returns:
        To compare with what it was: bytes from the native node, where all
        are plain tensors, or a list with a pair for each, in which None
        stands for what cannot be asked.
    """
    node = native.node()
    if node is not None and len(tensors) == 3 and all(
            [t is None or type(t) in PLAIN for t in tensors]):
        return node.versions(*tensors)
    return [_fingerprint(t) for t in tensors]


def _fingerprint(tensor: Any) -> tuple[int | None, int | None]:
    if tensor is None:
        return None, None
    if type(tensor) not in PLAIN:
        return getattr(tensor, '_version', None), None
    try:
        return tensor._version, tensor.data_ptr()
    except RuntimeError:  # inference tensors count no versions
        return None, tensor.data_ptr()


class Call(NamedTuple):
    """A convolution as it was when it was called.

    Attributes:
        name (str): Name of the convolution, for errors.
        conv (nn.Module): The convolution.
        kind (ConvKind): Kind of the convolution.
        weight (Tensor): Of the shape that the kind says.
        bias (Tensor, optional): Shape (out_channels,).
        settings (tuple): Of the convolution, in the order of ``SETTINGS``.
        context (tuple[bool, torch.dtype | None]): Whether gradients were on,
            and what autocast gave convolutions.
    """

    name: str
    conv: nn.Module
    kind: ConvKind
    weight: Tensor
    bias: Tensor | None
    settings: tuple
    context: tuple[bool, torch.dtype | None]

    def context_is_same(self, x: Tensor) -> bool:
        """Whether a convolution of now would run in the same modes."""
        return self.context == _context(x)

    def settings_are_same(self) -> bool:
        """Whether the convolution still has its settings."""
        return self.settings == _settings(self.conv)

    def run(self, inputs: tuple) -> Tensor:
        """Run the convolution as it would have run when it was called.

        Args:
            inputs (tuple): What it was called with.

        Returns:
            Tensor: Shape (batch, out_channels, ...).
        """
        conv = self.conv
        if not self.settings_are_same():
            conv = bare_copy(conv)
            vars(conv).update(zip(SETTINGS, self.settings))
        grad_enabled, dtype = self.context
        with contextlib.ExitStack() as stack:
            if grad_enabled != torch.is_grad_enabled():
                stack.enter_context(torch.set_grad_enabled(grad_enabled))
            device_type = inputs[0].device.type
            if dtype != autocast_dtype(device_type):
                stack.enter_context(
                    torch.autocast(
                        device_type,
                        dtype,
                        enabled=dtype is not None))
            return self.kind.run(conv, self.weight, self.bias, *inputs)


def call_of(name: str, conv: nn.Module, kind: ConvKind, x: Tensor) -> Call:
    """Note a convolution as it is now.

    Args:
        name (str): Name of the convolution, for errors.
        conv (nn.Module): The convolution.
        kind (ConvKind): Kind of the convolution.
        x (Tensor): What it was called with.

    Returns:
        Call: What it needs to run later.
    """
    return Call(name, conv, kind, kind.weight(conv), parameter(conv, 'bias'),
                _settings(conv), _context(x))


def _context(x: Tensor) -> tuple[bool, torch.dtype | None]:
    return torch.is_grad_enabled(), autocast_dtype(x.device.type)


def _settings(conv: nn.Module) -> tuple:
    own = conv.__dict__
    return tuple([own.get(name) for name in SETTINGS])
