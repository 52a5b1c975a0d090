"""Count from outside, by the operators that run, what can be fused.

Nothing here knows mmtune: a model is watched the same way before and after.
"""
import contextlib
from collections import Counter
from typing import Any
from unittest import mock

import torch
from mmcv.ops.deform_conv import DeformConv2dFunction
from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2dFunction
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
LINEAR = (aten.addmm, aten.mm, aten.linear)
CONVOLUTIONS = (aten.convolution, *LINEAR)
VIEWS = (aten.view, aten._unsafe_view)
# They run outside of torch's dispatcher.
EXTENSIONS = (DeformConv2dFunction, ModulatedDeformConv2dFunction)


class BatchNormCalls(TorchDispatchMode):
    """Runs a model, and counts its batch normalizations by their names.

    Only those with running statistics count whose input is the output of a
    convolution or a linear layer; that of a linear layer may be seen as a
    matrix or as tokens in between.

    Args:
        model (nn.Module): A ``running_mean`` tells whose call it is; one
            that belongs to no module is counted as ``'?'``.

    Attributes:
        convolved (Counter[str]): All these calls.
        eligible (Counter[str]): Those whose input nothing else reads.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {
            id(module.running_mean): name
            for name, module in model.named_modules()
            if hasattr(module, 'running_mean')
        }
        # By id, which tells tensors apart for as long as they are kept.
        self.outputs: dict[int, Tensor] = {}
        # Of linear layers, by the id of a view that of the output.
        self.linear: dict[int, int] = {}
        self.reads: Counter[int] = Counter()
        self.calls: list[tuple[str, int]] = []

    @property
    def convolved(self) -> Counter[str]:
        return Counter(name for name, _ in self.calls)

    @property
    def eligible(self) -> Counter[str]:
        return Counter(name for name, output in self.calls
                       if self.reads[output] == 1)

    def run(self, *args: Any) -> Any:
        """Call the model, and note what runs."""
        with contextlib.ExitStack() as stack:
            for extension in EXTENSIONS:
                watched = self._watched(extension.forward)
                stack.enter_context(
                    mock.patch.object(extension, 'forward', watched))
            stack.enter_context(self)
            result = self.model(*args)
        self._read(result)
        return result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in VIEWS and self._is_map(args[0], output):
            self.outputs[id(output)] = output
            self.linear[id(output)] = self._origin(args[0])
            return output
        self._read((args, kwargs))
        if func.overloadpacket in CONVOLUTIONS:
            self.outputs[id(output)] = output
            if func.overloadpacket in LINEAR:
                self.linear[id(output)] = id(output)
        elif 'batch_norm' in func.__name__:
            names = (argument.name for argument in func._schema.arguments)
            self._note(**dict(zip(names, args)))
        return output

    def _origin(self, output: Tensor) -> int:
        return self.linear.get(id(output), id(output))

    def _is_map(self, output: Tensor, view: Tensor) -> bool:
        """Whether a view of a linear layer's output has its channels."""
        return id(output) in self.linear and view.shape[-1:] == (
            output.shape[-1:])

    def _note(self, input, training=True, running_mean=None, **_) -> None:
        is_output = id(input) in self.outputs and not (
            id(input) in self.linear and input.dim() != 2)
        if is_output and not training:
            name = self.names.get(id(running_mean), '?')
            self.calls.append((name, self._origin(input)))

    def _read(self, values: Any) -> None:
        self.reads.update(
            self._origin(value) for value in tree_leaves(values)
            if id(value) in self.outputs)

    def _watched(self, forward):

        def watched(ctx, *args):
            self._read(args)
            output = forward(ctx, *args)
            self.outputs[id(output)] = output
            return output

        return staticmethod(watched)
