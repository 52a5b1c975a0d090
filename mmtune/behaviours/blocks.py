"""Runs of blocks: where a convolution may wait, and how long.

A block is a module whose forward calls pairs of a convolution and a
normalization. While it runs, and nowhere else, its convolutions may return
promises; when it ends, none is left.
"""
import inspect
import sys
import threading
import warnings
import weakref
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from mmtune import native
from mmtune.behaviours.calls import Call
from mmtune.behaviours.deferred import (
    CompiledDeferredConv,
    defer,
    inside_autograd_function,
    settle,
)
from mmtune.behaviours.known import Memory, entries
from mmtune.utils.attach import (
    BACKWARD_HOOKS,
    HOOKS,
    Hook,
    Override,
    attach,
    has_hooks,
)

__all__ = ['BlockRun', 'BlockState', 'Pair', 'at', 'attach_block', 'runs',
           'thread']


class Pair(NamedTuple):
    """A convolution and the normalization that follows it in one forward.

    Attributes:
        conv (ConvState): State of the convolution.
        norm (NormState): State of the normalization.
        conv_path (tuple[str]): Where the block has the convolution.
        norm_path (tuple[str]): Where the block has the normalization.
        via (tuple[tuple[str]]): Where it has the modules that are given what
            passes between the two, or give it.
    """

    conv: Any
    norm: Any
    conv_path: tuple[str, ...]
    norm_path: tuple[str, ...]
    via: tuple[tuple[str, ...], ...] = ()

    def modules_between(self, block: nn.Module) -> list[nn.Module]:
        """The modules that are given what passes between the two."""
        modules = (at(block, path) for path in self.via)
        return [module for module in modules if module is not None]


def at(module: Any, path: tuple[str, ...]) -> Any:
    """What a module has at a path.

    Args:
        module (nn.Module): Where the path begins.
        path (tuple[str, ...]): Names of children.

    Returns:
        nn.Module | None: None where there is nothing.
    """
    for name in path:
        if module is not None:
            module = module._modules.get(name)
    return module


class BlockState:
    """State of a block.

    Attributes:
        pairs (list[Pair]): What the trace found.
        told (bool): Whether a warning said that layers were replaced.
        known (Memory[nn.Module, Known]): By its convolution, a pair that was
            checked in full.
    """

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self.told = False
        self.known = Memory()
        self._found = Memory()

    def pairs_in(self, block: nn.Module,
                 compiling: bool) -> list[tuple[nn.Module, nn.Module]]:
        """The pairs that a block has now, by the modules that it has now."""
        if compiling:
            return self._find(block)
        node = native.node()
        facts, found = self._found.get('latest', (None, None))
        if (facts and node is not None and facts[0][0] is block._modules
                and node.all_facts_hold(facts)):
            return found
        found = self._find(block)
        self.known.clear()
        self._found['latest'] = self.facts(block), found
        return found

    def facts(self, block: nn.Module) -> tuple:
        """What has to hold for the block to have the pairs that it has."""
        holders = {id(block): block}
        for pair in self.pairs:
            for path in (pair.conv_path, pair.norm_path):
                for end in range(1, len(path)):
                    holder = at(block, path[:end])
                    holders[id(holder)] = holder
        hooks = {
            id(dicts): dicts
            for pair in self.pairs for module in pair.modules_between(block)
            for dicts in (vars(module)[name]
                          for name in (*HOOKS, *BACKWARD_HOOKS))
        }
        return entries(
            *[holder._modules for holder in holders.values()
              if holder is not None], *hooks.values())

    def _find(self, block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        found = []
        for pair in self.pairs:
            conv, norm = at(block, pair.conv_path), at(block, pair.norm_path)
            if (conv is not None and norm is not None
                    and '_tune_conv' in conv.__dict__
                    and '_tune_norm' in norm.__dict__):
                if not (pair.via and _may_be_seen(
                        pair.modules_between(block))):
                    found.append((conv, norm))
            elif not self.told:
                self._tell(pair, conv, norm)
        return found

    def replaced(self, block: nn.Module) -> list[Pair]:
        """The pairs of which a block has another layer now."""
        return [
            pair for pair in self.pairs
            if _is_replaced(at(block, pair.conv_path), pair.conv)
            or _is_replaced(at(block, pair.norm_path), pair.norm)
        ]

    def _tell(self, pair: Pair, conv: Any, norm: Any) -> None:
        for layer, state in ((conv, pair.conv), (norm, pair.norm)):
            if _is_replaced(layer, state):
                self.told = True
                warnings.warn(
                    f'{state.name!r} was replaced after mmtune.turn_on by '
                    f'{type(layer).__name__}, so that its block runs as '
                    'stock; call turn_on again after the last replacement',
                    stacklevel=2)
                return


def _may_be_seen(modules: list[nn.Module]) -> bool:
    """Whether hooks may see what modules are given or give."""
    # torch.compile cannot look at them.
    return torch.compiler.is_compiling() or any(map(has_hooks, modules))


def _is_replaced(layer: Any, state: Any) -> bool:
    """Whether a layer is another than the one that was turned on."""
    # Turned off, it may be the same one still.
    return state.is_on and (layer is None or not (
        '_tune_conv' in vars(layer) or '_tune_norm' in vars(layer)))


COMPILING = 0
# By thread, the innermost run of a block.
_RUNS: dict[int, 'BlockRun'] = {}


def thread() -> int:
    """The current thread, by which runs are told apart.

    Returns:
        int: ``COMPILING`` under ``torch.compile``, which knows one thread.
    """
    # Asked once a hook, since it takes a while, and passed on.
    if torch.compiler.is_compiling():
        return COMPILING
    return threading.get_ident()


class BlockRun:
    """One run of a block's forward, and the promises made in it.

    Args:
        block (nn.Module): The block.
        state (BlockState): State of the block.
        pairs (list[tuple[nn.Module, nn.Module]]): Its convolutions and
            normalizations.
        outer (BlockRun, optional): The run that this one is a part of.
        key (int): The :func:`thread`.
        frame (FrameType, optional): Where it began, to know whether it goes
            on; None under ``torch.compile``.
    """

    __slots__ = ('block', 'error', 'frame', 'inside_function', 'key', 'outer',
                 'pairs', 'promises', 'state')

    def __init__(self, block: nn.Module, state: BlockState, pairs: list,
                 outer: 'BlockRun | None', key: int,
                 frame: FrameType | None = None) -> None:
        self.block = block
        self.state = state
        self.pairs = pairs
        self.outer = outer
        self.key = key
        self.frame = frame
        self.error = self._handled_error()
        self.inside_function = inside_autograd_function()
        # Weak, but under torch.compile, which knows no weak references.
        self.promises: list[Any] = []

    def promise(self, call: Call, inputs: tuple,
                inside_function: bool = False, known: Any = None) -> Any:
        """Promise the output of a convolution called in this run."""
        deferred: Any
        if self.key == COMPILING:
            deferred = CompiledDeferredConv(call, inputs, inside_function)
            self.promises.append(deferred)
        else:
            deferred = defer(call, inputs, inside_function, known)
            deferred.run = self
            self.promises.append(weakref.ref(deferred))
        return deferred

    def goes_on(self) -> bool:
        """Whether the forward did not end without a word, as by Ctrl-C."""
        if self.frame is None:
            return True
        caller: FrameType | None = sys._getframe(1)
        while caller is not None:
            if caller is self.frame:
                return True
            caller = caller.f_back
        return False

    def finish(self, output: Any) -> Any:
        """Let no promise outlive the block, wherever it was put."""
        if not self.promises or self._handled_error() is not self.error:
            return output
        if type(output) is not torch.Tensor:
            # Those of an outer run may go on, to a normalization there.
            output = settle(
                output, None if self.key == COMPILING else self)
        if self.key != COMPILING:
            for reference in self.promises:
                deferred = reference()
                if deferred is not None:
                    deferred.tensor()
        return output


    def _handled_error(self) -> BaseException | None:
        return None if self.key == COMPILING else sys.exc_info()[1]


def runs(key: int) -> BlockRun | None:
    """The innermost run of a block in a thread.

    Args:
        key (int): The :func:`thread` that runs.

    Returns:
        BlockRun | None: Its ``outer`` leads to the others.
    """
    run = _RUNS.get(key)
    while run is not None and not run.goes_on():
        run = run.outer
        _set_innermost(key, run)
    return run


def _set_innermost(key: int, run: BlockRun | None) -> None:
    if run is None:
        _RUNS.pop(key, None)
    else:
        _RUNS[key] = run


def _enter(block: nn.Module, key: int, frame: FrameType | None) -> None:
    state = block._tune_block
    _RUNS[key] = BlockRun(block, state,
                          state.pairs_in(block, key == COMPILING), runs(key),
                          key, frame)


def _leave(block: nn.Module, output: Any) -> Any:
    key = thread()
    run = _RUNS.get(key)
    while run is not None and run.block is not block:
        run = run.outer
    if run is None:
        return output
    _set_innermost(key, run.outer)
    return run.finish(output)


@Hook
def enter_block(block: nn.Module, args: tuple,
                kwargs: dict | None = None) -> None:
    """Forward pre-hook of a block."""
    if '_tune_block' not in block.__dict__:
        return
    key = thread()
    if key == COMPILING:
        _enter(block, key, None)
    # Some take all forward hooks away.
    elif leave_block in block._forward_hooks.values():
        _enter(block, key, sys._getframe(1))


@Hook
def leave_block(block: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of a block."""
    return _leave(block, output)


class Entry(Override):
    """A method by which some run a block in the place of its forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self.module
        key = thread()
        run = runs(key)
        if run is not None and run.block is block:
            return self.stock(*args, **kwargs)
        _enter(block, key, None)
        output = None
        try:
            output = self.stock(*args, **kwargs)
        finally:
            output = _leave(block, output)
        return output


class Replicate(Override):
    """Keeps the entries of a block from a replica, whose they are not."""

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        replica = self.stock(*args, **kwargs)
        for name, value in list(vars(replica).items()):
            if isinstance(value, (Entry, Replicate)):
                del vars(replica)[name]
        return replica


def attach_block(block: nn.Module, state: BlockState) -> None:
    """Make a module note its runs."""
    overrides: dict[str, type[Override]] = {
        name: Entry
        for name in entries_of(type(block)) if name not in vars(block)
    }
    if overrides:
        overrides['_replicate_for_data_parallel'] = Replicate
    attach(
        block, enter_block, leave_block, overrides=overrides,
        _tune_block=state)


def entries_of(block_type: type) -> list[str]:
    """Methods by which a module may be run beside its forward.

    Args:
        block_type (type): Class of the module.

    Returns:
        list[str]: Such as ``'rfp_forward'`` and ``'forward_single'``.
    """
    return [
        name for name in dir(block_type)
        if (name.startswith('forward_') or name.endswith('_forward'))
        and not name.startswith('_') and inspect.isfunction(
            inspect.getattr_static(block_type, name))
    ]
