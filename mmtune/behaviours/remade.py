"""A call of an activation, and what is made anew of it in backward.

The stock activation has run, so that outputs, nodes and the order of
gradients are stock's; and autograd itself joins what is unpacked to the graph.
"""
import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mmtune.behaviours.calls import autocast_dtype
from mmtune.utils.attach import bare_copy

__all__ = ['Call', 'Piece', 'Reader', 'add_spared', 'call_that_gave',
           'check_version', 'same', 'spared']

# By the id of an output that is alive, the call that gave it.
_CALLS: weakref.WeakValueDictionary[int, 'Call'] = (
    weakref.WeakValueDictionary())
# Bytes that stock would have kept since the process began.
_SPARED = [0]


def spared() -> int:
    """Bytes that were not kept since the process began."""
    return _SPARED[0]


def add_spared(n_bytes: int) -> None:
    """Count bytes that are not kept."""
    _SPARED[0] += n_bytes


def check_version(tensor: Tensor, version: int) -> None:
    """Raise what autograd raises, which has no eye on packed tensors."""
    if tensor._version != version:
        raise RuntimeError(
            'one of the variables needed for gradient computation has been '
            'modified by an inplace operation: '
            f'[{tensor.type()} {list(tensor.shape)}] is at version '
            f'{tensor._version}; expected version {version} instead')


class Piece:
    """A tensor that an activation's own nodes keep.

    Attributes:
        call (Call): The activation's call, where it can make its output
            anew; else None.
        index (int): The how manieth it is.
        kept (Tensor, optional): What is kept; None where it is made anew.
        version (int): Of the tensor.
        computed (bool): Whether it follows from the input.
    """

    __slots__ = ('call', 'computed', 'index', 'kept', 'version')

    def __init__(self, index: int, tensor: Tensor) -> None:
        self.call: Any = None
        self.index = index
        self.computed = not tensor.is_leaf
        self.kept: Any = tensor.detach() if self.computed else tensor
        self.version = tensor._version


class Reader:
    """The output of an activation, or a view of it, kept by a reader."""

    __slots__ = ('call', 'view')

    def __init__(self, call: 'Call', view: tuple | None) -> None:
        self.call = call
        self.view = view


class Call:
    """One call of an activation, and how to make its output anew.

    What its nodes keep holds it, and so does what a reader keeps: it goes
    when the graph does.

    Args:
        scope (Scope): Where it runs.
        module (nn.Module): The activation.
        x (Tensor): What it is called with.
        remake (Callable): Gives the output anew for the module and its
            input.
    """

    def __init__(self, scope: Any, module: nn.Module, x: Tensor,
                 remake: Callable[[nn.Module, Tensor], Tensor]) -> None:
        self.remake = remake
        self.scope = scope
        self.module: Any = module
        self.x: Any = x
        self.version = x._version
        self.pieces: list[Piece] = []
        self.autocast = autocast_dtype(x.device.type)
        # What was made anew: the output, and what the nodes keep in stock.
        self.output: Tensor | None = None
        self.saved: list[Tensor] = []

    def collect(self, tensor: Tensor) -> Piece:
        """Take a tensor that the activation's own nodes keep."""
        piece = Piece(len(self.pieces), tensor)
        self.pieces.append(piece)
        return piece

    def finish(self, output: Any) -> bool:
        """Drop what can be made anew.

        Args:
            output: What the activation returned.

        Returns:
            bool: Whether its output and what its nodes keep are made anew in
            backward; else they are kept as in stock.
        """
        self.scope.call = None
        module, x, pieces = self.module, self.x, self.pieces
        # They would keep the graph alive, which holds the call.
        self.module, self.x, self.pieces = None, None, []
        source = None
        if _is_result(output):
            source = self._source(x, pieces, output)
        for piece in pieces:
            if (source is not None and piece.computed
                    and piece.kept.data_ptr() != source.data_ptr()):
                add_spared(piece.kept.nbytes)
                piece.kept = None
            else:
                piece.kept = self.scope.keep(piece.kept)
        if source is None:
            return False
        for piece in pieces:
            piece.call = self
        self.drops = any(piece.kept is None for piece in pieces)
        self.y, self.version = self.scope.keep(source), source._version
        # What it is set to now, later may be another thing.
        self.layer: Any = bare_copy(module)
        if output is x:
            vars(self.layer)['inplace'] = False
        self.output_ref = weakref.ref(output)
        self.output_version = output._version
        self.token: Tensor | None = None
        _CALLS[id(output)] = self
        return True

    def _source(self, x: Tensor, pieces: list[Piece],
                output: Tensor) -> Tensor | None:
        """The input as it was, where it is still there."""
        if output is not x:
            is_there = (x._version == self.version
                        and output.data_ptr() != x.data_ptr())
            return x.detach() if is_there and pieces else None
        # Autograd has cloned the input, or needs the output alone.
        kept = pieces[0].kept if len(pieces) == 1 else x
        if (kept.data_ptr() != x.data_ptr() and kept.dtype == x.dtype
                and kept.shape == x.shape and kept.stride() == x.stride()):
            return kept
        return None

    def reader(self, tensor: Tensor) -> Reader | None:
        """Note that somebody keeps the output, or a view of it.

        Args:
            tensor (Tensor): What would be kept.

        Returns:
            Reader | None: None where it is not what the activation gave.
        """
        output = self.output_ref()
        if (output is None
                or tensor is not output and tensor._base is not output
                or tensor._version != self.output_version
                or tensor.dtype != output.dtype or tensor.is_conj()
                or tensor.is_neg()):
            return None
        if self.token is None:
            # Counts the versions of the output, without its memory.
            self.token = output.detach()
            self.token.data = output.new_empty(0)
            add_spared(output.nbytes)
        if tensor is output:
            return Reader(self, None)
        return Reader(self, (tensor.shape, tensor.stride(),
                              tensor.storage_offset()
                              - output.storage_offset()))

    def made_output(self, view: tuple | None) -> Tensor:
        """The output, made once for all who read it in a backward."""
        assert self.token is not None, 'made for the first reader'
        check_version(self.token, self.output_version)
        output = self.output
        if output is None:
            output = self._make()
        if view is None:
            return output
        size, stride, offset = view
        return output.as_strided(size, stride,
                                 output.storage_offset() + offset)

    def made_piece(self, index: int) -> Tensor:
        """What a node of the activation keeps in stock."""
        if not self.saved:
            self._make()
        # Whoever reads the output has had it.
        self.output = None
        return self.saved[index]

    def _make(self) -> Tensor:
        y = self.scope.give(self.y)
        check_version(y, self.version)
        with self._as_then(y.device.type):
            if self.drops:
                self.output, self.saved = _run_and_keep(self.layer, y)
            else:
                with torch.no_grad():
                    self.output = self.remake(self.layer, y)
        if torch._C._current_graph_task_id() != -1:
            # Nothing else would end it where the graph is retained.
            torch.autograd.Variable._execution_engine.queue_callback(
                functools.partial(_forget, weakref.ref(self)))
        return self.output

    def _as_then(self, device_type: str) -> contextlib.AbstractContextManager:
        """Autocast as it was in the forward."""
        if self.autocast == autocast_dtype(device_type):
            return contextlib.nullcontext()
        return torch.autocast(device_type, self.autocast,
                              enabled=self.autocast is not None)


def _run_and_keep(layer: nn.Module, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run an activation, and collect what its nodes keep."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return saved[-1]

    with torch.enable_grad(), saved_tensors_hooks(pack, same):
        output = layer.forward(y.detach().requires_grad_())
    return output.detach(), saved


def call_that_gave(tensor: Tensor) -> Call | None:
    """Look up the call that gave a tensor, or what it is a view of.

    Args:
        tensor (Tensor): What somebody would keep.

    Returns:
        Call | None: None where it is no activation's output.
    """
    base = tensor._base
    return _CALLS.get(id(tensor if base is None else base))


def _forget(reference: weakref.ref) -> None:
    call = reference()
    if call is not None:
        call.output, call.saved = None, []


def same(tensor: Any) -> Any:
    """Keep a tensor as it is."""
    return tensor


def _is_result(output: Any) -> bool:
    """Whether an output is a tensor of its own, with a history."""
    return (type(output) is Tensor and output.grad_fn is not None
            and output.layout == torch.strided and not output._is_view())
