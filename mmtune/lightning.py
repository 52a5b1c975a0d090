"""Tune mode in Lightning: ``Trainer(callbacks=[TuneMode()])``."""
from collections.abc import Sequence
from typing import Any

from torch import nn

from mmtune.api import NothingFound, turn_on
from mmtune.arguments import training_options

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
except ImportError:
    try:
        from pytorch_lightning import Callback
        from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
    except ImportError as error:
        raise ImportError(
            'mmtune.lightning needs Lightning, but found neither `lightning` '
            'nor `pytorch_lightning`; install one of them') from error

__all__ = ['TuneMode']


class TuneMode(Callback):
    """Calls :func:`mmtune.turn_on` on the module when a run starts.

    That is when ``fit``, ``validate``, ``test`` or ``predict`` begins, after
    the weights are loaded and the module is on its device. Checkpoints are
    those of the stock module. A module with nothing to turn on runs as stock,
    with a warning.

    Args:
        modules (str | Sequence[str], optional): See :func:`mmtune.turn_on`;
            names are those of the ``LightningModule``. Defaults to None.
        mode (str): ``'Train'``, ``'Eval'`` or ``'Tune'``. Defaults to
            ``'Tune'``.
        norm_eval (bool, optional): See :func:`mmtune.turn_on`; Lightning puts
            a module into train mode when a fit begins, and ``True`` holds its
            BatchNorms in eval mode. Defaults to None.
        activations (bool): See :func:`mmtune.turn_on`. Defaults to True.

    Raises:
        ValueError: For a wrong argument, and for mode ``'Deploy'``.

    Example:
        >>> trainer = Trainer(callbacks=[TuneMode(norm_eval=True)])
        >>> trainer.fit(module, loader)
    """

    def __init__(self,
                 modules: str | Sequence[str] | None = None,
                 mode: str = 'Tune',
                 norm_eval: bool | None = None,
                 activations: bool = True) -> None:
        self.options = training_options(modules, mode, norm_eval, activations)
        self._turned_on: nn.Module | None = None

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """See Lightning's ``Callback``."""
        self._turn_on(pl_module)

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """See Lightning's ``Callback``."""
        self._turn_on(pl_module)

    def on_test_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """See Lightning's ``Callback``."""
        self._turn_on(pl_module)

    def on_predict_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """See Lightning's ``Callback``."""
        self._turn_on(pl_module)

    def _turn_on(self, module: nn.Module) -> None:
        # A fit validates as well.
        if self._turned_on is module:
            return
        try:
            report = turn_on(module, **self.options)
        except NothingFound as nothing:
            rank_zero_warn(f'{nothing}. The module runs as stock')
        else:
            rank_zero_info(f'mmtune: {report.summary()}')
        self._turned_on = module
