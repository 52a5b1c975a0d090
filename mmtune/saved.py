"""What the forward of a model in Tune mode keeps for backward.

Autograd hands each tensor that it would keep to the innermost saved-tensor
hooks. A :class:`Scope` puts hooks there while a module runs. They keep what
stock keeps, with two exceptions, both of which a :class:`Call` of an
activation knows how to make anew from the activation's input:

- its output, for whoever reads it, be it as a whole or a view;
- what its own nodes keep, where that is not the input (the sigmoid within a
  Swish).

The stock activation has run, so that outputs, nodes and the order of
gradients are stock's; and autograd itself joins what is unpacked to the graph.
"""
import contextlib
import functools
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from mmtune.attach import Hook, attach, bare_copy
from mmtune.runs import thread

__all__ = [
    'Call', 'Scope', 'add_spared', 'attach_scope', 'current_scope',
    'observer', 'spared'
]

# Missing in old versions of torch, where activations run as stock.
_top_hooks: Callable[[bool], tuple | None] | None = getattr(
    torch._C._autograd, '_top_saved_tensors_default_hooks', None)

# By thread, the scope that is open.
_SCOPES: dict[int, 'Scope'] = {}
# By the id of an output that is alive, the call that gave it.
_CALLS: weakref.WeakValueDictionary[int, 'Call'] = (
    weakref.WeakValueDictionary())
# Bytes that stock would have kept since the process began.
_SPARED = [0]


def observer(function: Callable) -> Callable:
    """Mark a pack or an unpack hook that changes nothing.

    Scopes go on inside of hooks that only look. Any others, as those of
    ``save_on_cpu`` and of an activation checkpoint, are given what stock
    gives them.
    """
    function._tune_observes = True  # type: ignore[attr-defined]
    return function


def spared() -> int:
    """Bytes that were not kept since the process began."""
    return _SPARED[0]


def add_spared(n_bytes: int) -> None:
    """Count bytes that are not kept."""
    _SPARED[0] += n_bytes


def _check_version(tensor: Tensor, version: int) -> None:
    """Raise what autograd raises, which has no eye on packed tensors."""
    if tensor._version != version:
        raise RuntimeError(
            'one of the variables needed for gradient computation has been '
            'modified by an inplace operation: '
            f'[{tensor.type()} {list(tensor.shape)}] is at version '
            f'{tensor._version}; expected version {version} instead')


# --------------------------------------------------------------------------
# A call of an activation
# --------------------------------------------------------------------------


class _Piece:
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


class _Reader:
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

    def __init__(self, scope: 'Scope', module: nn.Module, x: Tensor,
                 remake: Callable[[nn.Module, Tensor], Tensor]) -> None:
        self.remake = remake
        self.scope = scope
        self.module: Any = module
        self.x: Any = x
        self.version = x._version
        self.pieces: list[_Piece] = []
        self.autocast = _autocast_dtype(x.device.type)
        # What was made anew: the output, and what the nodes keep in stock.
        self.output: Tensor | None = None
        self.saved: list[Tensor] = []

    def collect(self, tensor: Tensor) -> _Piece:
        """Take a tensor that the activation's own nodes keep."""
        piece = _Piece(len(self.pieces), tensor)
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

    def _source(self, x: Tensor, pieces: list[_Piece],
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

    def reader(self, tensor: Tensor) -> _Reader | None:
        """Note that somebody keeps the output, or a view of it.

        Args:
            tensor (Tensor): What would be kept.

        Returns:
            _Reader | None: None where it is not what the activation gave.
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
            return _Reader(self, None)
        return _Reader(self, (tensor.shape, tensor.stride(),
                              tensor.storage_offset()
                              - output.storage_offset()))

    def made_output(self, view: tuple | None) -> Tensor:
        """The output, made once for all who read it in a backward."""
        assert self.token is not None, 'made for the first reader'
        _check_version(self.token, self.output_version)
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
        _check_version(y, self.version)
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
        if self.autocast == _autocast_dtype(device_type):
            return contextlib.nullcontext()
        return torch.autocast(device_type, self.autocast,
                              enabled=self.autocast is not None)


def _run_and_keep(layer: nn.Module, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run an activation, and collect what its nodes keep."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return saved[-1]

    with torch.enable_grad(), saved_tensors_hooks(pack, _same):
        output = layer.forward(y.detach().requires_grad_())
    return output.detach(), saved


def _forget(reference: weakref.ref) -> None:
    call = reference()
    if call is not None:
        call.output, call.saved = None, []


def _same(tensor: Any) -> Any:
    return tensor


def _is_result(output: Any) -> bool:
    """Whether an output is a tensor of its own, with a history."""
    return (type(output) is Tensor and output.grad_fn is not None
            and output.layout == torch.strided and not output._is_view())


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    if not (torch._C._is_any_autocast_enabled()
            and torch.is_autocast_enabled(device_type)):
        return None
    return torch.get_autocast_dtype(device_type)


# --------------------------------------------------------------------------
# The hooks
# --------------------------------------------------------------------------


class Scope:
    """Saved-tensor hooks, while a module runs.

    Attributes:
        module (nn.Module, optional): The outermost module, as long as it
            runs.
        frame (FrameType, optional): Where it was called, as long as it runs.
        depth (int): How many runs of the module itself are under way.
        call (Call, optional): The activation that runs.
        keep (Callable): Takes a tensor and gives what is kept of it.
        give (Callable): The inverse.
    """

    def __init__(self, module: nn.Module, frame: FrameType,
                 outer: tuple | None) -> None:
        self.module: nn.Module | None = module
        self.frame: FrameType | None = frame
        self.depth = 1
        self.call: Call | None = None
        self.keep, self.give = outer or (_same, _same)
        self.hooks = saved_tensors_hooks(self.pack, self.unpack)
        self.hooks.__enter__()

    def pack(self, tensor: Tensor) -> Any:
        """Pack hook: keep a tensor, or how to make it anew."""
        if self.call is not None:
            return self.call.collect(tensor)
        version = tensor._version
        if not tensor.is_leaf:
            base = tensor._base
            call = _CALLS.get(id(tensor if base is None else base))
            reader = None if call is None else call.reader(tensor)
            if reader is not None:
                return reader
            # An output that is kept with its history keeps itself alive.
            tensor = tensor.detach()
        return self.keep(tensor), version

    def unpack(self, kept: Any) -> Tensor:
        """Unpack hook: give a tensor back, or make it."""
        if type(kept) is _Reader:
            return kept.call.made_output(kept.view)
        if type(kept) is _Piece:
            if kept.kept is None:
                return kept.call.made_piece(kept.index)
            if kept.call is not None:
                # Whoever reads the output has had it.
                kept.call.output = None
            kept = kept.kept, kept.version
        packed, version = kept
        tensor = self.give(packed)
        _check_version(tensor, version)
        return tensor

    def is_innermost(self) -> bool:
        """Whether autograd hands tensors to these hooks."""
        hooks = _top_hooks(False) if _top_hooks else None
        return hooks is not None and hooks[0] == self.pack

    def goes_on(self) -> bool:
        """Whether its module runs still, and did not end as by Ctrl-C."""
        caller: FrameType | None = sys._getframe(1)
        while caller is not None and caller is not self.frame:
            caller = caller.f_back
        return caller is not None

    def close(self) -> None:
        """Take the hooks away; what they gave may outlive the module."""
        self.module = self.frame = None
        # Those that the module has entered and left there stay.
        inner = []
        while not self.is_innermost():
            hooks = _top_hooks(False) if _top_hooks else None
            if hooks is None:
                break
            inner.append(hooks)
            torch._C._autograd._pop_saved_tensors_default_hooks()
        else:
            self.hooks.__exit__()
        for hooks in reversed(inner):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)


def current_scope() -> Scope | None:
    """The scope that is open in this thread.

    Returns:
        Scope | None: None as well where others' hooks are in front of it.
    """
    if torch.compiler.is_compiling():
        return None
    found = _SCOPES.get(thread())
    return found if found is not None and found.is_innermost() else None


def _can_open() -> bool:
    return (torch.is_grad_enabled() and _top_hooks is not None
            and torch._C._autograd._saved_tensors_hooks_is_enabled()
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
            and torch._C._get_tracing_state() is None)


@Hook
def enter_scope(module: nn.Module,
                args: tuple,
                kwargs: dict | None = None) -> None:
    """Forward pre-hook of each module with an activation somewhere in it."""
    if torch.compiler.is_compiling() or kwargs is None:
        return
    key = thread()
    found = _SCOPES.get(key)
    if found is not None:
        if found.module is not module:
            return
        if found.goes_on():
            found.depth += 1
            return
        del _SCOPES[key]
        found.close()
    if not _can_open():
        return
    assert _top_hooks is not None, 'asked before'
    outer = _top_hooks(False)
    if outer is None or getattr(outer[0], '_tune_observes', False):
        _SCOPES[key] = Scope(module, sys._getframe(1), outer)


@Hook
def leave_scope(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of each module with an activation somewhere in it."""
    if torch.compiler.is_compiling():
        return
    found = _SCOPES.get(thread())
    if found is None or found.module is not module:
        return
    found.depth -= 1
    if not found.depth:
        del _SCOPES[thread()]
        found.close()


def attach_scope(module: nn.Module) -> None:
    """Make a module open a scope where none is open."""
    attach(module, enter_scope, leave_scope)
