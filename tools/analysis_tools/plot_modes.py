"""Draw what benchmark_modes.py and estimate_memory.py wrote with --json.

One panel a file: bars of memory with the ratio of times, or lines of memory
over the batch size with the limit.
"""
import argparse
import json
from pathlib import Path

from shared import picture_file, run, write_plot


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'files', nargs='+', type=Path, metavar='FILE.json')
    parser.add_argument(
        '--out',
        type=picture_file,
        required=True,
        metavar='FILE.png',
        help='the picture to write; its folder is made where there is none')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    results = []
    for path in args.files:
        try:
            results.append(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f'{path} must be JSON, but has at line '
                             f'{error.lineno}: {error.msg}') from error
    write_plot(args.out, 'plot_steps', results)


if __name__ == '__main__':
    run(main)
