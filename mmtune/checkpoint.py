"""Let ``torch.load(weights_only=True)`` read what MMEngine saves.

Since torch 2.6 it is the default, and refuses the message hub in the
checkpoints of MMEngine 0.10, so that no run could be resumed.
"""
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

__all__ = ['allow_mmengine_checkpoints']


def allow_mmengine_checkpoints() -> None:
    """Add the types in the message hub to those that torch takes for safe.

    These are ``HistoryBuffer`` and numpy's arrays and scalars. A
    ``HistoryBuffer`` refers to its own methods by ``getattr``, which would
    give access to far more; a ``getattr`` that knows these methods alone
    stands in for it. Does nothing before torch 2.6, which needs nothing.
    """
    if not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'):
        return
    array, scalar = np.zeros(1), np.float64(0)
    rebuild_array = array.__reduce__()[0]
    rebuild_scalar = scalar.__reduce__()[0]
    dtypes = {
        type(np.dtype(kind))
        for kind in (np.bool_, np.int32, np.int64, np.float32, np.float64)
    }
    torch.serialization.add_safe_globals([
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        *dtypes,
        # numpy 1 and 2 have different names for the same function.
        (rebuild_array, 'numpy.core.multiarray._reconstruct'),
        (rebuild_array, 'numpy._core.multiarray._reconstruct'),
        (rebuild_scalar, 'numpy.core.multiarray.scalar'),
        (rebuild_scalar, 'numpy._core.multiarray.scalar'),
        (_history_buffer_method, 'builtins.getattr'),
    ])


def _history_buffer_method(owner: Any, name: str) -> Any:
    methods = ('current', 'max', 'mean', 'min')
    if owner is not HistoryBuffer or name not in methods:
        raise ValueError(
            f'A checkpoint asks for {name!r} of {owner!r}, which is not '
            f'among the methods {methods} of HistoryBuffer that mmtune takes '
            'for safe; load it with weights_only=False if you trust it')
    return getattr(HistoryBuffer, name)
