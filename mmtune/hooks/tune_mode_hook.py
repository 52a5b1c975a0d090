"""Put a Runner's model into one of the paper's modes, by config."""
import logging
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from mmtune.api import NothingFound, latest_runs, turn_on
from mmtune.behaviours.activation import activation_runs
from mmtune.behaviours.remade import spared
from mmtune.collect_env import native_status
from mmtune.deploy import FoldedNorm
from mmtune.engine.options import CONFIG_KEY, merge_options
from mmtune.registry import HOOKS
from mmtune.report import Row
from mmtune.version import __version__

__all__ = ['TuneModeHook']

MIB = 2**20
# They hold the model as `module` though MMEngine may not register them.
WRAPPERS = (BaseTTAModel, nn.DataParallel,
            nn.parallel.DistributedDataParallel)


@HOOKS.register_module()
class TuneModeHook(Hook):
    """Calls :func:`mmtune.turn_on` on the model when a run starts.

    What to turn on comes from the top-level key ``efficient_conv_bn_eval``:
    a name or a list of names of submodules, as for MMEngine's own rewrite,
    or a dict of the arguments below. Without the key it is the whole model.
    Arguments of the hook win over the key. MMEngine's own rewrite does not
    run where this hook is.

    A model with nothing to turn on trains as stock, with a warning; an empty
    list in the key asks for nothing.

    Deploy mode folds after the weights are loaded, just before training; it
    can neither resume nor go with an ``EMAHook``.

    Args:
        modules (str | Sequence[str], optional): See
            :func:`mmtune.turn_on`. Defaults to None.
        mode (str, optional): See :func:`mmtune.turn_on`. Defaults to None:
            what the key says, or else ``'Tune'``.
        norm_eval (bool, optional): See :func:`mmtune.turn_on`. Defaults to
            None.
        begin (int, optional): Epoch, counted from 0, from which BatchNorms
            are held in eval mode, so that their blocks are cheaper from then
            on; before, the modules run as in the config. For training from
            scratch, where statistics have to settle first. Defaults to None:
            nothing is changed in mid-run.
        activations (bool, optional): See :func:`mmtune.turn_on`. Defaults to
            None: what the key says, or else True.

    Example:
        >>> default_hooks = dict(
        ...     tune_mode=dict(type='mmtune.TuneModeHook'))
        >>> efficient_conv_bn_eval = dict(modules=['backbone'], mode='Tune')
    """

    # Before hooks that copy the model: their copies are to be in the mode too.
    priority = 'VERY_HIGH'

    def __init__(self,
                 modules: str | Sequence[str] | None = None,
                 mode: str | None = None,
                 norm_eval: bool | None = None,
                 begin: int | None = None,
                 activations: bool | None = None) -> None:
        self.arguments = dict(
            modules=modules,
            mode=mode,
            norm_eval=norm_eval,
            begin=begin,
            activations=activations)
        # What to turn on with held BatchNorms, and at which epoch.
        self._to_begin: tuple[dict, int] | None = None
        self._key_in_config: Any = None
        self._pending_deploy: dict | None = None
        self._reported = False
        # What activations had spared before the first iteration, in bytes.
        self._spared = 0
        # Of the table that the log shows already.
        self._rows: list[Row] = []

    def before_run(self, runner: Runner) -> None:
        """Turn the mode on, and keep MMEngine from doing its own rewrite.

        Args:
            runner (Runner): The runner of the run.

        Raises:
            ValueError: If the key or an argument is wrong; the run stops
                before anything is changed.
        """
        _check_sole(runner)
        key = runner.cfg.get(CONFIG_KEY)
        _check_spelling(runner)
        options = merge_options(key, self.arguments)
        if _asks_for_nothing(key) and options.get('modules') == key:
            runner.logger.info(
                f'`{CONFIG_KEY}` names no modules: no mode is turned on')
            return
        begin = options.pop('begin', None)
        if begin is not None:
            _check_begin(runner, begin, options)
            self._to_begin = dict(options, norm_eval=True), begin
        if options['mode'].lower() != 'deploy':
            self._turn_on(runner, options)
        elif not _is_deployed(runner):
            _check_can_deploy(runner)
            self._pending_deploy = options
        # Runner rewrites by itself where the key is set, between here and
        # `before_train`; checkpoints are to hold the config with the key.
        self._key_in_config = runner.cfg.get(CONFIG_KEY)
        if self._key_in_config is not None:
            runner.cfg[CONFIG_KEY] = None

    def before_train(self, runner: Runner) -> None:
        """Give the config its key back; fold for Deploy mode.

        Args:
            runner (Runner): The runner of the training process.
        """
        self._weights_are_loaded(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Mark a checkpoint whose weights are folded.

        Args:
            runner (Runner): The runner of the training process.
            checkpoint (dict): What will be saved.
        """
        if _is_deployed(runner):
            checkpoint['meta']['mmtune_mode'] = 'Deploy'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Make the model fit a checkpoint whose weights are folded.

        Args:
            runner (Runner): The runner that loads.
            checkpoint (dict): What was read.

        Raises:
            ValueError: If the weights are folded and this run is not in
                Deploy mode.
        """
        if checkpoint.get('meta', {}).get('mmtune_mode') != 'Deploy':
            return
        if self._pending_deploy is not None:
            self._turn_on(runner, self._pending_deploy)
            self._pending_deploy = None
        elif not _is_deployed(runner):
            raise ValueError(
                "the checkpoint was written in mode 'Deploy' and holds folded "
                "weights; load it with mode='Deploy' in a Runner, or load a "
                'stock checkpoint')

    def before_val(self, runner: Runner) -> None:
        """See :meth:`before_train`."""
        self._weights_are_loaded(runner)

    def before_test(self, runner: Runner) -> None:
        """See :meth:`before_train`."""
        self._weights_are_loaded(runner)

    def before_train_iter(self,
                          runner: Runner,
                          batch_idx: int,
                          data_batch: Any = None) -> None:
        """Note what was spared before the first iteration.

        Args:
            runner (Runner): The runner of the training process.
            batch_idx (int): Unused.
            data_batch (optional): Unused.
        """
        if not self._reported:
            self._spared = spared()

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        """Log after the first iteration what really was fused and spared.

        Args:
            runner (Runner): The runner of the training process.
            batch_idx (int): Index of the batch in the epoch.
            data_batch (optional): Unused.
            outputs (dict, optional): Unused.
        """
        if not self._reported:
            self._reported = True
            model = _unwrapped(runner.model)
            _log_activations(runner, model, spared() - self._spared)
            _log_runs(runner, model, expect_folds=self._to_begin is None)

    def before_train_epoch(self, runner: Runner) -> None:
        """Hold the BatchNorms, where it is time to.

        Args:
            runner (Runner): The runner of the training process.
        """
        if self._to_begin is not None and runner.epoch >= self._to_begin[1]:
            self._turn_on(runner, self._to_begin[0])
            self._to_begin = None
            self._reported = False

    def _turn_on(self, runner: Runner, options: dict) -> None:
        try:
            report = turn_on(_unwrapped(runner.model), **options)
        except NothingFound as nothing:
            runner.logger.warning(f'{nothing}. The model runs as stock')
            return
        except ValueError as error:
            if self.arguments['modules'] is not None:
                raise
            # By the name that the user wrote.
            raise ValueError(
                str(error).replace('`modules`', f'`{CONFIG_KEY}`')) from error
        # `train()` comes later, and with it `norm_eval` of a backbone.
        report.in_train_mode = 0
        modules = options.get('modules') or 'the whole model'
        is_known = report.rows == self._rows
        table = report.summary() if is_known else f'\n{report}'
        self._rows = report.rows
        runner.logger.info(f'{report.mode} mode in {modules}: {table}')
        if report.mode == 'Tune':
            runner.logger.info(
                f'mmtune {__version__}, native node: {native_status()}')

    def _weights_are_loaded(self, runner: Runner) -> None:
        if self._key_in_config is not None:
            runner.cfg[CONFIG_KEY] = self._key_in_config
        if self._pending_deploy is not None:
            self._turn_on(runner, self._pending_deploy)
            self._pending_deploy = None


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that the names of a config are about."""
    while True:
        if isinstance(model, WRAPPERS) or is_model_wrapper(model):
            model = model.module
        elif '_orig_mod' in model._modules:
            # By its child, since to import its class takes seconds.
            model = model._orig_mod  # `torch.compile(model)`
        else:
            return model


def _asks_for_nothing(key: Any) -> bool:
    return isinstance(key, (list, tuple)) and not key


def _is_deployed(runner: Runner) -> bool:
    return any(isinstance(m, FoldedNorm) for m in runner.model.modules())


def _check_sole(runner: Runner) -> None:
    count = sum(isinstance(hook, TuneModeHook) for hook in runner.hooks)
    if count > 1:
        raise ValueError(
            f'A run takes one TuneModeHook, but got {count}; keep the one in '
            '`default_hooks` or the one in `custom_hooks`')


def _check_spelling(runner: Runner) -> None:
    if CONFIG_KEY in runner.cfg:
        return
    # Without the key it is the whole model, whatever a misspelled one says.
    for name in get_close_matches(CONFIG_KEY, runner.cfg, cutoff=.9):
        raise ValueError(f'the config has a key `{name}`, which nothing '
                         f'reads; write `{CONFIG_KEY}`')


def _check_begin(runner: Runner, begin: Any, options: dict) -> None:
    if not isinstance(begin, int) or begin < 0:
        raise ValueError('`begin` must be an epoch, counted from 0, but got '
                         f'{begin!r}')
    if options['mode'].lower() != 'tune' or options.get('norm_eval'):
        raise ValueError(
            "`begin` goes with mode 'Tune' and holds BatchNorms by itself, "
            f'but got mode={options["mode"]!r} and '
            f'norm_eval={options.get("norm_eval")!r}')
    # Not `runner.train_loop`, which would build one for a validation.
    if isinstance(runner._train_loop, IterBasedTrainLoop):
        raise ValueError(
            '`begin` counts epochs, but the run has an IterBasedTrainLoop; '
            'use train_cfg=dict(by_epoch=True, max_epochs=...)')


def _check_can_deploy(runner: Runner) -> None:
    if getattr(runner, '_resume', False):
        raise ValueError(
            "mode 'Deploy' cannot resume: its checkpoints hold folded "
            'weights; start anew with `load_from` and a stock checkpoint')
    if any(isinstance(hook, EMAHook) for hook in runner.hooks):
        raise ValueError(
            "mode 'Deploy' changes the names of parameters, which an EMAHook "
            'cannot follow; remove the hook or use another mode')


@master_only
def _log_activations(runner: Runner, model: nn.Module, n_bytes: int) -> None:
    counts = Counter(activation_runs(model).values())
    if counts:
        runner.logger.info(
            f'Activations in the first iteration: {_list(counts)}; they spare '
            f'{n_bytes / MIB:.1f} MiB that stock ones would keep for backward')


@master_only
def _log_runs(runner: Runner, model: nn.Module, expect_folds: bool) -> None:
    runs = latest_runs(model)
    if not runs:
        return
    runner.logger.info('Blocks in the first iteration: '
                       f'{_list(Counter(runs.values()))}')
    replaced = [name for name, how in runs.items() if how == 'replaced']
    if replaced:
        runner.logger.warning(
            f'{len(replaced)} of {len(runs)} blocks ran as stock since a '
            f'layer of theirs was replaced (the first is {replaced[0]!r}); '
            'whatever replaces layers has to come before TuneModeHook, whose '
            'priority is VERY_HIGH')
    in_train_mode = [name for name, how in runs.items() if how == 'train mode']
    if in_train_mode and expect_folds:
        # Where activations keep less, that may be all that was hoped for.
        gains = 'one map' in activation_runs(model).values()
        runner.logger.log(
            logging.INFO if gains else logging.WARNING,
            f'{len(in_train_mode)} of {len(runs)} blocks ran as stock since '
            'their BatchNorm is in train mode, which cannot be folded '
            f'(the first is {in_train_mode[0]!r}); to fine-tune with '
            'fixed statistics, set norm_eval=True in the backbone or '
            f'add it to {CONFIG_KEY}=dict(...)')


def _list(counts: Counter) -> str:
    return ', '.join(f'{count} {how}' for how, count in counts.most_common())
