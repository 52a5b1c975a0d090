"""Take a training step, and count what it takes."""
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
)
from torch.utils._pytree import tree_map

from mmtune.analysis.memory import peak_on, saved_bytes
from mmtune.analysis.workloads import Workload

__all__ = ['GRADIENTS', 'Step', 'StepMemory', 'difference',
           'has_bfloat16_kernels']

GRADIENTS = ('params', 'input')
# What torch's GradScaler starts from.
LOSS_SCALE = 2**16

aten = torch.ops.aten
PRODUCTS = (aten.convolution, aten.convolution_backward, aten.mm, aten.addmm,
            aten.bmm)


@dataclass(frozen=True)
class StepMemory:
    """What a step takes, in bytes.

    Attributes:
        kept (int): What the forward keeps for backward, parameters and
            buffers not counted.
        peak (int): The most that was alive at once of what the step creates:
            feature maps, gradients. On a GPU, of what its allocator gave.
        resident (int): Parameters, buffers, the optimizer's state and the
            images, which are there all the time.
    """

    kept: int
    peak: int
    resident: int

    @property
    def total(self) -> int:
        """Bytes: what a device must have for the step."""
        return self.peak + self.resident


class Step:
    """A training step, or one that searches for adversarial examples.

    The optimizer does all of its work with a learning rate of 0, so that
    every step is alike.

    Args:
        model (nn.Module): In the mode to look at, on its device. With
            ``grad_to='input'``, its parameters learn no longer.
        workload (Workload): What to compute.
        grad_to (str): ``'params'``: a training step. ``'input'``: a step of
            projected gradient descent on the images.
        amp (bool): Whether to run under autocast, in float16 on a GPU and in
            bfloat16, which is as large, on a CPU.

    Attributes:
        dtype (torch.dtype, optional): Of autocast.

    Raises:
        ValueError: If ``grad_to`` is another, or no parameter learns.
    """

    def __init__(self,
                 model: nn.Module,
                 workload: Workload,
                 grad_to: str = 'params',
                 amp: bool = False) -> None:
        if grad_to not in GRADIENTS:
            raise ValueError(f'`grad_to` must be one of '
                             f'{", ".join(GRADIENTS)}, but got {grad_to!r}')
        self.model = model
        self._workload = workload
        self._images = workload.images.clone()
        self.dtype: torch.dtype | None = None
        if amp:
            self.dtype = (
                torch.float16 if self._images.is_cuda else torch.bfloat16)
        self._updater = None
        if grad_to == 'input':
            model.requires_grad_(False)
            self._images.requires_grad_()
        elif not any(p.requires_grad for p in model.parameters()):
            raise ValueError("no parameter of the model needs a gradient; "
                             "use grad_to='input' or train some")
        else:
            self._updater = workload.updater(model)
            _create_state(self._updater.optimizer)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that need a gradient, by name."""
        if self._updater is None:
            return dict(images=self._images)
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def loss(self) -> Tensor:
        """Run the forward.

        Returns:
            Tensor: The scalar loss, with its graph.
        """
        # Dropout and samplers draw the same in every step.
        torch.manual_seed(0)
        autocast = contextlib.nullcontext() if self.dtype is None else (
            torch.autocast(self._images.device.type, self.dtype))
        with autocast:
            return self._workload.loss(self.model, self._images)

    def run(self) -> None:
        """Take the step."""
        with self._kernels():
            self._update(self.loss())

    def _update(self, loss: Tensor) -> None:
        if self._updater is not None:
            self._updater.update_params(loss)
            return
        loss.backward()
        with torch.no_grad():
            # Clamped into the ball around the images as PGD does; of radius
            # 0, so that every step is alike.
            moved = self._images + self._images.grad.sign()
            self._images.copy_(
                moved.clamp(self._workload.images, self._workload.images))
        self._images.grad = None

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """Run forward and backward.

        In float16 the loss is scaled as a GradScaler does, by as much as
        leaves all gradients finite.

        Returns:
            tuple[float, dict[str, Tensor]]: The loss, and the gradient of
            each of the leaves that got one, by name.
        """
        scale = LOSS_SCALE if self.dtype == torch.float16 else 1
        while True:
            loss, gradients = self._gradients_by(scale)
            if scale == 1 or all(
                    value.isfinite().all() for value in gradients.values()):
                return loss, gradients
            scale //= 2

    def _gradients_by(self, scale: int) -> tuple[float, dict[str, Tensor]]:
        """Run forward and backward, the latter with the loss scaled."""
        with self._kernels():
            loss = self.loss()
            (loss * scale).backward()
        gradients = {
            # In place: a second copy of all gradients may not fit.
            name: leaf.grad.div_(scale)
            for name, leaf in self.leaves.items() if leaf.grad is not None
        }
        for leaf in self.leaves.values():
            leaf.grad = None
        return loss.item(), gradients

    def memory(self) -> StepMemory:
        """Take the step, counting.

        Returns:
            StepMemory: Counted tensor by tensor on a CPU; ``peak`` by the
            allocator on a GPU.
        """
        if self._images.is_cuda:
            # What libraries allocate once, for good, is not the step's.
            self.run()
        with self._kernels(), peak_on(self._images.device) as peak:
            with saved_bytes(self.model) as saved:
                loss = self.loss()
                kept = saved.total
            self._update(loss)
        return StepMemory(kept, peak(), self._resident())

    def _kernels(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.bfloat16:
            return _bfloat16_in_float32()
        return contextlib.nullcontext()

    def _resident(self) -> int:
        tensors = [
            *self.model.parameters(), *self.model.buffers(), self._images
        ]
        if self._updater is not None:
            tensors += [
                value for state in self._updater.optimizer.state.values()
                for value in state.values() if isinstance(value, Tensor)
            ]
        return sum(tensor.nbytes for tensor in tensors)


def difference(gradients: dict[str, Tensor],
               stock: dict[str, Tensor]) -> float:
    """Compare gradients by the norm of all of them together.

    Args:
        gradients (dict[str, Tensor]): By name.
        stock (dict[str, Tensor]): What they should be, by the same names.

    Returns:
        float: The norm of the difference, divided by that of ``stock``.

    Raises:
        ValueError: If the names differ, or ``stock`` is 0 everywhere.
    """
    if gradients.keys() != stock.keys():
        only = sorted(gradients.keys() ^ stock.keys())
        raise ValueError('gradients must be of the same tensors, but only one '
                         f'side has {", ".join(only[:3])}; compare models '
                         'with the same parameters')
    error = sum((gradients[name].double() - value.double()).square().sum()
                for name, value in stock.items())
    norm = sum(value.double().square().sum() for value in stock.values())
    if not norm:
        raise ValueError('gradients to compare with must not be 0 everywhere; '
                         'compare where something learns')
    return float((error / norm)**.5)


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer create its state, changing no parameter.

    In a run it is there from the second step on.
    """
    for group in optimizer.param_groups:
        group['lr'] = 0.
        for parameter in group['params']:
            # Frozen ones are in the groups too, and never get any.
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


@contextlib.contextmanager
def _bfloat16_in_float32() -> Iterator[None]:
    """Compute in float32 what a CPU cannot, or hardly, in bfloat16.

    What kernels are given and give stays as it is, so that memory is that of
    halves; the copies they compute on are not counted.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_mmcv_in_float32())
        if not has_bfloat16_kernels():
            stack.enter_context(_ProductsInFloat32())
        yield


def has_bfloat16_kernels() -> bool:
    """Tell whether this CPU multiplies numbers in bfloat16 itself.

    Returns:
        bool: If not, torch's own kernels take 10 to 25 times as long as in
        float32.
    """
    return (torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _ProductsInFloat32(TorchDispatchMode):
    """See :func:`_bfloat16_in_float32`."""

    def __torch_dispatch__(self,
                           func: torch._ops.OpOverload,
                           types: Any,
                           args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # What a kernel adds up in float32 is rounded once, in bfloat16 too.
        if (func.overloadpacket not in PRODUCTS
                or not any(map(_is_bfloat16, args))):
            return func(*args, **kwargs)
        found = func(*tree_map(_widen, args), **kwargs)
        return tree_map(_narrow, found)


def _widen(value: Any) -> Any:
    return value.float() if _is_bfloat16(value) else value


def _narrow(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _mmcv_in_float32() -> Iterator[None]:
    """Let MMCV's CPU kernels take bfloat16, as those of a GPU do float16."""
    extension = sys.modules.get('mmcv._ext')
    if extension is None:
        yield
        return
    kernels: dict[str, Any] = {
        name: _in_float32(kernel)
        for name, kernel in vars(extension).items()
        if callable(kernel) and not name.startswith('_')
    }
    with mock.patch.multiple(extension, **kernels):
        yield


def _in_float32(kernel: Callable) -> Callable:

    @wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        halves: list[tuple[Tensor, Tensor]] = []

        def widen(value: Any) -> Any:
            if not _is_bfloat16(value):
                return value
            halves.append((value, value.float()))
            return halves[-1][1]

        if not any(map(_is_bfloat16, [*args, *kwargs.values()])):
            return kernel(*args, **kwargs)
        with _disable_current_modes():
            result = kernel(*map(widen, args),
                            **{k: widen(v) for k, v in kwargs.items()})
            # They write into their arguments, unseen by autograd.
            for value, wide in halves:
                value.data.copy_(wide)
        return result

    return call


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16
