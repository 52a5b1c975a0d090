"""Log what a training step takes, and what Tune mode spares it."""
from collections.abc import Callable
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmtune.analysis import peak_bytes
from mmtune.behaviours import FoldingNorm
from mmtune.class_swap import behaviour_of
from mmtune.registry import HOOKS

__all__ = ['StepMemoryHook']

MIB = 2**20


@HOOKS.register_module()
class StepMemoryHook(Hook):
    """Logs the peak of a step each interval, and once what Tune mode spares.

    Two scalars of the run, in MiB, which MMEngine's ``LoggerHook`` writes to
    the log and to every backend of the visualizer, beside its own ``memory``:

    - ``train/peak_memory``: on the CPU the peak of the tensors that the step
      creates (:func:`mmtune.analysis.peak_bytes`), on a GPU the peak of its
      allocator;
    - ``train/spared_memory``: the feature maps that the fused blocks of the
      first step do not keep for backward, and Eval mode would.

    On the CPU a step that is measured takes longer than others.

    Args:
        interval (int): Iterations from one measured step to the next.
            Defaults to 50.

    Raises:
        ValueError: If ``interval`` is not a positive number.

    Example:
        >>> custom_hooks = [dict(type='mmtune.StepMemoryHook', interval=50)]
    """

    # Before the LoggerHook, which writes what is there.
    priority = 'NORMAL'

    def __init__(self, interval: int = 50) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ValueError('`interval` must be a positive number of '
                             f'iterations, but got {interval!r}')
        self.interval = interval
        self._spared = 0
        self._first = True

    def before_train_iter(self,
                          runner: Runner,
                          batch_idx: int,
                          data_batch: Any = None) -> None:
        """Have the coming step measured, where it is due.

        Args:
            runner (Runner): The runner of the training process.
            batch_idx (int): Unused.
            data_batch (optional): Unused.
        """
        if self._first or self.every_n_train_iters(
                runner, self.interval):
            self._measure_next_step(runner)

    def _measure_next_step(self, runner: Runner) -> None:
        model = runner.model
        stock = model.train_step
        own = vars(model).get('train_step')

        def train_step(*args: Any, **kwargs: Any) -> Any:
            # Back in place first: the step may raise.
            if own is None:
                del model.train_step
            else:
                model.train_step = own
            peak, outputs = self._measured(model, stock, *args, **kwargs)
            hub = runner.message_hub
            hub.update_scalar('train/peak_memory', peak / MIB)
            hub.update_scalar('train/spared_memory', self._spared / MIB)
            return outputs

        model.train_step = train_step

    def _measured(self, model: nn.Module, step: Callable, *args: Any,
                  **kwargs: Any) -> tuple[int, Any]:
        """Run a step; give its peak in bytes and its outputs."""
        handles = []
        if self._first:
            self._first = False
            handles = [
                module.register_forward_hook(self._add_spared)
                for module in model.modules()
                if behaviour_of(module) is FoldingNorm
            ]
        try:
            if torch.cuda.is_available():
                outputs = step(*args, **kwargs)
                return torch.cuda.max_memory_allocated(), outputs
            with peak_bytes() as memory:
                outputs = step(*args, **kwargs)
            return memory.peak, outputs
        finally:
            for handle in handles:
                handle.remove()

    def _add_spared(self, norm: nn.Module, inputs: Any,
                    output: torch.Tensor) -> None:
        if norm._tune_state.ran == 'fused' and output.requires_grad:
            self._spared += output.nbytes
