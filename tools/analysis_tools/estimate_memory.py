"""Estimate the memory of a training step at a batch too large to run here.

Takes a config of a detector, or a PyTorch model with --model; reads no data
and loads no weights. Memory is affine in the batch size: it is measured at a
few small batches, which also tell how far the estimate is to be trusted.
"""
import argparse
import re
from dataclasses import asdict

import torch
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

from mmtune.analysis.estimate import AffineMemory, fit_affine
from mmtune.analysis.steps import Step
from mmtune.api import latest_runs

UNITS = {'MiB': 2**20, 'GiB': 2**30, 'MB': 10**6, 'GB': 10**9}
MIB, GIB = UNITS['MiB'], UNITS['GiB']
COLUMNS = ('mode', 'parameters', 'optimizer', 'images', 'peak of a step', '±',
           'total', 'an image', 'gradients', 'off the line')
NOT_COUNTED = {
    'cpu': 'Not counted, since this was no run on a GPU: its context, the '
    'workspaces of its kernels (cuDNN), what its allocator rounds up or '
    'cannot reuse (fragmentation), and what its autocast keeps in float32.',
    'cuda': 'As the allocator of this GPU gave it; not counted: the context, '
    'and what the allocator cannot reuse (fragmentation).'
}
OF_A_RUN = ('Nor counted: what a run has besides, such as the buckets of '
            'distributed training, as large as the gradients, and the copy '
            'of the model that an EMAHook keeps, as large as the parameters.')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_step_arguments(parser)
    parser.add_argument(
        '--batch-size',
        type=positive,
        default=16,
        help='to estimate (default: %(default)s)')
    parser.add_argument(
        '--batches',
        nargs='+',
        type=positive,
        default=[1, 2, 3],
        metavar='N',
        help='batch sizes to run, at least three (default: 1 2 3)')
    parser.add_argument(
        '--gpu-memory',
        type=read_bytes,
        metavar='24GiB',
        help='what the step has to fit into (default: what is free on the '
        'GPU, with --device cuda)')
    args = parse_step_args(parser)
    if len({*args.batches}) < max(3, len(args.batches)):
        parser.error('--batches must be three or more different numbers, '
                     'since any two runs are on a line, but got '
                     f'{" ".join(map(str, args.batches))}')
    if args.gpu_memory is None and args.device == 'cuda':
        # What other processes and the context have is not to be had.
        args.gpu_memory, _ = torch.cuda.mem_get_info()
    return args


def read_bytes(text: str) -> int:
    """Read an amount of memory.

    Args:
        text (str): Such as ``'24GiB'``.

    Returns:
        int: Bytes.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    match = re.fullmatch(rf'([\d.]+) ?({"|".join(UNITS)})', text)
    try:
        n_bytes = int(float(match[1]) * UNITS[match[2]])
    except (TypeError, ValueError):
        n_bytes = 0
    if not n_bytes:
        raise argparse.ArgumentTypeError(
            f'must be like 24GiB ({", ".join(UNITS)}), but got {text!r}')
    return n_bytes


def measure(mode: str, stock: Stock, args: argparse.Namespace) -> dict:
    """Run a mode at small batches, and fit a line.

    Args:
        mode (str): One of ``MODES``.
        stock (Stock): The model.
        args (argparse.Namespace): The parsed arguments.

    Returns:
        dict: Bytes of all that a step takes; see :func:`estimate`.
    """
    model, _ = stock.in_mode(mode)
    runs = []
    for batch in sorted(args.batches):
        with stage(f'{mode}: run a batch of {batch}'):
            workload = stock.workload(batch)
            step = Step(model, workload, args.grad_to, stock.amp)
            memory = step.memory()
        runs.append(dict(batch=batch, **asdict(memory), total=memory.total))
    images = workload.images.nbytes // batch
    parameters = sum(
        tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    gradients = sum(parameter.nbytes for parameter in model.parameters()
                    if parameter.requires_grad)
    return dict(
        parameters=parameters,
        gradients=gradients,
        optimizer=memory.resident - parameters - images * batch,
        images=images * args.batch_size,
        small=list(latest_runs(model).values()).count('small'),
        runs=runs,
        **estimate(runs, args))


def estimate(runs: list[dict], args: argparse.Namespace) -> dict:
    """Extrapolate to the batch that is asked for.

    Args:
        runs (list[dict]): ``batch``, ``kept`` and ``total`` of each.
        args (argparse.Namespace): The parsed arguments.

    Returns:
        dict: ``total`` and ``error`` at that batch, in bytes; the line;
            whether it ``is_affine`` and ``is_steady``; and, where there is a
            limit, whether it ``fits`` (None where that is open) and the
            ``largest_batch`` that does (None where it is not steady).
    """
    batches = [run['batch'] for run in runs]
    line = fit_affine(batches, [run['total'] for run in runs])
    kept = fit_affine(batches, [run['kept'] for run in runs])
    found = dict(
        total=line.at(args.batch_size),
        error=line.error(args.batch_size),
        fixed=line.fixed,
        per_image=line.per_image,
        residual=line.residual,
        is_affine=line.is_affine,
        # What is kept for backward is there at the peak of any large batch.
        # Where that grows faster than the peak, the peak is still elsewhere.
        is_steady=line.per_image >= .99 * kept.per_image > 0)
    if args.gpu_memory:
        found.update(judge(line, found, args))
    return found


def judge(line: AffineMemory, found: dict, args: argparse.Namespace) -> dict:
    """Tell what fits.

    Args:
        line (AffineMemory): What a step takes.
        found (dict): What :func:`estimate` has so far.
        args (argparse.Namespace): The parsed arguments.

    Returns:
        dict: ``fits`` and ``largest_batch``.
    """
    over = found['total'] - args.gpu_memory
    if not found['is_steady']:
        # The estimate is the least that it may take.
        return dict(fits=False if over > 0 else None, largest_batch=None)
    return dict(
        fits=over <= 0 if abs(over) >= found['error'] else None,
        largest_batch=line.largest_batch(args.gpu_memory))


def make_row(mode: str, found: dict) -> list[str]:
    """Write a mode down as a row of the table.

    Args:
        mode (str): One of ``MODES``.
        found (dict): What :func:`measure` gave.

    Returns:
        list[str]: A cell for each of ``COLUMNS``, in MiB.
    """
    if 'failed' in found:
        return [mode, 'failed', *'-' * (len(COLUMNS) - 2)]
    resident = [found[key] for key in ('parameters', 'optimizer', 'images')]
    sizes = [
        *resident, found['total'] - sum(resident), found['error'],
        found['total'], found['per_image'], found['gradients'],
        found['residual']
    ]
    return [mode, *(f'{size / MIB:.1f}' for size in sizes)]


def warn(mode: str, found: dict, args: argparse.Namespace) -> None:
    """Print what makes an estimate doubtful.

    Args:
        mode (str): One of ``MODES``.
        found (dict): What :func:`measure` gave.
        args (argparse.Namespace): The parsed arguments.
    """
    largest = max(args.batches)
    advice = ' '.join(str(largest + more) for more in range(1, 4))
    if not found['is_steady']:
        print(f'{mode}: the peaks of these runs are not yet in the feature '
              'maps but in a large layer or the optimizer, so that larger '
              f'batches take more than the estimate; run --batches {advice} '
              'or more')
    elif not found['is_affine']:
        print(f'{mode} is not affine yet: a run is '
              f'{found["residual"] / MIB:.1f} MiB off the line, as where the '
              'peak of a small batch is in a large layer or the optimizer; '
              f'run --batches {advice} or more')
    if found['small']:
        print(f'{mode}: {found["small"]} blocks ran as stock at a batch of '
              f'{largest}, since their maps are small; at larger ones they '
              f'may be fused, and take less; run --batches {advice} or more')


def verdict(mode: str, found: dict, args: argparse.Namespace) -> str:
    """Say whether a mode fits.

    Args:
        mode (str): One of ``MODES``.
        found (dict): What :func:`measure` gave.
        args (argparse.Namespace): The parsed arguments.

    Returns:
        str: A sentence.
    """
    fits = {True: 'fits in', False: 'does not fit in',
            None: 'may or may not fit in'}[found['fits']]
    largest = found['largest_batch']
    if largest is None:
        most = 'the largest batch that does is not known'
    else:
        most = f'the largest batch that does is {largest}'
    takes = f'{found["total"] / GIB:.2f} ± {found["error"] / GIB:.2f} GiB'
    if not found['is_steady']:
        takes = f'more than {found["total"] / GIB:.2f} GiB'
    return (f'{mode}: a batch of {args.batch_size} takes {takes} and {fits} '
            f'{args.gpu_memory / GIB:.2f} GiB; {most}')


def main() -> None:
    args = parse_args()
    with stage('Build the model'):
        stock = get_stock(args)
    say_what_trains(stock)
    modes = measure_modes(args.modes,
                          lambda mode: measure(mode, stock, args))
    print(f'MiB at a batch of {args.batch_size}; gradients are in the peak')
    show_table(COLUMNS, [make_row(*measured) for measured in modes.items()])
    estimated = {
        mode: found
        for mode, found in modes.items() if 'failed' not in found
    }
    for mode, found in estimated.items():
        warn(mode, found, args)
    print(NOT_COUNTED[args.device], OF_A_RUN)
    if args.gpu_memory:
        for mode, found in estimated.items():
            print(verdict(mode, found, args))
    else:
        print('Add --gpu-memory 24GiB or so to be told what fits')
    found = dict(
        describe(args, stock),
        batch_size=args.batch_size,
        batches=sorted(args.batches),
        gpu_memory=args.gpu_memory,
        modes=modes)
    write_json(args.json, found)
    write_plot(args.plot, 'plot_steps', [found])


if __name__ == '__main__':
    run(main)
