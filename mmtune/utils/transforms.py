"""Whether something follows tensors, operator by operator."""
import torch
from torch.autograd import forward_ad

__all__ = ['in_transform']


def in_transform() -> bool:
    """Whether a torch.func transform, forward mode or a trace is active.

    Returns:
        bool: Of the caller's thread; not to be asked in a compiled forward.
    """
    return (torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or torch._C._get_tracing_state() is not None)
