"""Arguments of ``turn_on``: whether they are right, and what they name."""
from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = [
    'MODES', 'check_activations', 'check_mode', 'check_module',
    'check_norm_eval', 'select', 'training_options'
]

MODES = ('Train', 'Eval', 'Tune', 'Deploy')


def check_module(model: nn.Module) -> None:
    """Raise a TypeError where something is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError('`model` must be a torch.nn.Module, but got '
                        f'{type(model).__name__}')


def check_mode(mode: str) -> str:
    """Write a mode as in ``MODES``, or raise a ValueError."""
    for name in MODES:
        if isinstance(mode, str) and mode.lower() == name.lower():
            return name
    raise ValueError(f'`mode` must be one of {", ".join(MODES)}, but got '
                     f'{mode!r}')


def check_norm_eval(mode: str, norm_eval: bool | None) -> bool | None:
    """What BatchNorms are held in: ``training`` as a bool, or None."""
    if norm_eval not in (None, True, False):
        raise ValueError('`norm_eval` must be True, False or None, but got '
                         f'{norm_eval!r}')
    if mode == 'Train' and norm_eval:
        raise ValueError("`norm_eval` must not be True in mode 'Train', "
                         'which holds every BatchNorm in train mode')
    if mode == 'Eval' and norm_eval is False:
        raise ValueError("`norm_eval` must not be False in mode 'Eval', "
                         'which holds every BatchNorm in eval mode')
    if mode == 'Train':
        return True
    return False if mode == 'Eval' or norm_eval else None


def check_activations(activations: bool) -> None:
    """Raise a ValueError where it is no bool."""
    if not isinstance(activations, bool):
        raise ValueError('`activations` must be True or False, but got '
                         f'{activations!r}')


def training_options(modules: str | Sequence[str] | None, mode: str,
                     norm_eval: bool | None,
                     activations: bool) -> dict[str, Any]:
    """Check what a callback is to turn on in a training.

    Args:
        modules (str | Sequence[str], optional): See :func:`mmtune.turn_on`;
            looked up when the model is there.
        mode (str): Not Deploy, which changes keys of checkpoints.
        norm_eval (bool, optional): See :func:`mmtune.turn_on`.
        activations (bool): See :func:`mmtune.turn_on`.

    Returns:
        dict[str, Any]: Arguments of :func:`mmtune.turn_on`.

    Raises:
        ValueError: For a wrong argument.
    """
    name = check_mode(mode)
    check_norm_eval(name, norm_eval)
    check_activations(activations)
    if name == 'Deploy':
        raise ValueError(
            "`mode` must not be 'Deploy' in a callback, since it folds for "
            'good and changes the keys of checkpoints; call '
            "mmtune.turn_on(model, 'Deploy') on the loaded model yourself")
    return dict(modules=modules, mode=mode, norm_eval=norm_eval,
                activations=activations)


def select(model: nn.Module,
           modules: str | Sequence[str] | None) -> list[nn.Module]:
    """Look up what the argument ``modules`` of :func:`turn_on` names.

    Args:
        model (nn.Module): The model.
        modules (str | Sequence[str], optional): Names of submodules; None is
            the whole model.

    Returns:
        list[nn.Module]: One for each name.

    Raises:
        TypeError: If it is neither a name nor a list of names.
        ValueError: If a name does not exist, or the list is empty.
    """
    if modules is None:
        return [model]
    if isinstance(modules, str):
        modules = [modules]
    if not (isinstance(modules, (list, tuple))
            and all(isinstance(name, str) for name in modules)):
        raise TypeError('`modules` must be a name or a list of names of '
                        f'submodules, but got {modules!r}')
    if not modules:
        raise ValueError('`modules` must name at least one submodule, but '
                         'got an empty list; None takes the whole model')
    return [_submodule(model, name) for name in modules]


def _submodule(model: nn.Module, name: str) -> nn.Module:
    module, path = model, ''
    for part in name.split('.'):
        children = dict(module.named_children())
        if part not in children:
            where = f'{path!r}' if path else 'the model'
            raise ValueError(
                f'`modules` names {name!r}, but {where} has no submodule '
                f'{part!r}; it has {", ".join(children) or "none"}')
        module, path = children[part], f'{path}.{part}'.lstrip('.')
    return module
