"""Compare a network in Tune mode with stock, and count what is fused."""
import dataclasses
import random
import re
import traceback
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

from mmtune import turn_on
from mmtune.analysis.modes import randomize_new_norms
from mmtune.api import NothingFound, latest_runs
from mmtune.matching.pairs import find_pairs
from tests.operators import BatchNormCalls
from tests.oracle import assert_equal_steps, step

# What became of a network. The last two are no business of mmtune's.
STATES = ('equal', 'wrong', 'raised', 'skipped', 'without')
# Of the largest value of a tensor. A step of a deep network in float64 adds
# up to about 1e-11; a formula that is wrong, to 1e-3 and more.
TOLERANCE = 1e-8


@dataclasses.dataclass
class Outcome:
    """What a comparison found.

    Attributes:
        state (str): ``'equal'``, ``'wrong'``, ``'raised'`` (by mmtune),
            ``'skipped'`` (stock cannot be run here) or ``'without'`` (it has
            no normalization by kept statistics).
        detail (str): What was wrong, raised, or kept from running.
        eligible (int): Normalizations whose input is the output of a
            convolution or a linear layer, read by nothing else.
        fused (int): Those of them that ran with it as one.
        left_out (dict[str, int]): How many did not, by mmtune's reason.
    """

    state: str
    detail: str = ''
    eligible: int = 0
    fused: int = 0
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)


class NormCalls(BatchNormCalls):
    """Counts calls of frozen normalizations too, which are plain arithmetic.

    Args:
        model (nn.Module): A stock model: hooks would keep others from fusing.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # By the call, how often the normalization itself read its input.
        self.own_reads: list[tuple[str, int, int]] = []

    @property
    def eligible(self) -> Counter[str]:
        return super().eligible + Counter(
            name for name, output, count in self.own_reads
            if self.reads[output] == count)

    def run(self, *args: Any) -> Any:
        """Call the model, and note what runs."""
        handles = [
            handle for name, norm in norms(self.model).items()
            if is_frozen(norm) for handle in self._watch_module(name, norm)
        ]
        try:
            return super().run(*args)
        finally:
            for handle in handles:
                handle.remove()

    def _watch_module(self, name: str, norm: nn.Module) -> tuple:
        begun = []

        def begin(module, args):
            begun.append((id(args[0]), self.reads[id(args[0])]))

        def end(module, args, output):
            key, before = begun.pop()
            if key in self.outputs:
                self.own_reads.append((name, key, self.reads[key] - before))

        return (norm.register_forward_pre_hook(begin),
                norm.register_forward_hook(end))


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that keep running statistics, whatever their class."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, 'running_mean', None), Tensor)
        and isinstance(getattr(module, 'running_var', None), Tensor)
    }


def is_frozen(norm: nn.Module) -> bool:
    """Whether a normalization is written out, with nothing that learns."""
    return not norm._parameters and 'weight' in norm._buffers


def compare(library: ModuleType,
            name: str,
            tell: Callable[[str], None] = lambda doing: None) -> Outcome:
    """Compare a step of a network in Tune mode with the stock one's.

    In float64: outputs, the gradients of parameters and of the first argument,
    buffers, and the random state that is left. The network is in train mode,
    its normalizations in eval mode.

    Args:
        library (ModuleType): One of ``tests.sweeps.libraries``.
        name (str): Of a network of it.
        tell (Callable): Is told what is about to be done.

    Returns:
        Outcome: No exception of the network or of mmtune leaves this.
    """
    tell('building')
    try:
        stock = prepare(library, name)
        if not norms(stock):
            return Outcome('without')
        model = prepare(library, name)
        tell('running stock')
        expected, calls, args = first_step(library, name, stock)
    except Exception as error:  # stock code: whatever it lacks here
        return Outcome('skipped', describe(error))
    if not all(value.isfinite().all() for value in expected.values()
               if value is not None):
        return Outcome('skipped', 'stock gives numbers that are not finite')
    tell('running in Tune mode')
    return compare_step(model, args, expected, calls)


def compare_step(model: nn.Module, args: tuple, expected: dict[str, Any],
                 before: NormCalls) -> Outcome:
    """Turn a model on, and compare its step with what stock gave."""
    eligible = before.eligible
    outcome = Outcome('equal', eligible=len(eligible))
    try:
        reasons = turn_on_if_any(model)
        after = BatchNormCalls(model)
        actual = whole_step(model, args, after)
    except Exception as error:  # the finding of a sweep
        outcome.state, outcome.detail = 'raised', describe(error)
        return outcome
    runs = latest_runs(model)
    fused = {name for name in eligible if runs.get(name) == 'fused'}
    outcome.fused = len(fused)
    outcome.left_out = dict(Counter(
        reasons.get(name) or f'it ran as {runs.get(name)}'
        for name in eligible.keys() - fused))
    try:
        assert_equal_steps(expected, actual, TOLERANCE)
        missing = norms(model).keys() - reasons.keys()
        assert not missing, f'the report has no row for {sorted(missing)[0]}'
        for name in fused & before.convolved.keys():
            left = before.convolved[name] - eligible[name]
            assert after.convolved[name] == left, (
                f'{name} is said to be fused, but runs by itself')
    except AssertionError as error:
        outcome.state, outcome.detail = 'wrong', describe(error)
    return outcome


def prepare(library: ModuleType, name: str) -> nn.Module:
    """Build a network, the same one at every call, with nothing at zero."""
    seed()
    model = library.build(name).double()
    model.train()  # which gives nothing where it is overridden carelessly
    randomize_new_norms(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in norms(model).values():
            norm.eval()
            if is_frozen(norm):
                norm.running_mean.normal_(std=0.1, generator=generator)
                norm.running_var.uniform_(0.5, 1.5, generator=generator)
                norm.weight.uniform_(0.5, 1, generator=generator)
                norm.bias.normal_(std=0.1, generator=generator)
        for parameter in model.parameters():
            if parameter.numel() and not parameter.any():
                bound = 0.1
                if parameter.dim() > 1:
                    bound = max(parameter[0].numel(), 1)**-0.5
                parameter.uniform_(-bound, bound, generator=generator)
    return model


def seed() -> None:
    """Start every source of random numbers anew."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def first_step(library: ModuleType, name: str, model: nn.Module
               ) -> tuple[dict[str, Any], NormCalls, tuple]:
    """A step at the smallest image that a network takes, and its input."""
    reasons = []
    for size in library.SIZES:
        torch.manual_seed(1)
        try:
            args = tree_map(in_float64, library.inputs(name, model, size))
            calls = NormCalls(model)
            return whole_step(model, args, calls), calls, args
        except Exception as error:  # each has its own for a small image
            reasons.append(error)
    raise reasons[-1]


def in_float64(value: Any) -> Any:
    """A tensor with the precision that the comparison asks for."""
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def whole_step(model: nn.Module, args: tuple,
               calls: BatchNormCalls) -> dict[str, Any]:
    """A step that is watched, and the random state after it.

    The first argument gets a gradient; the others may be targets.
    """
    values, structure = tree_flatten(args)
    places = [i for i, value in enumerate(tree_leaves(args[0]))
              if isinstance(value, Tensor) and value.is_floating_point()]

    def call(_, inputs):
        given = list(values)
        for i, value in zip(places, inputs):
            given[i] = value
        result = calls.run(*tree_unflatten(given, structure))
        return [value for value in tree_leaves(result)
                if isinstance(value, Tensor) and value.is_floating_point()]

    seed()
    result = step(model, tuple(values[i] for i in places), call)
    result['random state'] = torch.get_rng_state().double()
    result['random state of Python'] = torch.tensor(
        [random.random(), np.random.rand()])
    return result


def turn_on_if_any(model: nn.Module) -> dict[str, str]:
    """Turn Tune mode on; gives the reason of each block, empty for most."""
    try:
        rows = turn_on(model).rows
    except NothingFound:
        left_out = find_pairs(model, [model]).left_out
        return {left.norm: left.reason for left in left_out}
    return {row.bn: row.reason for row in rows}


def describe(error: Exception) -> str:
    """Say an error in a line."""
    line = str(error).strip().partition('\n')[0]
    if not line and error.__traceback__:
        line = traceback.extract_tb(error.__traceback__)[-1].line or ''
    # Where it lies on this machine says nothing.
    line = re.sub(r'/\S*/site-packages/', '', line)
    return f'{type(error).__name__}: {line}'[:200]
