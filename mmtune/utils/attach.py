"""Give behaviour to a module that exists, and take it away again.

The module keeps its class, since users, registries and tools ask for exact
types. What it does differently hangs on the instance:

- forward hooks, which PyTorch calls with the module that really runs, be it
  a copy;
- :class:`Override`, a method in the module's own ``__dict__``, where no hook
  could do the work;
- attributes whose names start with ``_tune_``.

Nothing is looked up before it runs: a method that is replaced later, on the
class or on the instance, is the one that runs from then on.
"""
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = [
    'Hook', 'Override', 'attach', 'bare_copy', 'detach', 'foreign_hooks',
    'has_hooks', 'TunedRepr', 'heal', 'is_attached', 'overridden', 'run_last'
]

HOOKS = ('_forward_pre_hooks', '_forward_hooks')
BACKWARD_HOOKS = ('_backward_pre_hooks', '_backward_hooks')
# What torch notes of a hook beside the hook itself.
HOOK_NOTES = ('_forward_pre_hooks_with_kwargs', '_forward_hooks_with_kwargs',
              '_forward_hooks_always_called')


class _Unscriptable:
    """A callable that tells ``torch.jit.script`` what its user can do."""

    @property
    def __globals__(self) -> dict:
        # Others ask for it as well, and go on without.
        raise AttributeError(
            'torch.jit.script cannot read a model in a mode of mmtune; call '
            'mmtune.turn_off(model) before, and turn_on after if need be')


class Hook(_Unscriptable, functools.partial):
    """A forward hook or forward pre-hook that copies and pickles by name.

    A tool that makes one module of several may move a pre-hook to it, without
    the note that it takes keywords: there it must do nothing.

    Args:
        function (Callable): Of a module's top level, bound to its own name
            as the hook.
    """

    @property
    def __name__(self) -> str:
        return self.func.__name__

    @property
    def __module__(self) -> str:  # type: ignore[override]
        return self.func.__module__

    def __reduce__(self) -> str:
        return self.__name__

    def __deepcopy__(self, memo: dict) -> 'Hook':
        return self


class Override(_Unscriptable):
    """A method of one module in the place of its class's.

    It follows its module through copies and pickles, and does not keep it
    alive. A shallow copy of the module shares it: what depends on the module
    that really runs has to come from a :class:`Hook`.

    Args:
        module (nn.Module): Whose method it is.
        name (str): Name of the method.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module = weakref.ref(module)
        self.name = name

    @property
    def module(self) -> Any:
        """The module whose method it is.

        Raises:
            RuntimeError: If the module is gone.
        """
        module = self._module()
        if module is None:
            raise RuntimeError(
                f'the module of this {self.name!r} was freed, since nothing '
                'but its method was kept; keep the module in a variable')
        return module

    @property
    def __func__(self) -> Callable:
        """The method that the class has now, as of a bound method."""
        return getattr(type(self.module), self.name)

    @property
    def __wrapped__(self) -> Callable:
        """For ``inspect.signature``."""
        return self.__func__.__get__(self.module)

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method that the class has now."""
        return self.__func__(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> 'Override':
        module = self.module
        return type(self)(memo.get(id(module), module), self.name)

    def __reduce__(self) -> tuple:
        return type(self), (self.module, self.name)


# What of its own a module in Tune mode has.
_TUNED = {'_tune_activation', '_tune_conv', '_tune_norm'}


class TunedRepr(Override):
    """Marks a module in ``print(model)``."""

    def __call__(self) -> str:
        """See ``nn.Module.extra_repr``."""
        own = vars(self.module)
        text = self.stock()
        if own.keys() & _TUNED:
            text += ', tune=True'
        if '_tune_held' in own:
            held = 'norm_train' if own['_tune_held'].training else 'norm_eval'
            text += f', {held}=True'
        return text.removeprefix(', ')


def overridden(module: nn.Module, name: str) -> bool:
    """Whether somebody else replaced a method on the instance.

    Args:
        module (nn.Module): Any module.
        name (str): Name of a method.

    Returns:
        bool: False for what mmtune put there.
    """
    own = vars(module).get(name)
    return own is not None and not isinstance(own, Override)


def attach(module: nn.Module,
           pre_hook: Hook | None = None,
           hook: Hook | None = None,
           overrides: dict[str, type[Override]] | None = None,
           **state: Any) -> None:
    """Give a module what mmtune hangs on it, each once.

    Args:
        module (nn.Module): Keeps its class, parameters, buffers and keys.
        pre_hook (Hook, optional): Called with module, args and kwargs.
        hook (Hook, optional): Called with module, args and output, after an
            error as well.
        overrides (dict[str, type[Override]], optional): Methods by name.
        **state: Attributes; their names start with ``_tune_``.
    """
    if pre_hook is not None and not is_attached(module, pre_hook):
        module.register_forward_pre_hook(pre_hook, with_kwargs=True)
    if hook is not None and not is_attached(module, hook):
        module.register_forward_hook(hook, always_call=True)
    # Not through `__setattr__`, which a module may restrict.
    vars(module).update(state)
    vars(module).update({
        name: override(module, name)
        for name, override in (overrides or {}).items()
    })


def heal(module: nn.Module, name: str, override: type[Override]) -> None:
    """Put a method back that somebody replaced and took away again.

    As MMCV's ConvModule does with its option ``efficient_conv_bn_eval``.

    Args:
        module (nn.Module): What it has of its own stays.
        name (str): Name of the method.
        override (type[Override]): The method.
    """
    if not torch.compiler.is_compiling():
        vars(module).setdefault(name, override(module, name))


def run_last(module: nn.Module, hook: Hook) -> None:
    """Have a pre-hook run after those that were added since, next time."""
    hooks = module._forward_pre_hooks
    if len(hooks) > 1 and not torch.compiler.is_compiling():
        for key in [key for key, own in hooks.items() if own is hook]:
            hooks.move_to_end(key)


def is_attached(module: nn.Module, hook: Hook) -> bool:
    """Whether a module has a hook of mmtune's."""
    return any(own is hook for name in HOOKS
               for own in vars(module)[name].values())


def foreign_hooks(module: nn.Module) -> list[Any]:
    """The hooks of a module that are anybody else's."""
    return [hook for name in (*HOOKS, *BACKWARD_HOOKS)
            for hook in vars(module)[name].values()
            if not isinstance(hook, Hook)]


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of anybody else's."""
    return bool(foreign_hooks(module))


def detach(module: nn.Module) -> None:
    """Take away all that :func:`attach` gave to a module."""
    own = vars(module)
    for hooks in HOOKS:
        # A scripted module has none of its own.
        attached = own.get(hooks, {})
        for key in [k for k, h in attached.items() if isinstance(h, Hook)]:
            del attached[key]
            for notes in HOOK_NOTES:
                own[notes].pop(key, None)
    for name, value in list(own.items()):
        if name.startswith('_tune_') or isinstance(value, Override):
            del own[name]


def bare_copy(module: nn.Module) -> nn.Module:
    """Copy a module but none of what it holds, and without attachments.

    Unlike ``copy.copy`` it takes parametrized modules, which forbid that.

    Args:
        module (nn.Module): Shares its attributes with the copy.

    Returns:
        nn.Module: Of the same class.
    """
    # Not `cls.__new__`, which some classes have made do something else.
    copied: Any = object.__new__(type(module))
    vars(copied).update({
        name: value
        for name, value in vars(module).items()
        if not (name.startswith('_tune_') or isinstance(value, Override))
    })
    return copied
