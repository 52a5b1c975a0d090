"""Log what a training step takes, and what Tune mode spares it."""
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmtune.analysis import peak_on
from mmtune.behaviours.remade import spared
from mmtune.registry import HOOKS
from mmtune.utils.attach import Hook as OwnHook

__all__ = ['StepMemoryHook']

MIB = 2**20


@HOOKS.register_module()
class StepMemoryHook(Hook):
    """Logs the peak of a step each interval, and once what Tune mode spares.

    Two scalars of the run, in MiB, which MMEngine's ``LoggerHook`` writes to
    the log and to every backend of the visualizer, beside its own ``memory``:

    - ``train/peak_memory``: the peak of what the step creates: feature maps,
      gradients, but not parameters and optimizer state. Counted tensor by
      tensor on the CPU, by the allocator on a GPU
      (:func:`mmtune.analysis.peak_on`);
    - ``train/spared_memory``: the feature maps that the fused blocks and the
      activations of that step do not keep for backward, and Eval mode would.
      Those inside of an activation checkpoint count too, though there Eval
      does not keep them until the backward.

    The first step is measured too, and the log says then what is spared.
    Between measured steps MMEngine logs the latest values again. On the CPU a
    step that is measured takes longer than others, and the native node runs by
    operators, which round differently than its own loops; on a GPU the
    allocator's peak starts anew with it, from which MMEngine's ``memory``
    comes, too. A run with ``compile`` is not measured, since that would keep
    torch from compiling.

    Args:
        interval (int): Iterations from one measured step to the next.
            Defaults to 50.

    Raises:
        ValueError: If ``interval`` is not a positive number.

    Example:
        >>> custom_hooks = [dict(type='mmtune.StepMemoryHook', interval=50)]
    """

    def __init__(self, interval: int = 50) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ValueError('`interval` must be a positive number of '
                             f'iterations, but got {interval!r}')
        self.interval = interval
        self._started = False

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
        is_first, self._started = not self._started, True
        if runner.cfg.get('compile'):
            if is_first:
                runner.logger.warning(
                    'StepMemoryHook measures nothing in a run with `compile`; '
                    'start one without it to see what a step takes')
        elif is_first or self.every_n_train_iters(runner, self.interval):
            self._measure_next_step(runner, is_first)

    def _measure_next_step(self, runner: Runner, is_first: bool) -> None:
        model = runner.model
        device = next(model.parameters()).device
        stock = model.train_step
        own = vars(model).get('train_step')

        def train_step(*args: Any, **kwargs: Any) -> Any:
            # Back in place first: the step may raise.
            if own is None:
                del model.train_step
            else:
                model.train_step = own
            before = spared()
            with _spared_by_blocks(model) as maps, peak_on(device) as peak:
                outputs = stock(*args, **kwargs)
            peak_mib, by_blocks = peak() / MIB, sum(maps) / MIB
            by_activations = (spared() - before) / MIB
            hub = runner.message_hub
            hub.update_scalar('train/peak_memory', peak_mib)
            hub.update_scalar('train/spared_memory',
                              by_blocks + by_activations)
            if is_first:
                runner.logger.info(
                    f'A step takes {peak_mib:.1f} MiB at its peak; fused '
                    f'blocks spare it {by_blocks:.1f} MiB and activations '
                    f'{by_activations:.1f} MiB that Eval mode would keep for '
                    'backward')
            return outputs

        model.train_step = train_step


@contextlib.contextmanager
def _spared_by_blocks(model: nn.Module) -> Iterator[list[int]]:
    """Collect the sizes of the maps that fused blocks do not keep."""
    maps: list[int] = []

    def add(norm: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        # A checkpoint runs the forward again, in the backward.
        in_backward = torch._C._current_graph_task_id() != -1
        if (norm._tune_norm.ran == 'fused' and output.requires_grad
                and not in_backward):
            maps.append(output.nbytes)

    # One of a user's would keep the block from fusing.
    hook = OwnHook(add)
    handles = [
        module.register_forward_hook(hook) for module in model.modules()
        if '_tune_norm' in vars(module)
    ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
