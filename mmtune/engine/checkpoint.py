"""Let ``torch.load(weights_only=True)`` read what MMEngine saves.

Since torch 2.6 it is the default, and refuses the message hub in the
checkpoints of MMEngine 0.10, so that no run could be resumed.
"""
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

__all__ = ['allow_mmengine_checkpoints']

# Plain numbers: with any other dtype a file could forge pointers.
DTYPES = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4',
          'f8')
METHODS = ('current', 'max', 'mean', 'min')


def allow_mmengine_checkpoints() -> None:
    """Tell torch how to load the message hub in a checkpoint.

    It holds ``HistoryBuffer``, and numpy's arrays and scalars. numpy's own
    ways of unpickling, and the ``getattr`` by which a ``HistoryBuffer``
    refers to its methods, would give a file far more power than that needs;
    stand-ins that check what they are given take their names. Does nothing
    before torch 2.6, which needs nothing.
    """
    if not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'):
        return
    allowed = [(HistoryBuffer,
                'mmengine.logging.history_buffer.HistoryBuffer'),
               (_Array, 'numpy.ndarray'), (_DType, 'numpy.dtype'),
               (_history_buffer_method, 'builtins.getattr'),
               (_empty_bytes, 'builtins.bytes')]
    # numpy 1 and numpy 2 have different names for the same functions.
    for core in ('numpy.core', 'numpy._core'):
        allowed += [(_empty_array, f'{core}.multiarray._reconstruct'),
                    (_scalar, f'{core}.multiarray.scalar')]
    torch.serialization.add_safe_globals(allowed)


def _refuse(what: str) -> None:
    raise ValueError(
        f'A checkpoint holds {what}, which is not among what mmtune takes '
        'for safe; load it with weights_only=False if you trust it')


class _DType:
    """Stands in for ``numpy.dtype``: knows plain numbers alone."""

    def __init__(self, code: str, *flags: Any) -> None:
        if code not in DTYPES:
            _refuse(f'the dtype {code!r}')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        byte_order = state[1]
        if byte_order not in ('<', '>', '=', '|'):
            _refuse(f'the byte order {byte_order!r}')
        self.dtype = self.dtype.newbyteorder(byte_order)


class _Array(np.ndarray):
    """Stands in for ``numpy.ndarray``: takes as many bytes as it needs.

    Saved again, it is an array of numpy's.
    """

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if type(dtype) is not _DType or type(data) is not bytes:
            _refuse('an array of something else than numbers')
        size = dtype.dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if size != len(data):
            _refuse(f'an array of {len(data)} instead of {size} bytes')
        state = (1, shape, dtype.dtype, bool(fortran), data)
        super().__setstate__(state)

    def __reduce__(self) -> Any:
        return self.view(np.ndarray).__reduce__()


def _empty_array(kind: type, *shape_and_code: Any) -> _Array:
    if kind is not _Array:
        _refuse(f'an array of the type {kind!r}')
    return np.ndarray.__new__(_Array, (0, ))


def _empty_bytes() -> bytes:
    """What torch's pickles call ``bytes`` for: the data of an empty array."""
    return b''


def _scalar(dtype: _DType, data: bytes) -> Any:
    if type(dtype) is not _DType or len(data) != dtype.dtype.itemsize:
        _refuse('a scalar that is not a number')
    return np.frombuffer(data, dtype.dtype)[0]


def _history_buffer_method(owner: Any, name: str) -> Any:
    if owner is not HistoryBuffer or name not in METHODS:
        _refuse(f'a reference to {name!r} of {owner!r}')
    return getattr(HistoryBuffer, name)
