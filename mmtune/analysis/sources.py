"""Get a model to look into: from a config, a callable, a checkpoint.

A model from a callable needs torch alone; what belongs to MMEngine is
imported where a config is read.
"""
import importlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmtune.api import turn_off
from mmtune.engine.options import CONFIG_KEY, OPTIONS, merge_options

if TYPE_CHECKING:
    from mmengine.config import Config

__all__ = [
    'build_model', 'call_for_model', 'load_config', 'load_fitting',
    'optimizer_options', 'read_state_dict', 'trains_with_amp',
    'tune_options'
]

# Where configs name weights to load, beside an `init_cfg`.
PRETRAINED = ('pretrained', 'teacher_ckpt')


def load_config(path: str) -> 'Config':
    """Read a config.

    Args:
        path (str): Path of a file, or such as
            ``'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'``.

    Returns:
        Config: The config.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If it takes a package that is not installed.
        ValueError: If it has no model.
    """
    from mmengine.config import Config
    if '::' in path:
        config = Config.fromstring(f'_base_ = {path!r}', '.py')
    else:
        config = Config.fromfile(path)
    if not config.get('model'):
        raise ValueError(f'{path} has no `model`, but has '
                         f'{", ".join(config) or "nothing"}; pass the config '
                         'of a whole run')
    return config


def build_model(config: 'Config', pretrained: bool = False) -> nn.Module:
    """Build the model of a config as a Runner would, in train mode.

    It is stock, also where the config wraps it in a
    :class:`mmtune.models.TuneModeModel`.

    Args:
        config (Config): With a ``model``.
        pretrained (bool): Whether to load the weights that the model's
            config names. Defaults to False: nothing is loaded or fetched.

    Returns:
        nn.Module: The model, on the CPU.

    Raises:
        OSError: If the weights can be neither found nor fetched.
        ValueError: If it cannot be built from these settings.
    """
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, DefaultScope
    settings = config.model.to_dict()
    if config.get('data_preprocessor'):
        settings.setdefault('data_preprocessor', config.data_preprocessor)
    if not pretrained:
        settings = _without_weights(settings)
    scope = config.get('default_scope', 'mmengine')
    with DefaultScope.overwrite_default_scope(scope):
        try:
            model = MODELS.build(ConfigDict(settings))
        except (KeyError, TypeError) as error:
            raise ValueError(
                "the config's `model` cannot be built here: "
                f'{error.args[0] if error.args else error!r}') from error
        # Without weights to load too: proposals and biases of heads have
        # initial values without which a step makes no sense.
        if hasattr(model, 'init_weights'):
            _init_weights(model)
    turn_off(model)
    # Some return nothing.
    model.train()
    return model


def _init_weights(model: Any) -> None:
    try:
        model.init_weights()
    except (OSError, ImportError) as error:
        raise OSError(
            'the weights that the config names cannot be loaded here '
            f'({error}); pass a checkpoint beside the config') from error


def _without_weights(settings: Any) -> Any:
    # Other initializations stay: without them some heads do not work.
    if isinstance(settings, dict):
        return {
            key: None if key in PRETRAINED or _is_pretrained(value) else
            _without_weights(value)
            for key, value in settings.items()
        }
    if isinstance(settings, (list, tuple)):
        return type(settings)(
            _without_weights(item) for item in settings
            if not _is_pretrained(item))
    return settings


def _is_pretrained(settings: Any) -> bool:
    return isinstance(settings, dict) and _is_of(settings, 'Pretrained')


def tune_options(config: 'Config') -> dict[str, Any]:
    """Read which mode a config turns on, and where.

    Args:
        config (Config): With or without the key ``efficient_conv_bn_eval``
            and something of mmtune's that turns a mode on: a
            :class:`mmtune.hooks.TuneModeHook`, or a wrapper of
            :mod:`mmtune.models`.

    Returns:
        dict[str, Any]: What is given of ``modules``, ``mode``, ``norm_eval``
        and ``begin``, as in a run. Without ``mode`` where nothing of
        mmtune's turns one on; then MMEngine's own rewrite takes the key.

    Raises:
        ValueError: For options that would stop the run.
    """
    hooks = [
        *(config.get('default_hooks') or {}).values(),
        *(config.get('custom_hooks') or [])
    ]
    key = config.get(CONFIG_KEY)
    for hook in hooks:
        if _is_of(hook, 'TuneModeHook'):
            return merge_options(key, _own_options(hook))
    for wrapper in (config.get('model'), config.get('model_wrapper_cfg')):
        if _is_of(wrapper, 'TuneMode'):
            return merge_options(None, _own_options(wrapper))
    options = merge_options(key, {})
    del options['mode']
    return options


def _is_of(settings: Any, name: str) -> bool:
    return name in str((settings or {}).get('type'))


def _own_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in OPTIONS if name in settings}


def optimizer_options(config: 'Config') -> dict[str, Any]:
    """Read what a config trains with.

    Args:
        config (Config): With or without an ``optim_wrapper``.

    Returns:
        dict[str, Any]: Arguments of the optimizer, such as ``type`` and
        ``lr``; empty where the config has not one optimizer.
    """
    return dict((config.get('optim_wrapper') or {}).get('optimizer') or {})


def trains_with_amp(config: 'Config') -> bool:
    """Tell whether a config trains in mixed precision.

    Args:
        config (Config): With or without an ``optim_wrapper``.

    Returns:
        bool: Whether that is MMEngine's ``AmpOptimWrapper``.
    """
    return _is_of(config.get('optim_wrapper'), 'AmpOptimWrapper')


def call_for_model(path: str) -> nn.Module:
    """Call a function without arguments to get a model.

    Args:
        path (str): ``'module:callable'``, such as
            ``'torchvision.models:resnet50'``.

    Returns:
        nn.Module: The model, stock, on the CPU, in train mode.

    Raises:
        ValueError: If the path is not of this form, names nothing, or names
            what cannot be called without arguments or gives no model.
        ImportError: If the module cannot be imported.
    """
    module_name, colon, name = path.partition(':')
    if not (module_name and colon and name):
        raise ValueError('a model is named module:callable, such as '
                         f'torchvision.models:resnet50, but got {path!r}')
    module = importlib.import_module(module_name)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f'the module {module_name!r} has no callable '
                         f'{name!r}; name a function or a class in it')
    try:
        model = function()
    except TypeError as error:
        raise ValueError(
            f'{path} must take no arguments, but raised {error}; name a '
            'function that gives the model') from error
    if not isinstance(model, nn.Module):
        raise ValueError(f'{path} must return a torch.nn.Module, but '
                         f'returned {type(model).__name__}')
    turn_off(model)
    model.train()
    return model.cpu()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, without running what it holds.

    Args:
        path (str | Path): Written by MMEngine's Runner or by ``torch.save``.

    Returns:
        dict[str, Tensor]: Parameters and buffers by name, on the CPU,
        without the prefix that distributed training puts before each.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none, holds no tensors, or was written in Deploy
            mode.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f'there is no checkpoint {str(path)!r}; pass a local file')
    try:
        from mmtune.engine.checkpoint import allow_mmengine_checkpoints
    except ImportError:
        pass  # without MMEngine there are none of its checkpoints
    else:
        allow_mmengine_checkpoints()
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f'{path} cannot be read as a checkpoint '
            f'({type(error).__name__}); pass a file that torch.save wrote, '
            'with tensors by name') from error
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    if meta and meta.get('mmtune_mode') == 'Deploy':
        raise ValueError(
            f"{path} was written in mode 'Deploy', which has folded the "
            'statistics away; pass a checkpoint from before')
    state_dict = _find_state_dict(checkpoint)
    tensors = {
        name: value
        for name, value in state_dict.items() if isinstance(value, Tensor)
    }
    if not tensors:
        raise ValueError(f'{path} holds no tensors by name; pass a checkpoint '
                         'with a state_dict')
    if all(name.startswith('module.') for name in tensors):
        tensors = {
            name.removeprefix('module.'): value
            for name, value in tensors.items()
        }
    return tensors


def _find_state_dict(checkpoint: Any) -> Mapping:
    if not isinstance(checkpoint, Mapping):
        return {}
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    return checkpoint


def load_fitting(model: nn.Module, state_dict: Mapping[str, Tensor]) -> int:
    """Load the tensors that a model has by the same name and shape.

    Args:
        model (nn.Module): The model; others of its tensors stay.
        state_dict (Mapping[str, Tensor]): By name.

    Returns:
        int: How many were loaded.

    Raises:
        ValueError: If none fits.
    """
    own = model.state_dict()
    fitting = {
        name: value
        for name, value in state_dict.items()
        if name in own and own[name].shape == value.shape
    }
    if not fitting:
        raise ValueError(
            'no tensor of the checkpoint fits the model: it has such as '
            f'{next(iter(state_dict))!r}, the model such as '
            f'{next(iter(own))!r}; pass the config or the callable that the '
            'checkpoint was made with')
    model.load_state_dict(fitting, strict=False)
    return len(fitting)
