"""Measure a training step of a model in each mode, against Eval mode.

Takes a config of a detector, with its own losses and optimizer, or a PyTorch
model with --model. Reads no data and loads no weights: images are noise,
weights are random. Bytes are counted tensor by tensor on a CPU, and by the
allocator on a GPU. Times are taken in rounds, each mode once a round.
"""
import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

from shared import (
    Stock,
    add_step_arguments,
    describe,
    get_stock,
    measure_modes,
    parse_step_args,
    positive,
    run,
    say_what_trains,
    show_table,
    stage,
    write_json,
    write_plot,
)
from torch import Tensor, nn

from mmtune.analysis.steps import Step, difference, has_bfloat16_kernels
from mmtune.analysis.timing import interleaved_seconds, quartiles
from mmtune.api import latest_runs
from mmtune.behaviours.activation import activation_runs
from mmtune.report import Report

MIB = 2**20
COLUMNS = ('mode', 'kept MiB', 'peak MiB', 'resident MiB', 'peak / Eval',
           'seconds', 'time / Eval', 'loss off Eval', 'gradient off Eval',
           'gradient off float64', 'blocks', 'activations')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_step_arguments(parser)
    parser.add_argument(
        '--batch-size', type=positive, default=2, help='default: %(default)s')
    parser.add_argument(
        '--rounds',
        type=int,
        default=5,
        help='how often to time each mode, after a round that is dropped; '
        'nothing is timed with 0 (default: %(default)s)')
    parser.add_argument(
        '--exact',
        action='store_true',
        help="compare with Eval in float64 too, which takes twice Eval's "
        'memory: where Eval itself is as far off, a difference is rounding')
    args = parse_step_args(parser)
    if args.rounds < 0:
        parser.error(f'--rounds must be 0 or more, but got {args.rounds}')
    return args


class Benchmark:
    """Measures modes against Eval, which has to come first.

    Args:
        stock (Stock): The model.
        args (argparse.Namespace): The parsed arguments.
    """

    def __init__(self, stock: Stock, args: argparse.Namespace) -> None:
        self.steps: dict[str, Step] = {}
        self._stock = stock
        self._args = args
        self._workload = stock.workload(args.batch_size)
        self._eval = self._exact = Outcome(math.nan, {})

    def measure(self, mode: str) -> dict:
        """Take steps in a mode.

        Args:
            mode (str): One of ``MODES``.

        Returns:
            dict: Bytes, the loss, how far that and the gradient are from
                Eval's, and how the blocks and the activations ran.
        """
        with stage(f'{mode}: count the bytes of a step, compare it'):
            model, report = self._stock.in_mode(mode)
            step = Step(model, self._workload, self._args.grad_to,
                        self._stock.amp)
            # First: an update by gradients that are not finite changes
            # parameters even at a learning rate of 0.
            outcome = Outcome(*step.gradients())
            memory = step.memory()
        if not math.isfinite(outcome.loss):
            print(f'{mode}: the loss is {outcome.loss}, so that there is '
                  'nothing to compare')
        if mode == 'Eval':
            self._eval = outcome
        if mode == 'Deploy' and self._args.grad_to == 'params':
            # It learns other parameters, even where they have the same names.
            outcome = Outcome(outcome.loss, {})
        self.steps[mode] = step
        return dict(
            **asdict(memory),
            loss=finite(outcome.loss),
            off_eval=compare(outcome, self._eval),
            off_float64=compare(outcome, self._exact),
            blocks=count_runs(model, report),
            activations=dict(Counter(activation_runs(model).values())))

    def measure_exact(self) -> None:
        """Run Eval in float64, for the modes to be compared with."""
        with stage('Eval: run it in float64'):
            try:
                model, _ = self._stock.in_mode('Eval')
                workload = replace(
                    self._workload, images=self._workload.images.double())
                step = Step(model.double(), workload, self._args.grad_to)
                self._exact = Outcome(*step.gradients())
            except (RuntimeError, ValueError) as error:
                message = str(error).strip().partition('\n')[0]
                print(f'Eval cannot be run in float64: {message}')


class Outcome(NamedTuple):
    """What a step computes.

    Attributes:
        loss (float): The loss.
        gradients (dict[str, Tensor]): By name.
    """

    loss: float
    gradients: dict[str, Tensor]


def compare(outcome: Outcome, stock: Outcome) -> dict[str, float | None]:
    """Tell how far a step is from another.

    Args:
        outcome (Outcome): Of the one.
        stock (Outcome): Of the other.

    Returns:
        dict[str, float | None]: Of the loss and of the gradient, relative
            to the other; None where there is nothing to compare.
    """
    gradient = None
    names = outcome.gradients.keys()
    if names == stock.gradients.keys() and any(
            value.any() for value in stock.gradients.values()):
        gradient = finite(difference(outcome.gradients, stock.gradients))
    loss = abs(outcome.loss / stock.loss - 1) if stock.loss else math.nan
    return dict(loss=finite(loss), gradient=gradient)


def finite(value: float) -> float | None:
    """Give what JSON can hold.

    Args:
        value (float): Any number.

    Returns:
        float, optional: None in the place of NaN and infinity.
    """
    return value if math.isfinite(value) else None


def count_runs(model: nn.Module, report: Report | None) -> dict[str, int]:
    """Count how the blocks of a model ran.

    Args:
        model (nn.Module): After a step.
        report (Report, optional): Of Tune and Deploy.

    Returns:
        dict[str, int]: Of Tune what :func:`mmtune.api.latest_runs` says, of
            Deploy those ``'folded'``; those ``'left out'`` of both.
    """
    if report is None:
        return {}
    runs = Counter(latest_runs(model).values())
    if report.mode == 'Deploy':
        runs['folded'] = len(report.rewritten)
    if report.left_out:
        runs['left out'] = len(report.left_out)
    return dict(runs)


def time_modes(steps: dict[str, Step], rounds: int) -> dict[str, dict]:
    """Time steps side by side.

    Args:
        steps (dict[str, Step]): By mode.
        rounds (int): How many rounds to time.

    Returns:
        dict[str, dict]: By mode: the median of the seconds; and, where Eval
            is among them, the median and quartiles of the ratios to it, one
            a round.
    """
    timed = interleaved_seconds(
        {mode: step.run for mode, step in steps.items()},
        rounds,
        warm_up=1,
        at_least=.1)
    taken = []
    for number in range(1, rounds + 1):
        with stage(f'Time all modes, round {number} of {rounds}'):
            taken.append(next(timed))
    return {mode: summarize(mode, taken) for mode in steps}


def summarize(mode: str, taken: Sequence[dict[str, float]]) -> dict:
    """Summarize the rounds of a mode.

    Args:
        mode (str): One of ``MODES``.
        taken (Sequence[dict[str, float]]): Seconds by mode, a round each.

    Returns:
        dict: See :func:`time_modes`.
    """
    _, seconds, _ = quartiles(row[mode] for row in taken)
    if 'Eval' not in taken[0]:
        return dict(seconds=seconds)
    low, ratio, high = quartiles(row[mode] / row['Eval'] for row in taken)
    return dict(seconds=seconds, ratio=ratio, ratio_quartiles=[low, high])


def make_row(mode: str, found: dict, stock_peak: int | None) -> list[str]:
    """Write a mode down as a row of the table.

    Args:
        mode (str): One of ``MODES``.
        found (dict): What was measured of it.
        stock_peak (int, optional): Bytes, of Eval; None where it failed.

    Returns:
        list[str]: A cell for each of ``COLUMNS``.
    """
    if 'failed' in found:
        return [mode, 'failed', *'-' * (len(COLUMNS) - 2)]
    sizes = (found[key] / MIB for key in ('kept', 'peak', 'resident'))
    seconds = f'{found["seconds"]:.4g}' if 'seconds' in found else '-'
    ratio = '-'
    if 'ratio' in found:
        low, high = found['ratio_quartiles']
        ratio = f'{found["ratio"]:.3f} ({low:.3f}-{high:.3f})'
    return [
        mode, *(f'{size:.1f}' for size in sizes),
        f'{found["peak"] / stock_peak:.3f}' if stock_peak else '-',
        seconds, ratio,
        show_difference(found['off_eval']['loss']),
        show_difference(found['off_eval']['gradient']),
        show_difference(found['off_float64']['gradient']),
        *(', '.join(f'{n} {how}' for how, n in found[key].items()) or '-'
          for key in ('blocks', 'activations'))
    ]


def show_difference(value: float | None) -> str:
    """Write down a relative difference.

    Args:
        value (float, optional): None where there is nothing to compare.

    Returns:
        str: With two digits.
    """
    return '-' if value is None else f'{value:.1e}'


def main() -> None:
    args = parse_args()
    with stage('Build the model'):
        stock = get_stock(args)
        benchmark = Benchmark(stock, args)
    say_what_trains(stock)
    if args.exact:
        benchmark.measure_exact()
    modes = measure_modes(args.modes, benchmark.measure)
    if stock.amp and args.device == 'cpu' and not has_bfloat16_kernels():
        print('Nothing is timed: this CPU computes bfloat16 in float32')
        args.rounds = 0
    if args.rounds and benchmark.steps:
        for mode, times in time_modes(benchmark.steps, args.rounds).items():
            modes[mode].update(times)
    peak = modes['Eval'].get('peak')
    show_table(COLUMNS,
               [make_row(*measured, peak) for measured in modes.items()])
    found = dict(
        describe(args, stock),
        batch_size=args.batch_size,
        rounds=args.rounds,
        modes=modes)
    write_json(args.json, found)
    write_plot(args.plot, 'plot_steps', [found])


if __name__ == '__main__':
    run(main)
