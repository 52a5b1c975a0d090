"""Count the bytes of a training step, on any device, without noise."""
import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmtune.behaviours.saved import observer

__all__ = [
    'PeakBytes', 'SavedBytes', 'peak_bytes', 'peak_on', 'saved_bytes'
]


class _Saved:
    """Keeps one saved tensor for backward; lives as long as it is kept."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached: with its history, an output would keep itself alive.
        self.tensor = tensor.detach()


class SavedBytes:
    """What autograd keeps for backward, see :func:`saved_bytes`.

    Args:
        model (nn.Module): Its parameters and buffers are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        # The storages themselves: a buffer that the forward replaces would
        # else leave its id to somebody else's.
        self._own = {
            _storage_id(tensor): tensor.untyped_storage()
            for tensor in [*model.parameters(), *model.buffers()]
        }
        self._saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    @property
    def total(self) -> int:
        """Bytes kept at this moment; storages that are shared count once."""
        sizes = {
            _storage_id(saved.tensor): saved.tensor.untyped_storage().nbytes()
            for saved in self._saved
        }
        return sum(size for storage, size in sizes.items()
                   if storage not in self._own)

    @observer
    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._saved.add(saved)
        return saved


@contextlib.contextmanager
def saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what a forward keeps for backward.

    Example:
        >>> with saved_bytes(model) as saved:
        ...     loss = model(x).sum()
        >>> saved.total  # before loss.backward()

    Args:
        model (nn.Module): Its parameters and buffers are not counted, since
            they exist without the forward too.

    Yields:
        SavedBytes: ``total`` is in bytes.
    """
    saved = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(saved._pack,
                                                  lambda kept: kept.tensor):
        yield saved


class PeakBytes(TorchDispatchMode):
    """Allocations under way, see :func:`peak_bytes`.

    Attributes:
        current (int): Bytes of the tensors alive that were created inside.
        peak (int): The most that ``current`` has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self,
                           func: Callable,
                           types: Any,
                           args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = {
            _storage_id(leaf)
            for leaf in tree_leaves((args, kwargs)) if _is_dense(leaf)
        }
        outputs = func(*args, **kwargs)
        for leaf in tree_leaves(outputs):
            if _is_dense(leaf) and _storage_id(leaf) not in inputs:
                self._count(leaf.untyped_storage())
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


@contextlib.contextmanager
def peak_bytes() -> Iterator[PeakBytes]:
    """Follow the tensors that are created inside, and freed again.

    Counts tensors, not what a kernel uses while it runs nor what the
    allocator rounds up, so that the figure is the same on every machine.

    Example:
        >>> with peak_bytes() as memory:
        ...     model(x).sum().backward()
        >>> memory.peak

    Yields:
        PeakBytes: ``peak`` and ``current`` are in bytes.
    """
    with PeakBytes() as tracker:
        yield tracker


@contextlib.contextmanager
def peak_on(device: torch.device) -> Iterator[Callable[[], int]]:
    """Follow what is created inside on a device, on a GPU by its allocator.

    Example:
        >>> with peak_on(x.device) as peak:
        ...     model(x).sum().backward()
        >>> peak()

    Args:
        device (torch.device): Where. The allocator of a GPU starts to look
            for its peak anew.

    Yields:
        Callable[[], int]: Gives the bytes, afterwards.
    """
    if device.type == 'cuda':
        # Else what was left before may be freed inside.
        gc.collect()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with peak_bytes() as memory:
        yield lambda: memory.peak


def _is_dense(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
