"""Tune mode in Hugging Face's Trainer."""
from collections.abc import Sequence
from typing import Any

from torch import nn

from mmtune.api import NothingFound, turn_on
from mmtune.arguments import training_options

try:
    from transformers import TrainerCallback
    from transformers.utils import logging
except ImportError as error:
    raise ImportError('mmtune.huggingface needs the package `transformers`; '
                      'install it') from error

__all__ = ['TuneModeCallback']

logger = logging.get_logger(__name__)


class TuneModeCallback(TrainerCallback):
    """Calls :func:`mmtune.turn_on` on the model when training begins.

    Checkpoints are those of the stock model. A model with nothing to turn on
    trains as stock, with a warning.

    Args:
        modules (str | Sequence[str], optional): See :func:`mmtune.turn_on`.
            Defaults to None.
        mode (str): ``'Train'``, ``'Eval'`` or ``'Tune'``. Defaults to
            ``'Tune'``.
        norm_eval (bool, optional): See :func:`mmtune.turn_on`; the Trainer
            puts the model into train mode at every step, and ``True`` holds
            its BatchNorms in eval mode. Defaults to None.
        activations (bool): See :func:`mmtune.turn_on`. Defaults to True.

    Raises:
        ValueError: For a wrong argument, and for mode ``'Deploy'``.

    Example:
        >>> trainer = Trainer(model, arguments, train_dataset=dataset,
        ...                   callbacks=[TuneModeCallback(norm_eval=True)])
    """

    def __init__(self,
                 modules: str | Sequence[str] | None = None,
                 mode: str = 'Tune',
                 norm_eval: bool | None = None,
                 activations: bool = True) -> None:
        self.options = training_options(modules, mode, norm_eval, activations)

    def on_train_begin(self, args: Any, state: Any, control: Any,
                       model: nn.Module, **kwargs: Any) -> None:
        """See ``transformers.TrainerCallback``."""
        try:
            report = turn_on(model, **self.options)
        except NothingFound as nothing:
            logger.warning(f'{nothing}. The model trains as stock')
        else:
            logger.info(f'mmtune: {report.summary()}')
