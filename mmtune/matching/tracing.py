"""Trace the forward of one module with torch.fx, its children as leaves.

A forward may ask what a trace cannot know: which way to branch, how long a
list is, how large a map. A trace guesses, and where a guess ends in an error
(an assertion, say) tries another.
"""
import contextlib
import inspect
import operator
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.graph import inplace_methods

from mmtune.behaviours.deferred import inside_autograd_function
from mmtune.layers.calls import stand_in
from mmtune.layers.questions import ASKING_ATTRIBUTES, ASKING_METHODS
from mmtune.utils.attach import overridden

__all__ = ['OWN_OPTION', 'Traces', 'asks', 'has_forward', 'trace']

# By which MMCV's ConvModule rewrites itself; mmtune does so in its place.
OWN_OPTION = 'efficient_conv_bn_eval_forward'

# As how many a tensor or a list of unknown length is taken.
LENGTHS = (16, 1, 2, 3, 4, 5)
# As of how many dimensions a tensor is taken.
DIMENSIONS = (4, 3, 2, 5)
# As how large a number is taken that comes from a shape.
SIZE = 16
# Loops on data would not end.
MAX_GUESSES = 1000
# How many other guesses may be tried, and how many nodes made meanwhile.
MAX_TRIES = 40
MAX_NODES = 4000


class Traces(NamedTuple):
    """What was seen of a forward.

    Attributes:
        graphs (list[fx.Graph]): One, or one for each branch where the
            forward branches on data, as far as they could be traced.
        exact (bool): Whether there was only one way.
        error (str, optional): What ended the trace.
    """

    graphs: list[fx.Graph]
    exact: bool
    error: str | None


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called: containers such as lists cannot."""
    # That of a scripted class cannot be asked for.
    return inspect.getattr_static(
        type(module), 'forward') is not nn.Module.forward


def asks(node: fx.Node) -> bool:
    """Whether a node only asks a tensor for its shape, dtype or device.

    Or computes with the answers, as Python does with numbers.
    """
    if node.op == 'call_method':
        return node.target in ASKING_METHODS
    if node.op != 'call_function':
        return False
    if node.target is getattr:
        return node.args[1] in ASKING_ATTRIBUTES
    if node.target is torch.numel:
        return True
    of_numbers = getattr(node.target, '__module__', None) in (
        '_operator', 'math', 'builtins') or node.target is torch._assert
    inputs = node.all_input_nodes
    return of_numbers and bool(inputs) and all(map(asks, inputs))


class _Proxy(fx.Proxy):
    """A proxy that guesses where Python wants a number."""

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if hasattr(torch.Tensor, name):  # such as `x.data = y`
            self.tracer.create_proxy('call_function', setattr,
                                     (self, name, value), {})

    def __len__(self) -> int:
        return self.tracer.choose(
            DIMENSIONS if _is_shape(self.node) else LENGTHS)

    def __index__(self) -> int:
        return self._number()

    def __int__(self) -> int:
        return self._number()

    def __float__(self) -> float:
        return float(self._number())

    def __round__(self, digits: int | None = None) -> Any:
        return self._number()

    def __ceil__(self) -> int:
        return self._number()

    def __floor__(self) -> int:
        return self._number()

    def __trunc__(self) -> int:
        return self._number()

    def _number(self) -> int:
        if not asks(self.node):
            raise TypeError('a number is made of data')
        return self.tracer.choose((SIZE, ))


def _record_in_place_operators() -> None:
    """Have `x += 1` not be taken for `x = x + 1`, which writes nothing.

    And have `x[0] = 1` be no error, after which an `x` that is a list of
    tensors would be tried.
    """

    def method(function):
        return lambda proxy, *args: proxy.tracer.create_proxy(
            'call_function', function, (proxy, *args), {})

    for name in inplace_methods:
        setattr(_Proxy, f'__{name}__', method(getattr(operator, name)))


class _Attribute(_Proxy, fx.proxy.Attribute):
    """What an attribute of a proxy gives."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        fx.proxy.Attribute.__init__(self, root, attr)

    node = fx.proxy.Attribute.node


_record_in_place_operators()


def _is_shape(node: fx.Node) -> bool:
    if node.op == 'call_method':
        return node.target == 'size' and len(node.args) == 1
    return node.target is getattr and node.args[1] == 'shape'


class _Guesses:
    """The guesses of one try, each by its number among the options.

    Args:
        plan (list[int]): The first guesses; after them the first option.
    """

    def __init__(self, plan: list[int]) -> None:
        self.plan = plan
        self.made: list[int] = []
        self.options: list[int] = []

    def choose(self, options: tuple) -> Any:
        """Take one of several options."""
        count = len(self.made)
        if count >= MAX_GUESSES:
            raise fx.proxy.TraceError('a loop depends on data')
        guess = self.plan[count] if count < len(self.plan) else 0
        self.made.append(guess)
        self.options.append(len(options))
        return options[guess]

    def next_plan(self) -> list[int] | None:
        """The guesses to try next: the latest that can be another is."""
        if len(self.made) >= MAX_GUESSES:
            return None
        for i in reversed(range(len(self.made))):
            if self.made[i] + 1 < self.options[i]:
                return [*self.made[:i], self.made[i] + 1]
        return None


class _BlockTracer(fx.Tracer):
    """Traces one forward; where it branches on data, takes one branch.

    Args:
        branch (bool): The branch to take.
        guesses (_Guesses): Of this try.
        way (_Way): How the forward is called.
    """

    def __init__(self, branch: bool, guesses: _Guesses, way: '_Way') -> None:
        super().__init__()
        # Else `self.counter += 1` would count the trace.
        self.proxy_buffer_attributes = True
        self.branch = branch
        self.guesses = guesses
        self.way = way

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta['in_function'] = inside_autograd_function()
        return node

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        function, (root, *given) = super().create_args_for_root(
            *args, **kwargs)
        # A forward branches on the values of arguments that have one.
        defaults = _defaults(type(self.root))
        if self.way.gives_optional:
            defaults = {name: default for name, default in defaults.items()
                        if default is not None}
        given = [defaults.get(str(proxy.node.target), proxy)
                 for proxy in given]
        if self.way.wrap is not None and given:
            given[0] = self.way.wrap(given[0])
        return function, [root, *given]

    def choose(self, options: tuple) -> Any:
        return self.guesses.choose(options)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.choose((self.branch, not self.branch))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        return (obj[i] for i in range(len(obj)))

    def keys(self, obj: fx.Proxy) -> Any:
        node = obj.node
        if node.op == 'placeholder' and str(node.target).startswith('**'):
            return ()  # none are given
        return super().keys(obj)


def _list_of(count: int) -> Callable:
    return lambda proxy: [proxy[i] for i in range(count)]


def _tuple_of(count: int) -> Callable:
    return lambda proxy: tuple(proxy[i] for i in range(count))


class _Way(NamedTuple):
    """How a forward is called.

    Attributes:
        wrap (Callable, optional): Makes of the first argument what the
            forward gets in its place.
        gives_optional (bool): Whether arguments are given whose default is
            None.
    """

    wrap: Callable | None = None
    gives_optional: bool = False


# The first argument is a tensor, or several of them.
_WAYS = (_Way(), *[_Way(wrap(count)) for count in LENGTHS[1:]
                   for wrap in (_tuple_of, _list_of)],
         _Way(gives_optional=True))


# Their forwards change what a copy shares, such as the shards of FSDP.
_WRAPPERS = ('torch.distributed.', 'torch.nn.parallel.')


def trace(block: nn.Module) -> Traces:
    """Trace a module's forward, which changes nothing in it.

    Args:
        block (nn.Module): The module.

    Returns:
        Traces: What came before an error is a part of the forward.
    """
    if overridden(block, 'forward'):
        return Traces([], False, 'forward is replaced on the instance')
    if isinstance(block, fx.GraphModule):
        return Traces([block.graph], True, None)
    if isinstance(block, torch.jit.ScriptModule):
        return Traces([], False, 'its code was generated for this instance')
    # Not the class's: `fully_shard` makes one in which the forward is stock.
    if getattr(type(block).forward, '__module__', '').startswith(_WRAPPERS):
        return Traces([], False, 'its forward is that of a wrapper of torch')
    with _random_state_kept():
        graph, guessed, error = _trace_branch(block, False)
        if not guessed:
            return Traces([graph], error is None, error)
        return Traces([graph, _trace_branch(block, True)[0]], False, error)


def _trace_branch(block: nn.Module,
                  branch: bool) -> tuple[fx.Graph, bool, str | None]:
    """Trace one way; where it ends in an error, the first that does not."""
    first = None
    tries = nodes = 0
    for way in _WAYS:
        plan: list[int] | None = []
        while plan is not None:
            guesses = _Guesses(plan)
            graph, error = _try(block, _BlockTracer(branch, guesses, way))
            found = graph, bool(guesses.made) or way != _WAYS[0], error
            if error is None:
                return found
            first = first or found
            tries += 1
            nodes += len(graph.nodes)
            if tries > MAX_TRIES or nodes > MAX_NODES:
                return first
            plan = guesses.next_plan()
    assert first is not None, 'there is something to try'
    return first


def _try(block: nn.Module,
         tracer: _BlockTracer) -> tuple[fx.Graph, str | None]:
    error = None
    try:
        tracer.trace(_stock_stand_in(block))
    except Exception as raised:  # user code under proxies: anything
        error = _describe(raised)
    return getattr(tracer, 'graph', fx.Graph()), error


def _describe(error: Exception) -> str:
    """An error in a few words; where it has none, the line that raised it."""
    message = str(error).partition('\n')[0].partition('. ')[0]
    if not message:
        frames = traceback.extract_tb(error.__traceback__)
        message = (frames[-1].line if frames else None) or 'without a word'
    return f'{type(error).__name__}: {message}'


def _stock_stand_in(block: nn.Module) -> nn.Module:
    """A copy whose forward is the block's own, not a rewrite's."""
    copied = stand_in(block)
    for module in copied.modules():
        if OWN_OPTION in vars(module):
            vars(module)[OWN_OPTION] = None
    return copied


def _defaults(block_type: Any) -> dict[str, Any]:
    parameters = inspect.signature(block_type.forward).parameters
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
