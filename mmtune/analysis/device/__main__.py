"""Check Tune mode on a device, and measure what it costs there.

Needs torch, and torchvision for the detectors. Prints a page of Markdown, a
section when it is done; says on the error output what is under way. Ends
with status 1 if a block is less exact than it has to be.
"""
import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmtune.analysis.device.blocks import (
    BLOCK_WAYS,
    count_operators,
    measure_blocks,
    shapes,
)
from mmtune.analysis.device.detectors import (
    DETECTORS,
    check_torchvision,
    measure_detector,
)
from mmtune.analysis.device.exactness import (
    FORWARDS,
    KINDS,
    Check,
    check_kind,
    precisions,
)
from mmtune.analysis.device.page import (
    blocks_section,
    detector_section,
    exactness_section,
    head,
    operators_section,
)
from mmtune.analysis.device.ways import WAYS, has_native
from mmtune.analysis.machine import describe_commit, describe_machine
from mmtune.collect_env import collect_env

TABLES = ('exactness', 'blocks', 'detectors')


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and check it before anything is measured.

    Args:
        arguments (Sequence[str], optional): Those of the process where None.

    Returns:
        argparse.Namespace: Their values.
    """
    parser = argparse.ArgumentParser(
        prog='python -m mmtune.analysis.device',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--device',
        choices=('cpu', 'cuda'),
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='default: here %(default)s')
    parser.add_argument(
        '--tables', nargs='+', choices=TABLES, default=TABLES,
        help='what to find out (default: all)')
    parser.add_argument(
        '--shape', nargs=2, type=_positive, default=[800, 1344],
        metavar=('HEIGHT', 'WIDTH'),
        help="of the detectors' images and of what blocks get of such images, "
        'in pixels; 128 192 is for a CPU (default: 800 1344)')
    parser.add_argument(
        '--rounds', type=_positive, default=10,
        help='how often to time each way (default: %(default)s)')
    parser.add_argument(
        '--json', type=Path, metavar='FILE.json',
        help='write everything that was found to this file')
    args = parser.parse_args(arguments)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda needs a GPU that torch can use, but '
                     f'torch {torch.__version__} finds none; use --device cpu')
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f'--json must name a file in a folder that there is, but '
                     f'got {str(args.json)!r}; make the folder first')
    if 'detectors' in args.tables:
        try:
            check_torchvision()
        except ValueError as error:
            parser.error(str(error))
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f'must be a whole number from 1 on, but got {text!r}')
    return int(text)


def _say(text: str) -> None:
    print(f'{text} ...', file=sys.stderr, flush=True)


def _choose(ways: Sequence[str], native: bool) -> list[str]:
    return [way for way in ways if native or 'native' not in way]


def find_exactness(device: str, native: bool) -> list[Check]:
    """Check all kinds of blocks, and print the section.

    Args:
        device (str): Where.
        native (bool): Whether there is a native node.

    Returns:
        list[Check]: One for each kind, precision and way.
    """
    checks = []
    for precision in precisions(device):
        for number, kind in enumerate(KINDS, 1):
            _say(f'exactness, {precision.name}, {number} of {len(KINDS)}: '
                 f'{kind}')
            checks += check_kind(kind, precision, device,
                                 _choose(list(FORWARDS), native))
    left_out = '' if native else (
        'The plans of the native node were NOT checked: there is none, see '
        'above.')
    print(exactness_section(checks, left_out), flush=True)
    return checks


def find_blocks(args: argparse.Namespace, amp: bool,
                native: bool) -> list[dict[str, Any]]:
    """Measure blocks of all shapes, and print the section.

    Args:
        args (argparse.Namespace): From :func:`parse_args`.
        amp (bool): Whether to run under autocast.
        native (bool): Whether there is a native node.

    Returns:
        list[dict[str, Any]]: One for each shape.
    """
    rows = []
    ways = _choose(BLOCK_WAYS, native)
    for shape in shapes(tuple(args.shape)):
        _say(f'cost of {shape}, {_precision(amp)}')
        rows.append(dict(
            asdict(shape),
            ways=measure_blocks(shape, ways, args.device, amp, args.rounds)))
    print(blocks_section(f'Cost of a block, {_precision(amp)}', rows),
          flush=True)
    return rows


def find_operators(device: str, native: bool) -> dict[str, dict]:
    """Count operators in each way, and print the section.

    Args:
        device (str): Where.
        native (bool): Whether there is a native node.

    Returns:
        dict[str, dict]: By way.
    """
    _say('operators')
    found = {way: count_operators(way, device)
             for way in _choose(BLOCK_WAYS, native)}
    print(operators_section(found), flush=True)
    return found


def find_detectors(args: argparse.Namespace, amp: bool,
                   native: bool) -> dict[str, dict]:
    """Measure steps of all detectors, and print a section for each.

    Args:
        args (argparse.Namespace): From :func:`parse_args`.
        amp (bool): Whether to run under autocast.
        native (bool): Whether there is a native node.

    Returns:
        dict[str, dict]: By detector.
    """
    found = {}
    height, width = args.shape
    for name in DETECTORS:
        title = f'{name}, 2 x 3 x {height} x {width}, {_precision(amp)}'
        _say(title)
        found[name] = measure_detector(name, _choose(WAYS, native),
                                       (height, width), args.device, amp,
                                       args.rounds)
        print(detector_section(title, found[name]), flush=True)
    return found


def _precision(amp: bool) -> str:
    return 'autocast float16' if amp else 'float32'


def main(arguments: Sequence[str] | None = None) -> int:
    """Find out what is asked for.

    Args:
        arguments (Sequence[str], optional): Those of the process where None.

    Returns:
        int: The status to end with.
    """
    args = parse_args(arguments)
    # Asks for the native node on a GPU as well.
    if not os.environ.get('MMTUNE_NATIVE'):
        os.environ['MMTUNE_NATIVE'] = '1'
    native = has_native()
    given = sys.argv[1:] if arguments is None else arguments
    found: dict[str, Any] = dict(
        describe_machine(args.device),
        command=shlex.join(['python', '-m', 'mmtune.analysis.device', *given]),
        commit=describe_commit(Path(__file__).parent),
        threads=torch.get_num_threads(),
        native=native,
        env=collect_env())
    print(head(found), flush=True)
    # Half precision is slow, and no way to train, on most CPUs.
    precisions_of_steps = (False, True) if args.device == 'cuda' else (False, )
    checks: list[Check] = []
    if 'exactness' in args.tables:
        checks = find_exactness(args.device, native)
        found['exactness'] = [check.plain() for check in checks]
    if 'blocks' in args.tables:
        found['operators'] = find_operators(args.device, native)
        found['blocks'] = _each(precisions_of_steps, find_blocks, args, native)
    if 'detectors' in args.tables:
        found['detectors'] = _each(precisions_of_steps, find_detectors, args,
                                   native)
    if args.json:
        args.json.write_text(
            json.dumps(found, indent=2, allow_nan=False) + '\n')
    return int(not all(check.passed for check in checks))


def _each(precisions_of_steps: Sequence[bool], find: Callable[..., Any],
          args: argparse.Namespace, native: bool) -> dict[str, Any]:
    return {_precision(amp): find(args, amp, native)
            for amp in precisions_of_steps}


if __name__ == '__main__':
    sys.exit(main())
