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

from mmtune.attach import Hook, Override, attach, has_hooks
from mmtune.deferred import defer, inside_autograd_function, settle
from mmtune.kinds import ConvKind

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

    def is_seen(self, block: nn.Module) -> bool:
        """Whether a hook of somebody's sees what passes between the two."""
        modules = (at(block, path) for path in self.via)
        return any(m is not None and has_hooks(m) for m in modules)


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
    """

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self.told = False

    def pairs_in(self, block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """The pairs that a block has now, by the modules that it has now."""
        found = []
        for pair in self.pairs:
            conv, norm = at(block, pair.conv_path), at(block, pair.norm_path)
            if (conv is not None and norm is not None
                    and '_tune_conv' in conv.__dict__
                    and '_tune_norm' in norm.__dict__):
                if not (pair.via and pair.is_seen(block)):
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


def _is_replaced(layer: Any, state: Any) -> bool:
    """Whether a layer is another than the one that was turned on."""
    # Turned off, it may be the same one still.
    return state.is_on and (layer is None or not (
        '_tune_conv' in vars(layer) or '_tune_norm' in vars(layer)))


# By thread, the innermost run of a block. torch.compile knows one thread.
_RUNS: dict[int, 'BlockRun'] = {}


def thread() -> int:
    """The current thread, by which runs are told apart."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _handled_error() -> BaseException | None:
    return None if torch.compiler.is_compiling() else sys.exc_info()[1]


class BlockRun:
    """One run of a block's forward, and the promises made in it.

    Args:
        block (nn.Module): The block.
        pairs (list[tuple[nn.Module, nn.Module]]): Its convolutions and
            normalizations.
        outer (BlockRun, optional): The run that this one is a part of.
        frame (FrameType, optional): Where it began, to know whether it goes
            on; None under ``torch.compile``.
    """

    __slots__ = ('block', 'error', 'frame', 'inside_function', 'outer',
                 'pairs', 'promised', 'promises')

    def __init__(self, block: nn.Module, pairs: list,
                 outer: 'BlockRun | None',
                 frame: FrameType | None = None) -> None:
        self.block = block
        self.pairs = pairs
        self.outer = outer
        self.frame = frame
        self.error = _handled_error()
        self.inside_function = inside_autograd_function()
        self.promised = False
        self.promises: list[weakref.ref] = []

    def promise(self, name: str, kind: ConvKind, conv: nn.Module,
                inputs: tuple) -> Any:
        """Promise the output of a convolution called in this run."""
        deferred = defer(name, conv, kind, inputs)
        deferred.run = self
        self.promised = True
        if not torch.compiler.is_compiling():
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
        if not self.promised or _handled_error() is not self.error:
            return output
        # Those of an outer run may go on, to a normalization there.
        output = settle(output, self)
        for reference in self.promises:
            deferred = reference()
            if deferred is not None:
                deferred.tensor()
        return output


def runs() -> BlockRun | None:
    """The innermost run of a block in this thread.

    Returns:
        BlockRun | None: Its ``outer`` leads to the others.
    """
    key = thread()
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


def _enter(block: nn.Module, frame: FrameType | None) -> None:
    outer = runs()
    _RUNS[thread()] = BlockRun(block, block._tune_block.pairs_in(block), outer,
                               frame)


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
    if '_tune_block' not in vars(block):
        return
    if torch.compiler.is_compiling():
        _enter(block, None)
    # Some take all forward hooks away.
    elif leave_block in block._forward_hooks.values():
        _enter(block, sys._getframe(1))


@Hook
def leave_block(block: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of a block."""
    return _leave(block, output)


class Entry(Override):
    """A method by which some run a block in the place of its forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self.module
        run = runs()
        if run is not None and run.block is block:
            return self.stock(*args, **kwargs)
        _enter(block, None)
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
