"""The ways to run a Conv+BN block that are checked and compared."""
import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from mmtune import native
from mmtune.analysis.modes import put_in_mode
from mmtune.api import latest_runs, turn_off, turn_on
from mmtune.functional.fold import (
    Plan,
    fold_and_run,
    fold_and_run_norm,
    norm_coefficients,
)
from mmtune.layers.convolutions import conv_kind

__all__ = ['PLANS', 'WAYS', 'Forward', 'has_native', 'how_it_ran',
           'put_in_way', 'run_plan', 'way_context']

Forward = Callable[[nn.Sequential, Tensor], Tensor]

# Of a model. 'plain operators' folds as MMEngine's rewrite does: by operators
# that autograd follows.
WAYS = ('Eval', 'plain operators', 'Tune, Python', 'Tune, native', 'Deploy')
# Of a block, called past its modules; None is the path in Python.
PLANS = {'Python': None, 'native, fold': Plan.FOLD,
         'native, scale': Plan.SCALE}


def has_native() -> bool:
    """Whether there is a native node; builds it where need be."""
    try:
        return native.node() is not None
    except native.BuildError:
        return False


@contextlib.contextmanager
def _without_native() -> Iterator[None]:
    """Have blocks run by the path in Python."""
    node = native.node
    # Not `mock.patch`, which takes as long as a small block.
    native.node = lambda: None
    try:
        yield
    finally:
        native.node = node


def way_context(way: str) -> contextlib.AbstractContextManager:
    """Give what has to surround a step of a model.

    Args:
        way (str): One of :data:`WAYS`.

    Returns:
        AbstractContextManager: To be entered once.
    """
    return (_without_native() if way == 'Tune, Python' else
            contextlib.nullcontext())


def put_in_way(model: nn.Module, way: str) -> None:
    """Make a stock model run its blocks in a way, its BatchNorms in eval.

    Args:
        model (nn.Module): Is in train mode afterwards, but for those.
        way (str): One of :data:`WAYS`.

    Raises:
        ValueError: If there is no block in it.
    """
    put_in_mode(model, {'plain operators': 'Eval'}.get(way, way.split(',')[0]))
    if way == 'plain operators':
        report = turn_on(model)
        turn_off(model)
        for row in report.rewritten:
            assert row.conv is not None
            conv = model.get_submodule(row.conv)
            norm = model.get_submodule(row.bn)
            vars(conv)['forward'] = partial(_fold_by_operators, conv, norm)
            vars(norm)['forward'] = nn.Identity().forward


def _fold_by_operators(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """Run an ``nn.Conv2d`` and its normalization as one."""
    coeff = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = conv.weight * coeff.view(-1, 1, 1, 1)
    shift = -norm.running_mean
    if conv.bias is not None:
        shift = conv.bias + shift
    return conv._conv_forward(x, weight, norm.bias + shift * coeff)


def how_it_ran(model: nn.Module) -> dict[str, int]:
    """Count how the blocks of a model in Tune mode ran the last time.

    Args:
        model (nn.Module): Any.

    Returns:
        dict[str, int]: By what :func:`mmtune.api.latest_runs` says.
    """
    found = list(latest_runs(model).values())
    return {how: found.count(how) for how in dict.fromkeys(found)}


def run_plan(plan: Plan | None, block: nn.Sequential, x: Tensor) -> Tensor:
    """Run a convolution or linear layer and its BatchNorm as one.

    Args:
        plan (Plan, optional): Of the native node; None for the path in
            Python.
        block (nn.Sequential): The two; stock.
        x (Tensor): What the first is given.

    Returns:
        Tensor: What the second gives.
    """
    conv, norm = block
    kind = conv_kind(type(conv))
    assert kind is not None
    applied = kind.linear_map(conv, x)
    assert applied is not None
    x, linear_map = applied
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    coeff_shape = kind.coeff_shape(conv, conv.weight.shape)
    tensors = x, conv.weight, conv.bias, norm.weight, norm.bias
    fixed = norm.running_mean, norm.running_var, norm.eps
    if plan is None:
        return fold_and_run(linear_map, *tensors, *norm_coefficients(*fixed),
                            coeff_shape)
    return fold_and_run_norm(linear_map, *tensors, *fixed, coeff_shape, plan)

