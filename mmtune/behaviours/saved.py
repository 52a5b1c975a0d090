"""What the forward of a model in Tune mode keeps for backward.

Autograd hands each tensor that it would keep to the innermost saved-tensor
hooks. A :class:`Scope` puts hooks there while a module runs. They keep what
stock keeps, with two exceptions, both of which a
:class:`~mmtune.behaviours.remade.Call` of an activation knows how to make
anew from the activation's input:

- its output, for whoever reads it, be it as a whole or a view;
- what its own nodes keep, where that is not the input (the sigmoid within a
  Swish).
"""
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mmtune.behaviours.blocks import thread
from mmtune.behaviours.remade import (
    Call,
    Piece,
    Reader,
    call_that_gave,
    check_version,
    same,
)
from mmtune.utils.attach import Hook, attach
from mmtune.utils.transforms import in_transform

__all__ = ['Scope', 'attach_scope', 'current_scope', 'observer']

# Missing in old versions of torch, where activations run as stock.
_top_hooks: Callable[[bool], tuple | None] | None = getattr(
    torch._C._autograd, '_top_saved_tensors_default_hooks', None)

# By thread, the scope that is open.
_SCOPES: dict[int, 'Scope'] = {}


def observer(function: Callable) -> Callable:
    """Mark a pack or an unpack hook that changes nothing.

    Scopes go on inside of hooks that only look. Any others, as those of
    ``save_on_cpu`` and of an activation checkpoint, are given what stock
    gives them.
    """
    function._tune_observes = True  # type: ignore[attr-defined]
    return function


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
        self.keep, self.give = outer or (same, same)
        self.hooks = saved_tensors_hooks(self.pack, self.unpack)
        self.hooks.__enter__()

    def pack(self, tensor: Tensor) -> Any:
        """Pack hook: keep a tensor, or how to make it anew."""
        if self.call is not None:
            return self.call.collect(tensor)
        version = tensor._version
        if not tensor.is_leaf:
            call = call_that_gave(tensor)
            reader = None if call is None else call.reader(tensor)
            if reader is not None:
                return reader
            # An output that is kept with its history keeps itself alive.
            tensor = tensor.detach()
        return self.keep(tensor), version

    def unpack(self, kept: Any) -> Tensor:
        """Unpack hook: give a tensor back, or make it."""
        if type(kept) is Reader:
            return kept.call.made_output(kept.view)
        if type(kept) is Piece:
            if kept.kept is None:
                return kept.call.made_piece(kept.index)
            if kept.call is not None:
                # Whoever reads the output has had it.
                kept.call.output = None
            kept = kept.kept, kept.version
        packed, version = kept
        tensor = self.give(packed)
        check_version(tensor, version)
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
            and not in_transform())


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
