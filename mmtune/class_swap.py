"""Give a behaviour to a module that exists, and take it away again.

The class of the module is swapped for one that puts a mixin, the behaviour,
before the stock class. Everything that a behaviour keeps in a module is an
attribute whose name starts with ``_tune_``.
"""
import functools
import inspect
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = [
    'add_behaviour', 'bare_copy', 'behaviour_of', 'remove_behaviour',
    'stock_type', 'type_with'
]


@functools.cache
def _type_with(behaviour: Any, stock: Any) -> Any:
    """The class ``stock`` with ``behaviour`` before it.

    It carries the name of ``stock``, since users compare names.
    """
    body = dict(
        __module__=stock.__module__,
        __qualname__=stock.__qualname__,
        __doc__=stock.__doc__,
        __reduce_ex__=_reduce,
        _tune_behaviour=behaviour,
        _tune_stock=stock)
    initialized = getattr(stock, 'cls_to_become', None)
    if initialized is not None:
        # What a lazy module turns into keeps the behaviour.
        body['cls_to_become'] = _type_with(behaviour, initialized)
    if hasattr(behaviour, 'wrap_forward'):
        body.update({
            name: behaviour.wrap_forward(getattr(stock, name))
            for name in _forwards(stock)
        })
    return type(stock.__name__, (behaviour, stock), body)


def _forwards(stock: Any) -> list[str]:
    """Methods by which a module may be run: `rfp_forward`, `forward_single`.

    Some callers use one of these in the place of `forward`.
    """
    return [
        name for name in dir(stock)
        if (name.startswith('forward') or name.endswith('_forward'))
        and not name.startswith('_')
        and inspect.isfunction(inspect.getattr_static(stock, name))
    ]


def _reduce(self, protocol):
    """Pickle as stock class and behaviour: the class itself has no path."""
    state = self._tune_stock.__reduce_ex__(self, max(protocol, 2))[2]
    return _restore, (self._tune_behaviour, self._tune_stock), state


def _restore(behaviour: Any, stock: Any) -> nn.Module:
    return object.__new__(_type_with(behaviour, stock))


def stock_type(module: nn.Module) -> Any:
    """The class that a module has without any behaviour."""
    return vars(type(module)).get('_tune_stock', type(module))


def behaviour_of(module: nn.Module) -> type | None:
    """The behaviour that was given to a module, None for a stock one."""
    active = any(name.startswith('_tune_') for name in vars(module))
    return getattr(type(module), '_tune_behaviour', None) if active else None


def type_with(module: nn.Module, behaviour: Any) -> Any:
    """The class that :func:`add_behaviour` gives to a module.

    Args:
        module (nn.Module): Not changed.
        behaviour (type): A mixin of nn.Module.

    Returns:
        type: A class that derives from the module's stock class.
    """
    stock = stock_type(module)
    # Somebody may have derived from our class since, as parametrizations do.
    if issubclass(stock, behaviour):
        return stock
    if is_parametrized(module):
        # torch takes this class away again by its first base.
        unparametrized = _type_with(behaviour, stock.__bases__[0])
        return type(stock.__name__, (unparametrized, ), dict(vars(stock)))
    return _type_with(behaviour, stock)


def add_behaviour(module: nn.Module, behaviour: Any, **state: Any) -> None:
    """Swap the class of a module for one with a behaviour before it.

    Args:
        module (nn.Module): Keeps its parameters, buffers and state_dict
            keys, and stays an instance of its stock class.
        behaviour (type): A mixin of nn.Module.
        **state: Attributes of the behaviour.
    """
    module.__class__ = type_with(module, behaviour)
    # Not through `__setattr__`, which a module may restrict.
    vars(module).update(state)


def remove_behaviour(module: nn.Module) -> None:
    """Give a module its stock class back and drop what mmtune keeps in it."""
    # Where somebody derived from our class since, it stays: without its
    # state the behaviour is idle.
    module.__class__ = stock_type(module)
    for name in [key for key in vars(module) if key.startswith('_tune_')]:
        del vars(module)[name]


def bare_copy(module: nn.Module) -> nn.Module:
    """Copy a module but none of what it holds.

    Unlike ``copy.copy`` it takes parametrized modules, which forbid that.

    Args:
        module (nn.Module): Shares its attributes with the copy.

    Returns:
        nn.Module: Of the same class.
    """
    # Not `cls.__new__`, which some classes have made do something else.
    copied: Any = object.__new__(type(module))
    vars(copied).update(vars(module))
    return copied
