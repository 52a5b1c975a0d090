"""Normalizations that are held in train or in eval mode.

Whatever ``train()`` asks for, and whatever takes their place later.
"""
import warnings

import torch
from torch import nn

from mmtune.behaviours.blocks import at
from mmtune.utils.attach import Hook, Override, TunedRepr, attach

__all__ = ['hold_norms']


class Held:
    """State of a normalization that is held in train or in eval mode.

    Attributes:
        training (bool): The ``training`` flag that is kept.
        asked (bool): The flag that was asked for last.
        is_on (bool): Whether it was not turned off.
    """

    def __init__(self, norm: nn.Module, training: bool) -> None:
        self.training = training
        self.is_on = True
        self.asked = norm.training


class HeldPaths:
    """State of a root whose normalizations are held.

    Attributes:
        held (dict[tuple[str, ...], Held]): By where the root has them.
    """

    def __init__(self, held: dict[tuple[str, ...], Held]) -> None:
        self.held = held

    def follow(self, root: nn.Module) -> None:
        """Hold what took the place of a normalization, and say so."""
        followed = []
        for path, held in list(self.held.items()):
            norm = at(root, path)
            if norm is not None and vars(norm).get('_tune_held') is held:
                continue
            del self.held[path]
            # Else somebody turned it off, or took it away.
            if held.is_on and norm is not None and 'running_mean' in vars(
                    norm)['_buffers']:
                self.held[path] = hold_norm(norm, held.training)
                followed.append('.'.join(path))
        if followed:
            mode = 'train' if held.training else 'eval'
            warnings.warn(
                f'{len(followed)} normalizations were replaced after '
                f'mmtune.turn_on ({followed[0]!r} is the first) and are held '
                f'in {mode} mode from now on; call turn_on again after the '
                'last replacement',
                stacklevel=2)


@Hook
def follow_held(root: nn.Module, args: tuple,
                kwargs: dict | None = None) -> None:
    """Forward pre-hook of a root whose normalizations are held."""
    state = vars(root).get('_tune_held_paths')
    if state is not None and not torch.compiler.is_compiling():
        state.follow(root)


def hold_norms(root: nn.Module, norms: list[nn.Module],
               training: bool) -> None:
    """Hold normalizations, and those that take their places later.

    Args:
        root (nn.Module): Holds the normalizations.
        norms (list[nn.Module]): Each at or below ``root``.
        training (bool): The ``training`` flag to keep.
    """
    states = {norm: hold_norm(norm, training) for norm in norms}
    paths = {
        tuple(name.split('.')) if name else (): states[module]
        for name, module in root.named_modules(remove_duplicate=False)
        if module in states
    }
    attach(root, follow_held, _tune_held_paths=HeldPaths(paths))


class HeldTrain(Override):
    """``train()`` that notes what is asked for and does what is held."""

    def __call__(self, mode: bool = True) -> nn.Module:
        """See ``nn.Module.train``."""
        held = self.module._tune_held
        held.asked = mode
        return self.stock(held.training)


def hold_norm(norm: nn.Module, training: bool) -> Held:
    """Hold a normalization in train or in eval mode.

    Args:
        norm (nn.Module): Stays there, whatever ``train()`` asks for.
        training (bool): The ``training`` flag to keep.

    Returns:
        Held: Its state; the one that it has, where another root holds it.
    """
    held = vars(norm).get('_tune_held')
    if held is not None:
        return held
    held = Held(norm, training)
    attach(
        norm,
        overrides=dict(train=HeldTrain, extra_repr=TunedRepr),
        _tune_held=held)
    norm.train(held.asked)
    return held
