"""Compare a rewritten model with the stock one."""
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics and affine parameters that matter."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like, low, high):
        values = torch.rand(like.shape, generator=generator)
        like.copy_(values * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, _BatchNorm):
                continue
            if module.running_mean is not None:
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.5, 2)
            if module.affine:
                uniform(module.weight, -1.5, 1.5)
                uniform(module.bias, -0.5, 0.5)
    return model


def leaves(output) -> list:
    """The tensors of an output, whatever its structure."""
    if isinstance(output, Tensor):
        return [output]
    return [leaf for item in output for leaf in leaves(item)]


def step(model: nn.Module,
         x: Tensor | tuple,
         call: Callable | None = None) -> dict[str, Tensor]:
    """Outputs, and the gradients of inputs and parameters, by name.

    The loss weighs every output value differently, so that no error cancels.
    """
    model.zero_grad()
    x = tree_map(
        lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), x)
    outputs = leaves((call or (lambda m, x: m(x)))(model, x))
    result = {f'output {i}': out for i, out in enumerate(outputs)}
    loss = sum(
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(
            out.shape)).sum() for out in outputs)
    if loss.requires_grad:
        loss.backward()
    result.update({f'grad of input {i}': tensor.grad
                   for i, tensor in enumerate(leaves(x))})
    for name, parameter in model.named_parameters():
        result[f'grad of {name}'] = parameter.grad
    result.update({f'buffer {k}': v.clone()
                   for k, v in model.state_dict().items()})
    return {
        key: None if value is None else value.detach()
        for key, value in result.items()
    }


def assert_equal_steps(stock: dict[str, Tensor],
                       other: dict[str, Tensor],
                       tolerance: float = 1e-10) -> None:
    """Same keys, same missing gradients, same values.

    Relative to the largest of each tensor, or of the gradients of the same
    module: that of a bias can be zero but for rounding.
    """
    assert stock.keys() == other.keys()
    scales: dict[str, float] = {}
    for key, value in stock.items():
        if value is not None and value.numel():
            largest = float(value.double().abs().max())
            scales[_group(key)] = max(scales.get(_group(key), 1e-3), largest)
    for key, expected in stock.items():
        actual = other[key]
        if expected is None:
            assert actual is None, key
            continue
        assert actual is not None, f'{key} is missing'
        assert actual.dtype == expected.dtype, key
        assert actual.shape == expected.shape, key
        if expected.numel() == 0:
            continue
        error = (actual.double() - expected.double()).abs().max()
        scale = scales[_group(key)]
        assert error <= tolerance * scale, f'{key}: {error:.3g} of {scale:.3g}'


def _group(key: str) -> str:
    return key.rpartition('.')[0] if key.startswith('grad of') else key


def stock_copy(model: nn.Module) -> nn.Module:
    """A copy to compare with, taken before the model is rewritten."""
    return copy.deepcopy(model)


def runs(model: nn.Module) -> list:
    """How the blocks ran, in order."""
    from mmtune.api import latest_runs
    return list(latest_runs(model).values())
