"""Which code a layer runs, and whether it is what a kind was written for."""
import os
import types
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from mmtune.layers.kinds import LayerKind

__all__ = ['LIBRARIES', 'known_kind', 'methods_of', 'patched', 'same_code']

Kind = TypeVar('Kind', bound=LayerKind)

# Whose code is known, as it was written.
LIBRARIES = ('torch', 'mmcv', 'mmdet', 'mmengine')


def known_kind(
        cls: type,
        kinds: dict[str, Kind]) -> tuple[Kind | None, type | None]:
    """Look up the nearest class with a kind that a class derives from.

    Args:
        cls (type): Class of a layer.
        kinds (dict[str, Kind]): Kinds by the dotted names of classes.

    Returns:
        tuple[Kind | None, type | None]: The kind, and the class that has it.
    """
    for known in cls.__mro__:
        kind = kinds.get(f'{known.__module__}.{known.__qualname__}')
        if kind is not None:
            return kind, known
    return None, None


def same_code(cls: type, known: type | None, *names: str) -> bool:
    """Whether a class runs the code of one that is known.

    Args:
        cls (type): Class of a layer.
        known (type, optional): From :func:`known_kind`.
        *names (str): Methods that are to be the same.

    Returns:
        bool: True as well where neither has a method.
    """
    return all(
        getattr(cls, name, None) is getattr(known, name, None)
        for name in names)


def patched(layer_type: type, kind: LayerKind) -> str | None:
    """Look for code that somebody put in the place of a library's own.

    Args:
        layer_type (type): Class of a layer.
        kind (LayerKind): Its kind.

    Returns:
        str | None: Name of the method or function, None where all is the
        code that the kind was written for.
    """
    for name in kind.methods:
        owner = next((c for c in layer_type.__mro__ if name in vars(c)), None)
        if (owner is not None
                and owner.__module__.partition('.')[0] in LIBRARIES
                and not _is_from(vars(owner)[name], owner.__module__)):
            return f'{owner.__name__}.{name}'
    for name in kind.functions:
        if not _is_from(getattr(F, name), F.__name__):
            return f'F.{name}'
    for name in kind.operators:
        if not _is_from(getattr(torch, name), torch.__name__):
            return f'torch.{name}'
    return None


def _is_from(function: Any, module: str) -> bool:
    """Whether a function was written in a module's file, or in C."""
    code = getattr(function, '__code__', None)
    if code is None:
        return isinstance(function, types.BuiltinFunctionType)
    path = module.replace('.', '/')
    return code.co_filename.replace(os.sep, '/').endswith(
        (f'{path}.py', f'{path}/__init__.py'))


def methods_of(layer_type: type) -> frozenset[str]:
    """Names that an instance may not have of its own.

    Args:
        layer_type (type): Class of a layer.

    Returns:
        frozenset[str]: Its methods but those that mmtune replaces itself, and
        those of ``nn.Module`` that do not run it.
    """
    names = {
        name
        for base in layer_type.__mro__ if base not in (nn.Module, object)
        for name, value in vars(base).items()
        if not name.startswith('__') and (
            callable(value) or isinstance(value, (staticmethod, classmethod)))
    }
    return frozenset(names | {'_call_impl'}) - {
        'forward', 'extra_repr', 'named_buffers', 'train'
    }
