"""Find Conv -> BN pairs, and say why a normalization is in none.

Each module that calls convolutions or normalizations itself is traced with
torch.fx, its children as leaves; a whole detector never is. A trace need not
be the only way through the forward, because a pair is only a candidate: what
really runs is decided at each call (see ``behaviours.py``).
"""
import contextlib
import inspect
import math
import operator
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from mmtune.attach import has_hooks, overridden
from mmtune.calls import forget_trials, stand_in
from mmtune.deferred import inside_autograd_function
from mmtune.frozen import forget_probes
from mmtune.kinds import (
    conv_kind,
    is_known_conv,
    looks_like_conv,
    looks_like_norm,
    methods_of,
    norm_kind,
    patched,
    why_not_folded,
)

__all__ = [
    'OWN_OPTION', 'LeftOut', 'Match', 'Matches', 'find_pairs', 'norms_of'
]


# By which MMCV's ConvModule rewrites itself; mmtune does so in its place.
OWN_OPTION = 'efficient_conv_bn_eval_forward'


class Match(NamedTuple):
    """A pair, by the names that ``model.named_modules()`` gives.

    Attributes:
        block (str): The module whose forward calls the two.
        conv (str): The convolution.
        norm (str): The normalization.
        conv_path (str): What the block calls the convolution.
        norm_path (str): What the block calls the normalization.
        stock (str): Why the two run as stock as long as their code is what
            it is now, else empty.
        sole (bool): Whether both are called once in all forwards traced,
            and no trace had to guess a branch: the pair may then be folded
            for good.
    """

    block: str
    conv: str
    norm: str
    conv_path: str
    norm_path: str
    stock: str
    sole: bool


class LeftOut(NamedTuple):
    """A normalization that is in no pair.

    Attributes:
        norm (str): Its name.
        conv (str, optional): The convolution before it, where there is one.
        reason (str): Why the two are no pair.
        held (bool): Whether modes hold it in train or in eval mode.
    """

    norm: str
    conv: str | None
    reason: str
    held: bool = True


class Matches(NamedTuple):
    """What :func:`find_pairs` found."""

    pairs: list[Match]
    left_out: list[LeftOut]


def norms_of(module: nn.Module) -> list[nn.Module]:
    """The normalizations by kept statistics in a module, each once."""
    return [m for m in module.modules() if _is_norm(m)]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or norm_kind(
        module) is not None


def _is_held(norm: nn.Module) -> bool:
    """Whether train and eval mode differ for a normalization."""
    return isinstance(norm, _BatchNorm) or (
        _is_norm(norm) and why_not_folded(norm) is None)


def find_pairs(model: nn.Module, roots: Sequence[nn.Module]) -> Matches:
    """Find the Conv -> BN pairs below some modules. Changes nothing.

    Args:
        model (nn.Module): Gives the names.
        roots (Sequence[nn.Module]): Modules of ``model`` to search.

    Returns:
        Matches: Pairs in the order of the traces, and every other
        normalization below ``roots`` with its reason.
    """
    forget_probes()
    forget_trials()
    search = _Search(model, roots)
    for block in {m: None for root in roots for m in root.modules()}:
        if any(_is_layer(module) for module in _own_modules(block)):
            search.read(block)
    return search.result()


class _Search:
    """Gathers what the traces of all blocks show.

    Args:
        model (nn.Module): Gives the names.
        roots (Sequence[nn.Module]): Modules whose normalizations are asked
            for.
    """

    def __init__(self, model: nn.Module, roots: Sequence[nn.Module]) -> None:
        self.names = {m: name for name, m in model.named_modules()}
        # Dicts for their order.
        self.norms = {
            m: None
            for root in roots for m in root.modules()
            if _is_norm(m) or looks_like_norm(m)
        }
        # By block, convolution and norm: what the block calls the two, and
        # whether there was only one way.
        self.pairs: dict[tuple[nn.Module, nn.Module, nn.Module], tuple] = {}
        self.reasons: dict[nn.Module, tuple[nn.Module | None, str]] = {}
        self.calls: Counter[nn.Module] = Counter()

    def read(self, block: nn.Module) -> None:
        """Trace a block and note the pairs, or why there are none."""
        graphs, exact, error = _trace(block)
        counts: Counter[nn.Module] = Counter()
        for graph in graphs:
            sites = _call_sites(block, graph)
            # On different ways through the forward, not one after the other.
            counts |= Counter(module for module, _ in sites)
            for norm, node in sites:
                if norm in self.norms:
                    self._read_norm(block, norm, node, exact)
        self.calls += counts
        if error is not None:
            reason = (f'the forward of {self.names[block]!r} cannot be traced '
                      f'({error})')
            for module in _own_modules(block):
                self.reasons.setdefault(module, (None, reason))

    def _read_norm(self, block: nn.Module, norm: nn.Module, node: fx.Node,
                   exact: bool) -> None:
        conv_path, reason = _producer(block, node)
        conv = None if conv_path is None else block.get_submodule(conv_path)
        if conv is not None and reason is None:
            self.pairs.setdefault((block, conv, norm),
                                  (conv_path, node.target, exact))
        elif reason is not None:
            self.reasons[norm] = (conv, reason)

    def result(self) -> Matches:
        """The pairs found, and the normalizations that are in none."""
        pairs = []
        for (block, conv, norm), found in self.pairs.items():
            conv_path, norm_path, exact = found
            sole = exact and self.calls[conv] == self.calls[norm] == 1
            pairs.append(
                Match(self.names[block], self.names[conv], self.names[norm],
                      conv_path, norm_path,
                      _why_stock(conv) or _why_stock(norm), sole))
        paired = {norm for *_, norm in self.pairs}
        left_out = []
        for norm in self.norms:
            if norm in paired:
                continue
            conv, reason = self.reasons.get(
                norm, (None, 'no traced forward calls it'))
            never = why_not_folded(norm)
            left_out.append(
                LeftOut(self.names[norm], None if conv is None else
                        self.names[conv], never or reason, _is_held(norm)))
        return Matches(pairs, left_out)


def _is_layer(module: nn.Module) -> bool:
    return looks_like_conv(module) or _is_norm(module)


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Children, those in plain containers (which have no forward) too."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _own_modules(child)
        else:
            yield child


# --------------------------------------------------------------------------
# Reading a graph
# --------------------------------------------------------------------------


def _call_sites(block: nn.Module,
                graph: fx.Graph) -> list[tuple[nn.Module, fx.Node]]:
    return [(block.get_submodule(node.target), node) for node in graph.nodes
            if node.op == 'call_module']


def _producer(
        block: nn.Module,
        node: fx.Node) -> tuple[str | None, str | None]:
    """The convolution before a normalization, and why they are no pair."""
    norm = block.get_submodule(node.target)
    inputs = [*node.args, *node.kwargs.values()]
    if len(inputs) != 1 or not isinstance(inputs[0], fx.Node):
        return None, 'it is not called with one tensor'
    source = inputs[0]
    if source.target is operator.getitem and _gives_list(
            block, source.args[0]):
        others = [user for user in source.users if user is not node]
        source = source.args[0]
    else:
        others = [user for user in source.users if user is not node]
    if source.op != 'call_module':
        return None, f'its input comes from {_describe(source)}'
    conv = block.get_submodule(source.target)
    if not looks_like_conv(conv):
        return None, ('its input comes from the module '
                      f'{source.target!r} ({type(conv).__name__})')
    reason = _unfit_conv(conv) or _unfit_norm(norm) or _unfit(conv, norm)
    if reason is not None:
        return source.target, reason
    if source.meta['in_function'] != node.meta['in_function']:
        return source.target, ('one of the two runs inside an autograd '
                               'function (a reentrant checkpoint is one)')
    if others:
        return source.target, ('the output of the convolution also goes to '
                               f'{_describe(others[0])}')
    between = source.next
    while between is not node:
        if not _changes_nothing(block, between):
            return source.target, (f'{_describe(between)} runs between '
                                   'the convolution and the BN')
        between = between.next
    return source.target, None


def _gives_list(block: nn.Module, node: fx.Node) -> bool:
    """Whether a node calls a convolution that gives a list."""
    if node.op != 'call_module':
        return False
    kind = conv_kind(type(block.get_submodule(node.target)))
    return kind is not None and kind.gives_list


def _changes_nothing(block: nn.Module, node: fx.Node) -> bool:
    """Whether what runs at a node leaves tensors as they are."""
    if node.op != 'call_module':
        return (node.op in ('get_attr', 'placeholder')
                or node.target is operator.getitem)
    module = block.get_submodule(node.target)
    return not has_hooks(module) and (
        is_known_conv(module)
        or norm_kind(module) is not None)


def _unfit_conv(conv: nn.Module) -> str | None:
    if overridden(conv, 'forward'):
        return "the convolution's forward is replaced on the instance"
    if not is_known_conv(conv):
        return (f'{type(conv).__name__} is not a convolution that '
                'mmtune knows')
    return None


def _why_stock(layer: nn.Module) -> str:
    """Whose code stands in the place of a layer's own, for now."""
    for name in sorted(methods_of(type(layer))):
        if overridden(layer, name):
            return (f'`{name}` of the {type(layer).__name__} is replaced on '
                    'the instance')
    kind = conv_kind(type(layer)) or norm_kind(layer)
    assert kind is not None, 'a pair has known layers'
    function = patched(type(layer), kind)
    return '' if function is None else f'`{function}` is replaced'


def _unfit_norm(norm: nn.Module) -> str | None:
    if overridden(norm, 'forward'):
        return "the BN's forward is replaced on the instance"
    return why_not_folded(norm)


def _unfit(conv: nn.Module, norm: nn.Module) -> str | None:
    kind = conv_kind(type(conv))
    assert kind is not None, 'checked before'
    shape = kind.shape(conv)
    if is_lazy(norm.running_mean) or 0 in shape:
        return None
    channels = math.prod(kind.coeff_shape(conv, shape))
    if channels != norm.running_mean.numel():
        return (f'the convolution has {channels} output channels, the BN '
                f'{norm.running_mean.numel()}')
    return None


def _describe(node: fx.Node) -> str:
    if node.op == 'placeholder':
        return f'the argument {node.target!r}'
    if node.op == 'call_module':
        return f'the module {node.target!r}'
    if node.op == 'output':
        return "the block's output"
    return f'`{getattr(node.target, "__name__", node.target)}`'


# --------------------------------------------------------------------------
# Tracing
# --------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """A proxy of some length, as `f(*x)` asks for."""

    def __len__(self) -> int:
        return self.tracer.guess_length()


class _BlockTracer(fx.Tracer):
    """Traces one forward; where it branches on data, takes one branch.

    Args:
        branch (bool): The branch to take.
    """

    # Loops on data would not end.
    MAX_GUESSES = 1000
    # As how many a tensor or a list of unknown length is taken.
    LENGTH = 16

    def __init__(self, branch: bool) -> None:
        super().__init__()
        # Else `self.counter += 1` would count the trace.
        self.proxy_buffer_attributes = True
        self.branch = branch
        self.guesses = 0

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta['in_function'] = inside_autograd_function()
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        self._guess()
        return self.branch

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def guess_length(self) -> int:
        self._guess()
        return self.LENGTH

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        return (obj[i] for i in range(self.guess_length()))

    def _guess(self) -> None:
        self.guesses += 1
        if self.guesses > self.MAX_GUESSES:
            raise fx.proxy.TraceError('a loop depends on data')


def _trace(block: nn.Module) -> tuple[list[fx.Graph], bool, str | None]:
    """Trace a block's forward.

    Returns:
        tuple[list[fx.Graph], bool, str | None]: A graph, or one for each
        branch where the forward branches on data, as far as they could be
        traced; whether there was only one way; and what ended the trace.
    """
    if overridden(block, 'forward'):
        return [], False, 'forward is replaced on the instance'
    if isinstance(block, (fx.GraphModule, torch.jit.ScriptModule)):
        return [], False, 'its code was generated for this instance'
    with _random_state_kept():
        graph, guessed, error = _trace_branch(block, False)
        if not guessed:
            return [graph], error is None, error
        return [graph, _trace_branch(block, True)[0]], False, error


def _trace_branch(block: nn.Module,
                  branch: bool) -> tuple[fx.Graph, bool, str | None]:
    """Trace one way; what came before an error is a part of the forward."""
    tracer = _BlockTracer(branch)
    error = None
    try:
        tracer.trace(_stand_in(block), _defaults(block))
    except Exception as raised:  # user code under proxies: anything
        message = str(raised).partition('\n')[0].partition('. ')[0]
        error = f'{type(raised).__name__}: {message}'
    graph = getattr(tracer, 'graph', fx.Graph())
    return graph, tracer.guesses > 0, error


def _stand_in(block: nn.Module) -> nn.Module:
    """A copy whose forward is the block's own, not a rewrite's."""
    copied = stand_in(block)
    for module in copied.modules():
        if OWN_OPTION in vars(module):
            vars(module)[OWN_OPTION] = None
    return copied


def _defaults(block: nn.Module) -> dict | None:
    """Values of the arguments that have one: a forward branches on them."""
    parameters = inspect.signature(type(block).forward).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not parameter.empty
    }


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if (
        torch.cuda.is_available() and torch.cuda.is_initialized()) else []
    numpy = sys.modules.get('numpy')
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
