"""What the analysis tools share: arguments, models, output.

Without rich, tables are plain text: with ``--model`` a tool needs torch and
nothing else.
"""
import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:
    Console = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all analysis tools have.

    Args:
        parser (argparse.ArgumentParser): The parser to add them to.
    """
    parser.add_argument(
        '--model',
        metavar='MODULE:CALLABLE',
        help='a function or class that gives a PyTorch model, such as '
        'torchvision.models:resnet50; looked for in this folder too')
    parser.add_argument(
        '--modules',
        nargs='+',
        metavar='NAME',
        help='submodules to look at, such as backbone (default: those of the '
        "config's efficient_conv_bn_eval, else the whole model)")
    parser.add_argument(
        '--json',
        type=Path,
        metavar='FILE.json',
        help='write everything that was found to this file')
    parser.add_argument(
        '--plot',
        type=Path,
        metavar='FILE.png',
        help='draw it into this picture; needs matplotlib')
    # A script looks for modules in its own folder, but not in this one.
    sys.path.append(os.getcwd())


def quiet_mmengine() -> None:
    """Keep MMEngine from telling how every parameter was initialized."""
    from mmengine.logging import MMLogger
    MMLogger.get_instance('analysis', log_level='WARNING')


@contextlib.contextmanager
def stage(text: str) -> Iterator[None]:
    """Show what is being done as long as it is.

    Args:
        text (str): Such as ``'Build the model'``.
    """
    if Console is None or not sys.stderr.isatty():
        print(f'{text} ...', file=sys.stderr)
        yield
        return
    with Console(stderr=True).status(text):
        yield


def show_table(columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Print a table.

    Args:
        columns (Sequence[str]): Their titles.
        rows (Sequence[Sequence]): Cells, shown as ``str`` does.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if Console is None:
        print('\n'.join('\t'.join(row) for row in [columns, *cells]))
        return
    table = Table(*columns, box=None)
    for row in cells:
        table.add_row(*row)
    # Into a file it should come unbroken.
    Console(width=None if sys.stdout.isatty() else 250).print(table)


def write_json(path: Path | None, found: dict) -> None:
    """Write what a tool has found, where a file was asked for.

    Args:
        path (Path, optional): Its folder is made where there is none.
        found (dict): Plain data.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2, allow_nan=False) + '\n')
    print(f'Wrote {path}')
