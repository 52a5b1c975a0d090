"""Measure what Tune mode costs, and write docs/en/cost.md from the result.

Each benchmark rewrites copies of one stock model, one a mode, and measures
them side by side. Run those named, or all of them::

    python tests/benchmarks/cost.py [NAME ...] --json docs/en/cost.json

and turn what was kept into the page::

    python tests/benchmarks/cost.py --json docs/en/cost.json \
        --docs docs/en/cost.md
"""
import argparse
import contextlib
import copy
import json
import operator
import shlex
import statistics
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model.efficient_conv_bn_eval import (
    turn_on_efficient_conv_bn_eval_for_single_model,
)
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from mmtune import native, turn_on
from mmtune.analysis import peak_bytes, saved_bytes
from mmtune.analysis.machine import describe_commit, describe_machine
from mmtune.analysis.timing import interleaved_seconds, quartiles
from mmtune.api import latest_runs

ROOT = Path(__file__).resolve().parents[2]

# The names of the paper's table, and the configs they are taken from.
BACKBONES = {
    'ResNet-50': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'ResNeXt-101 32x4d': 'faster_rcnn/faster-rcnn_x101-32x4d_fpn_1x_coco.py',
    'RegNetX-3.2GF': 'regnet/faster-rcnn_regnetx-3.2GF_fpn_1x_coco.py',
    'HRNetV2-W32': 'hrnet/faster-rcnn_hrnetv2p-w32_1x_coco.py',
    'MobileNetV2': 'trees/retinanet_mobilenet-v2_fpn_250i_trees.py'
}
# Two ways to activate: in place (ReLU), and with its input kept (SiLU).
COMPILED = {
    'ResNet-18': dict(type='ResNet', depth=18, norm_eval=True),
    'ResNet-50': dict(type='ResNet', depth=50, norm_eval=True),
    'CSPDarknet-S': dict(type='CSPDarknet', deepen_factor=.33,
                         widen_factor=.5, norm_eval=True)
}

# --------------------------------------------------------------------------
# Models and modes
# --------------------------------------------------------------------------


def rewrite_and_compile(mode: str, model: nn.Module) -> None:
    """Let torch decide what is kept, without the time of generating code."""
    REWRITES[mode](model)
    model.compile(backend='aot_eager_decomp_partition', fullgraph=True)


PYTHON = 'Tune, Python path'
REWRITES: dict[str, Callable[[nn.Module], object]] = {
    'Eval': lambda model: None,
    'MMEngine': turn_on_efficient_conv_bn_eval_for_single_model,
    'Tune': partial(turn_on, activations=False),
    PYTHON: partial(turn_on, activations=False),
    'Deploy': partial(turn_on, mode='Deploy'),
}
MODES = tuple(REWRITES)
COMPILED_MODES = ('Eval, compiled', 'Tune, compiled', 'Deploy, compiled')
REWRITES.update({
    mode: partial(rewrite_and_compile, mode.partition(',')[0])
    for mode in COMPILED_MODES
})


@contextlib.contextmanager
def running(mode: str) -> Iterator[None]:
    """Take the native node away where a mode runs without it."""
    node = native.node
    if mode == PYTHON:
        native.node = lambda: None
    try:
        yield
    finally:
        native.node = node


def calls_of(models: Mapping[str, nn.Module],
             make: Callable[[nn.Module], Callable[[], object]]
             ) -> dict[str, Callable[[], object]]:
    """Make a call for each mode."""

    def call_of(mode: str, model: nn.Module) -> Callable[[], object]:
        with running(mode):
            call = make(model)
        # The others are not to wait for what this one needs.
        return running(mode)(call) if mode == PYTHON else call

    return {mode: call_of(mode, model) for mode, model in models.items()}


def stock(model: nn.Module, device: str) -> nn.Module:
    """Put a model into stock Eval mode, with statistics that matter.

    Values are bounded away from 0, since arithmetic on denormal numbers takes
    longer.
    """
    model.train()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.eval()
            nn.init.uniform_(norm.running_mean, -.5, .5)
            nn.init.uniform_(norm.running_var, .5, 2)
            nn.init.uniform_(norm.weight, .5, 1.5)
            nn.init.uniform_(norm.bias, -.5, .5)
    return model.to(device)


def backbone(name: str, device: str, frozen_stages: int = -1) -> nn.Module:
    """Build a backbone of :data:`BACKBONES`, with random weights."""
    register_all_modules()
    settings = Config.fromfile(ROOT / 'configs' / BACKBONES[name])
    settings = settings.model.backbone
    settings.update(norm_eval=True, init_cfg=None)
    settings.pop('frozen_stages', None)
    if frozen_stages >= 0:
        settings.frozen_stages = frozen_stages
    return stock(MODELS.build(settings), device)


def blocks(count: int, channels: int, kernel: int, device: str) -> nn.Module:
    """Chain blocks of a convolution and a BatchNorm."""
    return stock(
        nn.Sequential(*[
            nn.Sequential(
                nn.Conv2d(
                    channels,
                    channels,
                    kernel,
                    padding=kernel // 2,
                    bias=False), nn.BatchNorm2d(channels))
            for _ in range(count)
        ]), device)


def variants(model: nn.Module,
             modes: Iterable[str] = MODES
             ) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Rewrite copies of a model.

    Args:
        model (nn.Module): From :func:`stock`.
        modes (Iterable[str]): Of :data:`REWRITES`.

    Returns:
        tuple[dict, dict]: A model for each mode, and what was raised for
        those modes that MMEngine's rewrite failed in.
    """
    models, failed = {}, {}
    for mode in modes:
        rewritten = copy.deepcopy(model)
        try:
            REWRITES[mode](rewritten)
        except Exception as error:
            # That it raises on this model is a result; for mmtune, a bug.
            if mode != 'MMEngine':
                raise
            failed[mode] = type(error).__name__
        else:
            models[mode] = rewritten
    return models, failed


def forward_backward(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Make a forward and backward with a given gradient of each output."""

    def forward() -> list[Tensor]:
        outputs = model(x)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        # Those of frozen stages have no backward.
        return [output for output in outputs if output.requires_grad]

    gradients = [torch.ones_like(output) for output in forward()]
    return lambda: torch.autograd.backward(forward(), gradients)


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Make a step of SGD with momentum."""
    # Without a learning rate it does the same work, and every step is alike.
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], 0., momentum=.9)
    run = forward_backward(model, x)

    def step() -> None:
        optimizer.zero_grad()
        run()
        optimizer.step()

    return step


def clear_gradients(tensors: list[Tensor]) -> None:
    """Do what ``zero_grad`` does, without a search through the modules."""
    for tensor in tensors:
        tensor.grad = None


# --------------------------------------------------------------------------
# Benchmarks
# --------------------------------------------------------------------------


@dataclass
class Row:
    """One model on one input, in several modes.

    Attributes:
        case (dict[str, object]): What was measured, by title of a column.
        rounds (list[dict[str, float]]): Bytes or seconds of each mode; one
            round where they are the same in every round.
        failed (dict[str, str]): What the modes raised that could not run.
    """

    case: dict[str, object]
    rounds: list[dict[str, float]]
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """What all benchmarks of a run share."""

    device: str
    rounds: int
    progress: Progress

    def images(self, height: int, width: int) -> Tensor:
        """Make a batch of two."""
        return torch.randn(2, 3, height, width, device=self.device)

    def track(self, items: Iterable, total: int, what: str) -> Iterator:
        """Show how far a loop is."""
        yield from self.progress.track(items, total, description=what)

    def time(self, calls: Mapping[str, Callable], what: str) -> list[dict]:
        """Time calls for as many rounds as the run has, showing progress."""
        return list(
            self.track(
                interleaved_seconds(calls, self.rounds), self.rounds, what))


def kept(run: Run,
         backbones: Sequence[str] = tuple(BACKBONES),
         images: Sequence[tuple[int, int]] = ((384, 672), (224, 224),
                                              (64, 64))) -> Iterator[Row]:
    """Count what a forward keeps where every parameter learns."""
    for name in run.track(backbones, len(backbones), 'kept'):
        model = backbone(name, run.device)
        for image in images:
            x = run.images(*image)
            yield _kept(dict(backbone=name) | _case(x), model, x)


def kept_for_input(run: Run,
                   backbones: Sequence[str] = tuple(BACKBONES),
                   image: tuple[int, int] = (384, 672)) -> Iterator[Row]:
    """Count what a forward keeps where only the input learns."""
    for name in run.track(backbones, len(backbones), 'kept-for-input'):
        model = backbone(name, run.device).requires_grad_(False)
        x = run.images(*image).requires_grad_()
        yield _kept(dict(backbone=name), model, x)


def compiled(run: Run,
             backbones: Sequence[str] = tuple(COMPILED),
             dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
             image: tuple[int, int] = (384, 384)) -> Iterator[Row]:
    """Count what a forward keeps under ``torch.compile``, and without."""
    register_all_modules()
    cases = [(name, dtype) for name in backbones for dtype in dtypes]
    for name, dtype in run.track(cases, len(cases), 'compiled'):
        torch.compiler.reset()
        model = stock(MODELS.build(COMPILED[name]), run.device)
        case = dict(backbone=name, dtype=str(dtype).rpartition('.')[2])
        amp = torch.autocast(run.device, dtype,
                             enabled=dtype != torch.float32)
        with amp:
            row = _kept(case, model, run.images(*image),
                        ('Eval', 'Tune', 'Deploy', *COMPILED_MODES))
        yield row


def _kept(case: dict[str, object], model: nn.Module, x: Tensor,
          modes: Iterable[str] = MODES) -> Row:
    models, failed = variants(model, modes)
    kept: dict[str, float] = {}
    for mode, rewritten in models.items():
        with running(mode), saved_bytes(rewritten) as saved:
            # What is kept lives as long as the outputs do.
            _outputs = rewritten(x)
            kept[mode] = saved.total
        del _outputs
    return Row(case, [kept], failed)


class Operators(TorchDispatchMode):
    """Counts operators, but for views; the native node runs by them then."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        # A view has an alias among what it returns.
        if not any(out.alias_info for out in func._schema.returns):
            self.count += 1
        return func(*args, **(kwargs or {}))


def operators(run: Run) -> Iterator[Row]:
    """Count the operators of a block where no CPU kernel serves."""
    layers = {
        'convolution': (nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8),
                        torch.randn(2, 8, 64, 64)),
        'linear': (nn.Linear(8, 8), nn.BatchNorm1d(8), torch.randn(64, 8))
    }
    for name, (layer, norm, x) in layers.items():
        block = stock(nn.Sequential(layer, norm), run.device)
        models, failed = variants(block)
        x = x.to(run.device).requires_grad_()
        counts: dict[str, float] = {}
        for mode, model in models.items():
            output = model(x)
            gradient = torch.ones_like(output)
            leaves = [x, *model.parameters()]
            with running(mode), Operators() as counted:
                torch.autograd.grad(model(x), leaves, gradient)
            counts[mode] = counted.count
        yield Row(dict(block=name), [counts], failed)


def peak(run: Run,
         backbones: Sequence[str] = tuple(BACKBONES),
         image: tuple[int, int] = (384, 672)) -> Iterator[Row]:
    """Follow the tensors of a forward and backward."""
    for name in run.track(backbones, len(backbones), 'peak'):
        models, failed = variants(backbone(name, run.device))
        x = run.images(*image)
        created: dict[str, float] = {}
        there: dict[str, float] = {}
        for mode, model in models.items():
            with running(mode):
                step = forward_backward(model, x)
                # The first creates the gradients, the second adds to them.
                for peaks in (created, there):
                    with peak_bytes() as memory:
                        step()
                    peaks[mode] = memory.peak
            clear_gradients(list(model.parameters()))
        for gradients, peaks in (('created in the step', created),
                                 ('there before', there)):
            case = dict(backbone=name, gradients=gradients)
            yield Row(case, [peaks], failed)


def step(run: Run,
         image: tuple[int, int] = (400, 672)) -> Iterator[Row]:
    """Time training steps of a ResNet-50."""
    yield _step(run, image, 'step')


def frozen(run: Run,
           image: tuple[int, int] = (400, 672)) -> Iterator[Row]:
    """Time training steps of a ResNet-50 that is frozen up to stage 2."""
    yield _step(run, image, 'frozen', frozen_stages=2)


def _step(run: Run, image: tuple[int, int], what: str,
          frozen_stages: int = -1) -> Row:
    x = run.images(*image)
    models, failed = variants(
        backbone('ResNet-50', run.device, frozen_stages))
    calls = calls_of(models, partial(training_step, x=x))
    return Row(_case(x), run.time(calls, what), failed)


def validation(run: Run,
               images: Iterable[tuple[int, int]] = ((400, 672), (64, 64))
               ) -> Iterator[Row]:
    """Time forwards of a ResNet-50 without gradients."""
    model = backbone('ResNet-50', run.device)
    model.eval()
    for image in images:
        x = run.images(*image)
        models, failed = variants(model)
        calls = calls_of(models, lambda m, x=x: partial(m, x))
        with torch.no_grad():
            yield Row(_case(x), run.time(calls, 'validation'), failed)


def small(run: Run, count: int = 20) -> Iterator[Row]:
    """Time blocks that are so small that only their number counts."""
    yield _chain(run, MODES, count, channels=8, kernel=1, side=4)


def sweep(run: Run,
          channels: Iterable[int] = (8, 16, 32, 64, 128, 256, 512),
          kernels: Iterable[int] = (1, 3),
          sides: Iterable[int] = (4, 8, 16, 32, 64),
          largest: int = 2**18,
          count: int = 4) -> Iterator[Row]:
    """Time blocks of many sizes, with maps of at most ``largest`` elements.

    Larger ones would take a minute each.
    """
    cells = [
        dict(channels=c, kernel=k, side=s) for k in kernels for c in channels
        for s in sides if 2 * c * s * s <= largest
    ]
    modes = ('Eval', 'Tune', PYTHON, 'Deploy')
    for cell in run.track(cells, len(cells), 'sweep'):
        yield _chain(run, modes, count, **cell)


def _chain(run: Run, modes: Iterable[str], count: int, channels: int,
           kernel: int, side: int) -> Row:
    """Time forward and backward of a chain of blocks, each block's share."""
    models, failed = variants(
        blocks(count, channels, kernel, run.device), modes)
    # As in the middle of a network.
    x = torch.randn(
        2, channels, side, side, device=run.device, requires_grad=True)

    def call(model: nn.Module) -> Callable[[], None]:
        leaves = [x, *model.parameters()]
        run_once = forward_backward(model, x)

        def step() -> None:
            clear_gradients(leaves)
            run_once()

        return step

    calls = calls_of(models, call)
    rounds = [
        {mode: seconds / count for mode, seconds in a_round.items()}
        for a_round in interleaved_seconds(calls, run.rounds, at_least=.005)
    ]
    ran = ', '.join(sorted(set(latest_runs(models[PYTHON]).values())))
    case = {
        'kernel': f'{kernel} x {kernel}',
        'channels': channels,
        'map': f'{side} x {side}',
        'Python path runs': ran
    }
    return Row(case, rounds, failed)


def _case(x: Tensor) -> dict[str, object]:
    return dict(input=' x '.join(map(str, x.shape)))


class Unit(NamedTuple):
    """What figures are printed in."""

    name: str
    size: float


class Ratio(NamedTuple):
    """A ratio of two modes, and what is demanded of it, as ``'<= 1.05'``."""

    of: str
    to: str
    demand: str = ''

    def __str__(self) -> str:
        return f'{self.of} / {self.to}'

    def is_met(self, value: float) -> bool:
        """Whether a value is as demanded."""
        sign, limit = self.demand.split()
        compare = {'<=': operator.le, '<': operator.lt}[sign]
        return compare(value, float(limit))


@dataclass(frozen=True)
class Benchmark:
    """A question to be answered by a table.

    Attributes:
        measure (Callable[[Run], Iterator[Row]]): Gives the rows.
        title (str): Of the table.
        method (str): What was measured, for the page.
        unit (Unit): Of the figures.
        ratios (tuple[Ratio, ...]): Columns.
        threads (int): Of torch.
        rounds (int): Of those benchmarks that time.
    """

    measure: Callable[[Run], Iterator[Row]]
    title: str
    method: str
    unit: Unit
    ratios: tuple[Ratio, ...]
    threads: int = 2
    rounds: int = 1


MIB, MS, US = Unit('MiB', 2**20), Unit('ms', 1e-3), Unit('us', 1e-6)
COUNT = Unit('operators', 1)

BENCHMARKS = {
    'kept': Benchmark(
        kept, 'Kept for backward',
        'Bytes that autograd keeps after a forward of the backbone, '
        'parameters and buffers not counted. Nothing is frozen. The first '
        'size is that of detectors (HRNet asks for multiples of 32), the last '
        'is where a map has few elements. The Python path runs small maps as '
        'stock.', MIB,
        (Ratio('Tune', 'Eval'), Ratio('Tune', 'MMEngine'),
         Ratio('Tune', 'Deploy', '<= 1.01'), Ratio(PYTHON, 'Deploy'))),
    'kept-for-input': Benchmark(
        kept_for_input, 'Kept for backward where only the input learns',
        'The same at 2 x 3 x 384 x 672 where no parameter learns but the '
        'images do, as in the search for adversarial examples.', MIB,
        (Ratio('Tune', 'Eval'), Ratio('Tune', 'MMEngine'),
         Ratio('Tune', 'Deploy', '< 1'))),
    'compiled': Benchmark(
        compiled, 'Under torch.compile',
        'The same at 2 x 3 x 384 x 384, without and with `torch.compile` '
        '(its partitioner and decompositions, as in Inductor, without '
        'generated code). Compiled, torch itself decides what is kept: it '
        'joins elementwise operators and computes cheap maps again in '
        'backward. It does not fold: a compiled Eval keeps the output of a '
        'convolution, or what it needs to make the BatchNorm again. Tune then '
        'keeps what Deploy keeps. Where activations keep maps of their own '
        '(SiLU), compiling alone may bring all that Tune brings, and there '
        'Tune mode is for nothing beside it; where they run in place (ReLU), '
        'Tune without compiling keeps less than a compiled Eval, and both '
        'together keep the least.', MIB,
        (Ratio('Tune, compiled', 'Deploy, compiled', '<= 1.02'),
         Ratio('Tune, compiled', 'Eval, compiled', '<= 1'),
         Ratio('Eval, compiled', 'Tune'))),
    'operators': Benchmark(
        operators, 'Operators of a block where no CPU kernel serves',
        'Forward plus backward, all gradients, views not counted: as on a '
        'GPU, each starts a kernel. The aim is at most 11 for Tune; the '
        'gradients of a linear layer are an operator each.', COUNT,
        (Ratio('Tune', 'MMEngine'), Ratio('Tune', PYTHON))),
    'peak': Benchmark(
        peak, 'Peak of a step',
        'The most bytes of tensors alive at once in a forward and backward at '
        '2 x 3 x 384 x 672, of those that were created in it. What kernels '
        'use while they run is not counted. The gradients of the parameters '
        'are created in the step (`zero_grad()`), or are there before and '
        'added to (accumulation).', MIB,
        (Ratio('Tune', 'Eval'), Ratio('Tune', 'MMEngine'),
         Ratio('Tune', 'Deploy', '<= 1.03'))),
    'step': Benchmark(
        step, 'Time of a training step',
        'Forward, backward and SGD with momentum on a ResNet-50. Nothing is '
        'frozen.', MS,
        (Ratio('Tune', 'Eval', '< 1'), Ratio('Tune', 'MMEngine', '< 1'),
         Ratio('Tune', 'Deploy', '<= 1.02'), Ratio(PYTHON, 'Deploy')),
        rounds=15),
    'frozen': Benchmark(
        frozen, 'Time of a training step with frozen stages',
        'The same with `frozen_stages=2`, as in fine-tuning on little data: '
        'the stem and half of the stages learn nothing.', MS,
        (Ratio('Tune', 'Eval', '< 1'), Ratio('Tune', 'MMEngine'),
         Ratio('Tune', 'Deploy', '<= 1.02'), Ratio(PYTHON, 'Deploy')),
        rounds=15),
    'validation': Benchmark(
        validation, 'Time of a validation step',
        'Forward of a ResNet-50 without gradients. A backbone that is frozen '
        'as a whole runs so in training too.', MS,
        (Ratio('Tune', 'Eval'), Ratio('Tune', 'Deploy', '<= 1.02'),
         Ratio(PYTHON, 'Deploy')), rounds=20),
    'small': Benchmark(
        small, 'Time where maps are small',
        'Forward and backward of 20 blocks in a row, each a convolution '
        'without bias and a BatchNorm, batch 2: the share of a block. Hardly '
        'anything is computed, so that this is what Python and torch take to '
        'get through a block, as on a GPU with a small batch. The Python path '
        'runs such maps as stock.', US,
        (Ratio('Tune', 'Eval', '<= 1'), Ratio('Tune', 'MMEngine'),
         Ratio('Tune', 'Deploy'), Ratio(PYTHON, 'Eval')), threads=1,
        rounds=100),
    'sweep': Benchmark(
        sweep, 'Where a fold pays',
        'The same with 4 blocks of many sizes, up to maps of 2**18 elements '
        '(2 x channels x height x width). With the native node every block '
        'folds. The Python path chooses by the size of the map whether to '
        'fold ("fused") or to run as stock ("small"), by `SMALL_MAP` and '
        '`SMALL_SHARE` in `mmtune/behaviours/convolution.py`.', US,
        (Ratio('Tune', 'Eval', '<= 1.02'), Ratio(PYTHON, 'Eval'),
         Ratio('Tune', 'Deploy')), threads=1, rounds=15),
}

# --------------------------------------------------------------------------
# Records: what is kept of a run
# --------------------------------------------------------------------------


def record_of(row: Row, ratios: Iterable[Ratio]) -> dict:
    """Sum up a row.

    Args:
        row (Row): With as many rounds as were run.
        ratios (Iterable[Ratio]): Those of modes that failed are left out.

    Returns:
        dict: ``case``, ``failed``, and quartiles (lower, median, upper) of
        ``values`` by mode, in bytes or seconds, and of ``ratios``, each
        taken round by round.
    """
    modes = list(row.rounds[0])
    return dict(
        case=row.case,
        values={
            mode: quartiles(values[mode] for values in row.rounds)
            for mode in modes
        },
        ratios={
            str(ratio): quartiles(values[ratio.of] / values[ratio.to]
                                  for values in row.rounds)
            for ratio in ratios if ratio.of in modes and ratio.to in modes
        },
        failed=row.failed)


def origin(device: str, arguments: list[str]) -> dict:
    """Describe what the figures come from: command, machine, versions."""
    script = Path(__file__).relative_to(ROOT)
    command = shlex.join(['python', str(script), *arguments])
    return dict(
        command=command,
        **describe_machine(device),
        commit=describe_commit(ROOT))


def run_benchmark(name: str, device: str, threads: int | None,
                  rounds: int | None, progress: Progress) -> dict:
    """Measure, and describe how.

    Args:
        name (str): Of :data:`BENCHMARKS`.
        device (str): ``'cpu'`` or ``'cuda'``.
        threads (int, optional): None for what the benchmark asks for.
        rounds (int, optional): Likewise.
        progress (Progress): Shows how far it is.

    Returns:
        dict: A record, for JSON, without :func:`origin`.
    """
    benchmark = BENCHMARKS[name]
    threads = threads or benchmark.threads
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    run = Run(device, rounds or benchmark.rounds, progress)
    rows = [
        record_of(row, benchmark.ratios) for row in benchmark.measure(run)
    ]
    return dict(benchmark=name, threads=threads, rounds=run.rounds, rows=rows)


def replace(records: list[dict], new: dict) -> list[dict]:
    """Put a record in the place of the older one of that device."""

    def key(record: dict) -> tuple:
        return record['benchmark'], record['device']

    return [r for r in records if key(r) != key(new)] + [new]


# --------------------------------------------------------------------------
# Tables and the page
# --------------------------------------------------------------------------


def table_of(record: dict) -> tuple[list[str], list[list[str]]]:
    """Lay out a record: a column for each mode, then one for each ratio.

    Args:
        record (dict): From :func:`run_benchmark`.

    Returns:
        tuple[list, list]: Titles, and the cells of each row.
    """
    benchmark = BENCHMARKS[record['benchmark']]
    rows = record['rows']
    unit, ratios = benchmark.unit, [str(ratio) for ratio in benchmark.ratios]
    modes = [
        mode for mode in REWRITES
        if any(mode in {**row['values'], **row['failed']} for row in rows)
    ]
    titles = [*rows[0]['case'], *modes, *ratios]

    def value(row: dict, mode: str) -> str:
        if mode in row['failed']:
            return row['failed'][mode]
        median = row['values'][mode][1] / unit.size
        return f'{median:.{0 if unit is COUNT else 1}f}'

    def ratio(row: dict, name: str) -> str:
        if name not in row['ratios']:
            return '-'
        low, median, high = row['ratios'][name]
        spread = '' if low == high else f' ({low:.3f}-{high:.3f})'
        return f'{median:.3f}{spread}'

    return titles, [[
        # A shape in one word, which no table breaks into lines.
        *(str(part).replace(' x ', '×') for part in row['case'].values()),
        *(value(row, m) for m in modes),
        *(ratio(row, name) for name in ratios)
    ] for row in rows]


def verdicts(record: dict) -> list[str]:
    """Hold the medians against what is demanded of them."""
    lines = []
    for ratio in BENCHMARKS[record['benchmark']].ratios:
        if not ratio.demand:
            continue
        medians = [
            row['ratios'][str(ratio)][1] for row in record['rows']
            if str(ratio) in row['ratios']
        ]
        met = sum(ratio.is_met(median) for median in medians)
        lines.append(f'{ratio} {ratio.demand} is the aim: met in {met} of '
                     f'{len(medians)} rows, {min(medians):.3f} to '
                     f'{max(medians):.3f}, median '
                     f'{statistics.median(medians):.3f}.')
    return lines


def show(record: dict, console: Console) -> None:
    """Print a record."""
    titles, rows = table_of(record)
    table = Table(
        title=heading(record),
        caption='\n'.join(verdicts(record)),
        box=box.SIMPLE)
    for index, title in enumerate(titles):
        first = index < len(record['rows'][0]['case'])
        table.add_column(
            title, justify='left' if first else 'right', overflow='fold')
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


def heading(record: dict) -> str:
    """Name a record's table, its unit, and the device if it is a GPU."""
    benchmark = BENCHMARKS[record['benchmark']]
    where = '' if record['device'] == 'CPU' else f' on {record["device"]}'
    return f'{benchmark.title} ({benchmark.unit.name}){where}'


def section(record: dict) -> str:
    """Write a record as a section of the page."""
    benchmark = BENCHMARKS[record['benchmark']]
    titles, rows = table_of(record)
    lines = [titles, ['---'] * len(titles), *rows]
    table = '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)
    how = [
        f'`{record["command"]}` on {record["cpu"]} ({record["cores"]} cores)',
        f'threads: {record["threads"]}', f'torch {record["torch"]}',
        f'commit {record["commit"] or "unknown"}'
    ]
    if benchmark.unit in (MS, US):
        how.append(f'rounds: {record["rounds"]}')
    return '\n\n'.join([
        f'## {heading(record)}',
        wrap(benchmark.method),
        wrap(f'{"; ".join(how)}.'), table,
        wrap(' '.join(verdicts(record)))
    ])


def wrap(text: str) -> str:
    """Break a paragraph into lines."""
    return textwrap.fill(text, 79, break_on_hyphens=False)


INTRODUCTION = """\
# What Tune mode costs

<!-- Written by tests/benchmarks/cost.py from cost.json; do not edit. -->

Does Tune mode keep as little as a model that was folded for good (Deploy),
is it as fast, and is it ever slower than what it replaces (Eval)?

All modes of a table are copies of one stock model with random weights, whose
BatchNorms are in eval mode:

- Eval: the stock model;
- MMEngine: `mmengine.model.efficient_conv_bn_eval` on it. Where it raises,
  the table has the name of the exception;
- Tune: `mmtune.turn_on(model, activations=False)`, with the native node. That
  is the fold alone, as in the paper and in Deploy; what activations spare
  besides has [a page of its own](activations.md);
- Tune, Python path: the same where there is no native node;
- Deploy: `mmtune.turn_on(model, mode='Deploy')`.

Bytes are counted by `mmtune.analysis` and the same in every run. Times are
taken in rounds, each mode once a round in shuffled order, after two rounds
that are dropped. A time is the median over all rounds; a ratio is the median
of the ratios of each round, with its lower and upper quartile in brackets.

`python tests/benchmarks/cost.py --json docs/en/cost.json` measures anew, and
with `--docs docs/en/cost.md` added it writes this page from what it kept."""


def page(records: list[dict]) -> str:
    """Write the page.

    Args:
        records (list[dict]): From :func:`run_benchmark`, in any order.

    Returns:
        str: Markdown.
    """
    sections = [
        section(record) for name in BENCHMARKS
        for record in sorted(records, key=operator.itemgetter('device'))
        if record['benchmark'] == name
    ]
    return '\n\n'.join([INTRODUCTION, *sections, not_run(records)]) + '\n'


def not_run(records: list[dict]) -> str:
    """Say what the records lack."""
    done = {record['benchmark'] for record in records}
    lines = [f'- {b.title}.' for name, b in BENCHMARKS.items()
             if name not in done]
    if all(record['device'] == 'CPU' for record in records):
        lines.append('- Any of this on a GPU, which `--device cuda` does.')
    return '\n'.join(['## Not run here', '', *(lines or ['Nothing.'])])


# --------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------


def parse_args(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument(
        'names', nargs='*', metavar='NAME',
        help=f'benchmarks to run, of {", ".join(BENCHMARKS)}; default: all')
    parser.add_argument(
        '--threads', type=positive, help='default: as each benchmark asks for')
    parser.add_argument(
        '--rounds', type=positive, help='default: as each benchmark asks for')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument(
        '--json', type=Path, default=Path('work_dirs/cost.json'),
        help='where results are kept, beside those of other benchmarks')
    parser.add_argument(
        '--docs', type=Path,
        help='run nothing, but write this page from the results')
    args = parser.parse_args(arguments)
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f'NAME must be one of {", ".join(BENCHMARKS)}, but '
                         f'got {name!r}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda needs a GPU that torch can use, but '
                     f'torch {torch.__version__} finds none')
    if args.docs and not args.json.is_file():
        parser.error(f'--docs needs results in {args.json}, which does not '
                     'exist; run the benchmarks first')
    return args


def positive(text: str) -> int:
    """Read a number that is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f'must be a whole number from 1 on, but got {text!r}')
    return int(text)


def main(arguments: list[str]) -> None:
    args = parse_args(arguments)
    # MMEngine's, with each config that it reads.
    warnings.filterwarnings('ignore', 'pkg_resources is deprecated')
    records = []
    if args.json.is_file():
        records = json.loads(args.json.read_text())
    if args.docs:
        args.docs.write_text(page(records))
        return
    args.json.parent.mkdir(parents=True, exist_ok=True)
    # A file has no width to obey.
    console = Console(width=None if sys.stdout.isatty() else 150)
    # At the start: the repository may change in mid-run, this code does not.
    described = origin(args.device, arguments)
    for name in args.names or BENCHMARKS:
        with Progress(console=console) as progress:
            record = described | run_benchmark(
                name, args.device, args.threads, args.rounds, progress)
        records = replace(records, record)
        args.json.write_text(json.dumps(records, indent=1) + '\n')
        show(record, console)


if __name__ == '__main__':
    main(sys.argv[1:])
