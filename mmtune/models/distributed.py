"""Distributed training in one of the paper's modes."""
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.model import MMDistributedDataParallel
from torch import nn

from mmtune.api import turn_on
from mmtune.models.tune_mode_model import check_not_deploy
from mmtune.registry import MODEL_WRAPPERS

__all__ = ['TuneModeDistributedDataParallel']


@MODEL_WRAPPERS.register_module()
class TuneModeDistributedDataParallel(MMDistributedDataParallel):
    """``MMDistributedDataParallel`` over a model put into a mode.

    Keys of its ``state_dict`` are those of the model, without ``module.``,
    and attributes that it lacks are the model's. MMEngine reads
    ``model_wrapper_cfg`` in distributed runs alone; elsewhere use
    :class:`mmtune.hooks.TuneModeHook` or
    :class:`mmtune.models.TuneModeModel`.

    Args:
        module (nn.Module): The model, on its device.
        modules (str | Sequence[str], optional): See
            :func:`mmtune.turn_on`. Defaults to None.
        mode (str): ``'Train'``, ``'Eval'`` or ``'Tune'``, see
            :func:`mmtune.turn_on`. Defaults to ``'Tune'``.
        norm_eval (bool, optional): See :func:`mmtune.turn_on`. Defaults to
            None.
        activations (bool): See :func:`mmtune.turn_on`. Defaults to True.
        **kwargs: Of ``MMDistributedDataParallel``. ``device_ids`` is ignored
            for a model on the CPU, where it may not be given.

    Raises:
        ValueError: If ``mode`` is ``'Deploy'``, and for what
            :func:`mmtune.turn_on` refuses.

    Example:
        >>> model_wrapper_cfg = dict(
        ...     type='mmtune.TuneModeDistributedDataParallel',
        ...     modules=['backbone'])
    """

    def __init__(self,
                 module: nn.Module,
                 modules: str | Sequence[str] | None = None,
                 mode: str = 'Tune',
                 norm_eval: bool | None = None,
                 activations: bool = True,
                 **kwargs: Any) -> None:
        check_not_deploy(type(self).__name__, mode)
        turn_on(module, mode, modules, norm_eval, activations)
        if next(module.parameters()).device.type == 'cpu':
            kwargs.pop('device_ids', None)
        super().__init__(module=module, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'module':
                raise
            return getattr(self.module, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict:
        """The model's, with its keys."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any,
                        **kwargs: Any) -> Any:
        """Load what the model itself would load."""
        return self.module.load_state_dict(state_dict, *args, **kwargs)
