"""A model in one of the paper's modes from the moment it is built."""
from collections.abc import Sequence

from mmengine.dist import is_distributed
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmtune.api import turn_on
from mmtune.registry import MODELS

__all__ = ['TuneModeModel']


def check_not_deploy(owner: str, mode: str) -> None:
    """Refuse Deploy mode where weights are loaded only later.

    Args:
        owner (str): Who cannot have it.
        mode (str): The mode asked for.

    Raises:
        ValueError: If it is ``'Deploy'``.
    """
    if str(mode).lower() == 'deploy':
        raise ValueError(
            f"{owner} cannot have mode 'Deploy', which folds weights that are "
            'loaded only later; use default_hooks=dict(tune_mode=dict('
            "type='mmtune.TuneModeHook', mode='Deploy'))")


@MODELS.register_module()
class TuneModeModel(nn.Module):
    """Builds a model and puts it into a mode.

    What it builds is the model itself, with the behaviour of
    :func:`mmtune.turn_on`: its ``state_dict``, ``train_step``, ``val_step``,
    ``test_step`` and attributes are those of the architecture, checkpoints
    need no key prefix, and a Runner wraps and moves it like any other.

    Deploy mode folds weights for good, so it cannot come before they are
    loaded: use :class:`mmtune.hooks.TuneModeHook` for it.

    Args:
        architecture (dict): Config of any model.
        modules (str | Sequence[str], optional): See
            :func:`mmtune.turn_on`. Defaults to None.
        mode (str): See :func:`mmtune.turn_on`. Defaults to ``'Tune'``.
        norm_eval (bool, optional): See :func:`mmtune.turn_on`. Defaults to
            None.
        data_preprocessor (dict, optional): Goes to an architecture that has
            none; the Runner hands over the config's top-level key here.
            Defaults to None.
        activations (bool): See :func:`mmtune.turn_on`. Defaults to True.

    Raises:
        ValueError: If ``mode`` is ``'Deploy'``, and for what
            :func:`mmtune.turn_on` refuses.

    Example:
        >>> model = dict(
        ...     type='mmtune.TuneModeModel',
        ...     architecture=dict(type='mmdet.RetinaNet', ...),
        ...     modules=['backbone'])
    """

    def __new__(cls,
                architecture: dict,
                modules: str | Sequence[str] | None = None,
                mode: str = 'Tune',
                norm_eval: bool | None = None,
                data_preprocessor: dict | None = None,
                activations: bool = True) -> nn.Module:
        """Build the architecture, not an instance of this class."""
        check_not_deploy(cls.__name__, mode)
        if data_preprocessor is not None:
            architecture = dict(architecture)
            architecture.setdefault('data_preprocessor', data_preprocessor)
        model = MMENGINE_MODELS.build(architecture)
        if not is_distributed():
            # A Runner does it later, and would replace what is rewritten.
            model = revert_sync_batchnorm(model)
        report = turn_on(model, mode, modules, norm_eval, activations)
        print_log(f'{report.mode} mode:\n{report}', logger='current')
        return model
