"""A module a library, which a sweep asks for what differs.

Each has:

- ``REQUIREMENTS``: what pip is to install, with versions;
- ``ALONE``: what it is to install without what that asks for in turn;
- ``SIZES``: heights of images to try, in pixels, the smallest first;
- ``names()``: names of the networks that are swept;
- ``build(name)``: a network with random weights, made without a download;
- ``inputs(name, model, size)``: the arguments of its forward, a tuple, for
  two images.

The library itself is imported by the functions: the lists of ``REQUIREMENTS``
are read where it is not installed.
"""
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from rich.progress import track
from torch import Tensor, nn

LIBRARIES = sorted(module.name for module in pkgutil.iter_modules(__path__))
# In float64 a step of a larger network, twice, takes 8 GiB and more.
MOST_PARAMETERS = 150_000_000


def library(name: str) -> ModuleType:
    """Get the module of a library.

    Args:
        name (str): One of ``LIBRARIES``.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in LIBRARIES:
        raise ValueError('LIB must be one of ' + ', '.join(LIBRARIES) +
                         (f', but got {name!r}' if name else
                          ', as in `make sweep LIB=timm`'))
    return importlib.import_module(f'{__name__}.{name}')


def images(size: int, channels: int = 3) -> Tensor:
    """Make two images, for of one image torch 2.13's own BatchNorm can be
    wrong on the CPU."""
    return torch.randn(2, channels, size, size)


def without_memory(build: Callable[[str], nn.Module], name: str) -> nn.Module:
    """Build a network whose parameters hold no numbers."""
    try:
        with torch.device('meta'):
            return build(name)
    except Exception:  # stock code, which may read numbers
        # Constructors read widths, and rates of dropped paths, from these.
        real = {function: functools.partial(getattr(torch, function),
                                            device='cpu')
                for function in ('arange', 'linspace', 'tensor')}
        with torch.device('meta'), mock.patch.multiple(torch, **real):
            return build(name)


def first_of(model: nn.Module, *types: type[nn.Module]) -> Any:
    """Find the first module of some types, which says what a network takes.

    Args:
        model (nn.Module): The network.
        types (type): What the module may be.

    Returns:
        nn.Module: The first in the order of ``model.modules()``.
    """
    return next(m for m in model.modules() if isinstance(m, types))


def representatives(names: Iterable[str],
                    build: Callable[[str], nn.Module]) -> list[str]:
    """Choose the smallest networks in which every class of module occurs.

    Args:
        names (Iterable[str]): Of networks; what cannot be built is chosen,
            so that the sweep says why.
        build (Callable): Builds one.

    Returns:
        list[str]: The smallest first. Networks without running statistics,
        and those of more than :data:`MOST_PARAMETERS`, are not among them.
    """
    chosen, sizes = [], []
    for name in track(list(names), 'Choosing'):
        try:
            model = without_memory(build, name)
        except Exception:  # stock code: whatever it lacks here
            chosen.append(name)
            continue
        classes = {type(module) for module in model.modules()}
        count = sum(p.numel() for p in model.parameters())
        if count <= MOST_PARAMETERS and any(
                getattr(module, 'running_mean', None) is not None
                for module in model.modules()):
            sizes.append((count, name, classes))
    seen: set[type] = set()
    for _, name, classes in sorted(sizes, key=lambda item: item[:2]):
        if not classes <= seen:
            chosen.append(name)
            seen |= classes
    return chosen
