"""Follow a tensor from a convolution to a normalization, across modules.

The two need not be called by one forward. A module may end in a convolution,
which it returns the output of, and a module may begin with a normalization,
which it gives its argument to.
"""
import inspect
import operator
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.fx.graph import magic_methods

from mmtune.layers.convolutions import (
    conv_kind,
    is_known_conv,
    looks_like_conv,
)
from mmtune.layers.normalizations import looks_like_norm, norm_kind
from mmtune.layers.questions import RESHAPING_METHODS
from mmtune.matching.tracing import Traces, asks, has_forward, trace
from mmtune.utils.attach import foreign_hooks

__all__ = ['Begin', 'Ends', 'Source']


class Begin(NamedTuple):
    """The normalization that a module gives its argument to.

    Attributes:
        path (str): What the module calls it; empty for itself.
        via (tuple[str, ...]): What it calls the modules that the argument
            passes on the way, the first of them itself.
    """

    path: str
    via: tuple[str, ...]


class Source(NamedTuple):
    """The convolution that a tensor comes from.

    Attributes:
        path (str, optional): What the block calls it; None where there is
            none.
        via (tuple[str, ...]): What it calls the modules that the output
            passes on the way.
        reason (str, optional): Why the output does not arrive as it left.
    """

    path: str | None
    via: tuple[str, ...]
    reason: str | None


class Ends:
    """Traces modules, and says in what they begin and end, each once."""

    def __init__(self) -> None:
        self._traces: dict[nn.Module, Traces] = {}
        self._begins: dict[nn.Module, Begin | None] = {}
        self._sources: dict[tuple[nn.Module, int | None],
                            Source | None] = {}

    def traces(self, module: nn.Module) -> Traces:
        """Trace a module, see :func:`mmtune.matching.tracing.trace`."""
        if module not in self._traces:
            self._traces[module] = trace(module)
        return self._traces[module]

    def may_meet(self, block: nn.Module) -> bool:
        """Whether children may be a convolution's end and a norm's begin."""
        parts = _parts(block)
        return (len(parts) > 1 and any(map(self.begin, parts))
                and any(map(self._may_end, parts)))

    def begin(self, module: nn.Module) -> Begin | None:
        """Find the normalization that a module gives its argument to.

        Args:
            module (nn.Module): A normalization, or what may hold one.

        Returns:
            Begin | None: None where something else may happen before.
        """
        if looks_like_norm(module) or norm_kind(module) is not None:
            return Begin('', ())
        if module not in self._begins:
            self._begins[module] = None  # where it holds itself
            if self._is_whole(module) and any(
                    map(self.begin, _parts(module))):
                self._begins[module] = next(
                    filter(None, (self._begin_of(module, graph) for graph in
                                  self.traces(module).graphs)), None)
        return self._begins[module]

    def _is_whole(self, module: nn.Module) -> bool:
        return has_forward(module) and not looks_like_conv(module)

    def _begin_of(self, module: nn.Module, graph: fx.Graph) -> Begin | None:
        given = next((n for n in graph.nodes if n.op == 'placeholder'), None)
        via = ['']
        while given is not None:
            users = [user for user in given.users if not asks(user)]
            if len(users) != 1 or users[0].op != 'call_module' or _input(
                    users[0]) is not given or _reason(module, given, users[0]):
                return None
            user, = users
            called = module.get_submodule(user.target)
            begin = self.begin(called)
            if begin is not None:
                return Begin(
                    _join(user.target, begin.path),
                    (*via, *(_join(user.target, path) for path in begin.via)))
            if not _is_identity(called):
                return None
            via.append(user.target)
            given = user
        return None

    def _end(self, module: nn.Module,
             index: int | None = None) -> Source | None:
        """Find the convolution whose output a module returns.

        Args:
            module (nn.Module): The module.
            index (int, optional): Of which of the outputs, where there are
                several. Defaults to None.
        """
        if looks_like_conv(module):
            return Source('', (), None) if index is None else None
        key = module, index
        if key not in self._sources:
            self._sources[key] = None
            if self._is_whole(module) and any(
                    map(self._may_end, _parts(module))):
                sources = (
                    self.source(module, node, index=index)
                    for graph in self.traces(module).graphs
                    for node in graph.nodes if node.op == 'output')
                self._sources[key] = next(
                    (s for s in sources if s.path is not None
                     and s.reason is None), None)
        return self._sources[key]

    def _may_end(self, module: nn.Module) -> bool:
        """Whether a convolution's output may be among a module's outputs."""
        return any(map(looks_like_conv, module.modules()))

    def source(self, block: nn.Module, node: fx.Node, first: bool = False,
               index: int | None = None) -> Source:
        """Follow the input of a node back to a convolution.

        Args:
            block (nn.Module): Whose forward was traced.
            node (fx.Node): A call of a module, or the output.
            first (bool): Whether its first input is meant where there are
                more, else there must be one. Defaults to False.
            index (int, optional): Which of several outputs is meant.
        """
        via: list[str] = []
        reason = None
        user = node
        while True:
            given = _input(user)
            if user is node and index is not None:
                given = _element(node, index)
            elif user is node and first:
                given = _first_input(node)
            of: int | None = None
            if given is None:
                return Source(None, (), 'it is not called with one tensor')
            if given.target is operator.getitem and _gives_list(
                    block, given.args[0]):
                reason = reason or _reason(block, given, user)
                user, given = given, given.args[0]
            elif _flattens(given):
                reason = reason or _reason(block, given, user)
                user, given = given, given.args[0]
            elif _is_element(given):
                reason = reason or _reason(block, given, user)
                of, user, given = given.args[1], given, given.args[0]
            if given.op != 'call_module':
                return Source(None, (),
                              f'its input comes from {describe(given)}')
            reason = reason or _reason(block, given, user)
            module = block.get_submodule(given.target)
            if _is_identity(module) and of is None:
                via.append(given.target)
                user = given
                continue
            end = self._end(module, of)
            if end is None:
                return Source(None, (), 'its input comes from the module '
                              f'{given.target!r} ({type(module).__name__})')
            assert end.path is not None
            if end.path:
                via += [given.target,
                        *(_join(given.target, path) for path in end.via)]
            return Source(_join(given.target, end.path), tuple(via), reason)


def _join(*names: str) -> str:
    return '.'.join(filter(None, names))


def _parts(module: nn.Module) -> list[nn.Module]:
    """Children, those in containers without a forward too."""
    return [part for child in module.children()
            for part in ([child] if has_forward(child) else _parts(child))]


def _is_identity(module: nn.Module) -> bool:
    return _runs_forward_of(module, nn.Identity)


def _runs_forward_of(module: nn.Module, layer: type[nn.Module]) -> bool:
    return inspect.getattr_static(type(module), 'forward') is layer.forward


def _input(node: fx.Node) -> fx.Node | None:
    """The one input of a node."""
    inputs = [*node.args, *node.kwargs.values()]
    if len(inputs) == 1 and isinstance(inputs[0], fx.Node):
        return inputs[0]
    return None


def _first_input(node: fx.Node) -> fx.Node | None:
    """The first input of a node, unless it is given that once more."""
    given = node.args[0] if node.args else None
    others: list[fx.Node] = []
    fx.map_arg((node.args[1:], node.kwargs), others.append)
    return given if isinstance(given, fx.Node) and given not in others else (
        None)


def _element(node: fx.Node, index: int) -> fx.Node | None:
    """One of several outputs, unless it is another one, too."""
    outputs = node.args[0]
    if not isinstance(outputs, (tuple, list)) or not (
            -len(outputs) <= index < len(outputs)):
        return None
    found: list[fx.Node] = []
    fx.map_arg(outputs, found.append)
    given = outputs[index]
    return given if isinstance(given, fx.Node) and found.count(
        given) == 1 else None


def _is_element(node: fx.Node) -> bool:
    """Whether a node takes one of what a module returns."""
    return (node.target is operator.getitem and isinstance(
        node.args[1], int) and node.args[0].op == 'call_module')


def _gives_list(block: nn.Module, node: fx.Node) -> bool:
    """Whether a node calls a convolution that gives a list."""
    if node.op != 'call_module':
        return False
    kind = conv_kind(type(block.get_submodule(node.target)))
    return kind is not None and kind.gives_list


def _flattens(node: fx.Node) -> bool:
    """Whether a node makes one dimension of the first two."""
    return (node.op == 'call_method' and node.target == 'flatten'
            and node.args[1:] == (0, 1) and not node.kwargs)


def _reason(block: nn.Module, given: fx.Node, user: fx.Node) -> str | None:
    """Why a tensor may not arrive at its user as it is."""
    if given.meta.get('in_function') != user.meta.get('in_function'):
        return ('one of the two runs inside an autograd function (a '
                'reentrant checkpoint is one)')
    others = [
        other for other in given.users if other is not user
        and not asks(other) and not _only_reshapes(other, given)
        and not (given.op == 'call_module'
                 and other.target is operator.getitem
                 and _gives_list(block, given))
        and not (_is_element(other) and _is_element(user)
                 and other.args[1] != user.args[1])
    ]
    if others:
        return ('the output of the convolution also goes to '
                f'{describe(others[0])}')
    between = given.next
    while between is not user:
        if not _changes_nothing(block, between):
            return (f'{describe(between)} runs between the convolution and '
                    'the BN')
        between = between.next
    return None


def _only_reshapes(node: fx.Node, given: fx.Node) -> bool:
    """Whether a node reads of a tensor its shape, to give it to another."""
    return (node.op == 'call_method' and node.target in RESHAPING_METHODS
            and node.args[0] is not given)


def _changes_nothing(block: nn.Module, node: fx.Node) -> bool:
    """Whether what runs at a node leaves tensors of others as they are."""
    if node.op != 'call_module':
        return (node.op in ('get_attr', 'placeholder')
                or node.target is operator.getitem or asks(node)
                or _is_out_of_place(node))
    module = block.get_submodule(node.target)
    return all(map(_makes_weight, foreign_hooks(module))) and (
        is_known_conv(module) or norm_kind(module) is not None
        or _is_identity(module) or _is_lookup(module))


def _is_lookup(module: nn.Module) -> bool:
    """Whether a module is an embedding that writes to no weight."""
    return (_runs_forward_of(module, nn.Embedding)
            # A call would scale rows of its weight, which others may share.
            and module.max_norm is None)


def _makes_weight(hook: Callable) -> bool:
    """Whether a hook makes its own layer's weight: torch's spectral_norm."""
    return type(hook).__module__.startswith('torch.nn.utils.')


def _is_out_of_place(node: fx.Node) -> bool:
    """Whether an operator runs at a node that writes to no argument."""
    if node.op == 'call_method':
        name = node.target
    elif isinstance(node.target, BuiltinFunctionType):
        name = node.target.__name__
        if node.target is getattr(operator, name, None):
            return name in magic_methods
    else:
        return False
    # What PyTorch itself says of all operators of the name.
    operators = getattr(torch.ops.aten, name, None)
    # No string, as is the namespace's own `name`.
    if not isinstance(operators, torch._ops.OpOverloadPacket):
        return False
    return 'out' not in node.kwargs and not any(
        getattr(operators, overload)._schema.is_mutable
        for overload in operators.overloads() if not overload.endswith('out'))


def describe(node: fx.Node) -> str:
    """Say in a reason what runs at a node."""
    if node.op == 'placeholder':
        return f'the argument {node.target!r}'
    if node.op == 'call_module':
        return f'the module {node.target!r}'
    if node.op == 'output':
        return "the block's output"
    return f'`{getattr(node.target, "__name__", node.target)}`'
