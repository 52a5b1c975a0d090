"""Check what of the paper can be checked here, and write the pages of it.

Without names, all of them, one after another, each in a process of its own.
Each writes its figures and its drawings to docs/en/reproduction and fills
them into its page there; the index of them is docs/en/reproduction.md.
"""
import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmengine.logging import MMLogger
from reproductions.page import Page, duration, fill, table, without_places

from mmtune.analysis.machine import describe_commit, describe_machine

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs/en'
# What of the paper each is about.
NAMES = {
    'table4': 'Table 4, memory',
    'accuracy': 'Table 4, mAP',
    'coefficients': 'Mechanism 1',
    'mechanism': 'Mechanism 1',
    'limits': 'Mechanism 1',
    'classification': 'Table 3',
    'architectures': '40% less memory',
    'adversarial': 'adversarial examples',
    'statistics': 'left open',
    'precision': 'left open',
    'scratch': 'left open',
    'normalizations': 'left open',
}
# Pages that are written from what is measured for another.
SOURCES = {'limits': 'mechanism'}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'names',
        nargs='*',
        metavar='NAME',
        help=f'of {", ".join(NAMES)} (default: all)')
    parser.add_argument(
        '--render',
        action='store_true',
        help='run nothing, but write pages and plots from the JSON files')
    args = parser.parse_args()
    for name in args.names:
        if name not in NAMES:
            parser.error(f'NAME must be one of {", ".join(NAMES)}, but got '
                         f'{name!r}')
    return args


def load(name: str) -> Page:
    """Import what makes a page, by its name in :data:`NAMES`."""
    return importlib.import_module(f'reproductions.{name}').PAGE


def file_of(name: str, suffix: str) -> Path:
    """Name a file of a page: its text, its plot or, of another's, its JSON."""
    if suffix == '.json':
        name = SOURCES.get(name, name)
    return DOCS / 'reproduction' / f'{name}{suffix}'


def read_record(name: str) -> dict[str, Any]:
    """Read what :func:`measure` has written for a page."""
    return json.loads(file_of(name, '.json').read_text())


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write plain data as JSON, a line for each row of numbers.

    Floats are rounded to 9 digits, which tell every float32 from its
    neighbours.

    Raises:
        ValueError: If a number is not finite.
    """
    plain = json.loads(
        json.dumps(record, allow_nan=False),
        parse_float=lambda text: float(f'{float(text):.9g}'))
    text = json.dumps(plain, indent=1, separators=(', ', ': '))
    # What holds neither lists nor objects is on one line.
    text = re.sub(r'[\[{][^][{}]*[\]}]',
                  lambda match: re.sub('\n *', '', match[0]), text)
    path.write_text(re.sub(' +\n', '\n', text) + '\n')


def measure(name: str) -> None:
    """Run one reproduction, and keep its figures."""
    # MMEngine tells every parameter's learning rate as a matter of course.
    MMLogger.get_instance('reproduce', log_level='WARNING')
    # At the start: later the repository may have changed.
    record = dict(
        command=f'python tools/reproduce.py {name}',
        **describe_machine(),
        commit=describe_commit(ROOT))
    start = time.monotonic()
    found = load(name).run()
    record |= dict(seconds=round(time.monotonic() - start), found=found)
    write_record(file_of(name, '.json'), record)


def measure_all(names: Iterable[str]) -> list[str]:
    """Run several reproductions, and tell which failed.

    Each in a process of its own, or the settings that one leaves behind would
    be those of the next.
    """
    failed = []
    for name in names:
        print(f'== {name}', flush=True)
        if subprocess.run([sys.executable, __file__, name]).returncode:
            failed.append(name)
    return failed


def render(name: str) -> None:
    """Write the page and the plot of a reproduction from its figures."""
    record, page = read_record(name), file_of(name, '.md')
    load(name).plot(record['found'], file_of(name, '.png'))
    page.write_text(load(name).write(page.read_text(), record))


def write_index() -> str:
    """Write the page that leads to the others, in Markdown."""
    done = [name for name in NAMES if file_of(name, '.json').is_file()]
    records = {name: read_record(name) for name in done}
    heads = {name: read_head(file_of(name, '.md')) for name in done}
    pages = table(done, {
        'page': lambda name: f'[{heads[name][0]}](reproduction/{name}.md)',
        'of the paper': NAMES.get,
        'what came out': lambda name: heads[name][1],
        'time': lambda name: duration(records[name]['seconds'])
    })
    runs = totals(record for name, record in records.items()
                  if name not in SOURCES)
    return fill((DOCS / 'reproduction.md').read_text(),
                dict(pages=f'{pages}\n\n{runs}'))


def read_head(page: Path) -> tuple[str, str]:
    """Read the title of a page, and what came out: its first bold text."""
    text = without_places(page.read_text())
    title = text.split('\n', 1)[0].removeprefix('# ')
    return title, ' '.join(text.split('**')[1].split())


def totals(found: Iterable[dict]) -> str:
    """Say how long all runs took, and where they were."""
    rows = list(found)
    commits = sorted({row['commit'] or 'unknown' for row in rows})
    machines = sorted({f'{row["cpu"]} ({row["cores"]} cores)'
                       for row in rows})
    return (f'The runs took {duration(sum(row["seconds"] for row in rows))} '
            f'together on {", ".join(machines)}, on the CPU, at commit '
            f'{", ".join(commits)}.')


def main() -> None:
    warnings.filterwarnings('ignore', 'pkg_resources is deprecated')
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    args = parse_args()
    wanted = {SOURCES.get(name, name) for name in args.names or NAMES}
    failed = []
    if not args.render and len(wanted) == 1:
        measure(*wanted)
    elif not args.render:
        failed = measure_all(name for name in NAMES if name in wanted)
    for name in NAMES:
        if SOURCES.get(name, name) in wanted.difference(failed):
            render(name)
    (DOCS / 'reproduction.md').write_text(write_index())
    if failed:
        sys.exit(f'{", ".join(failed)} failed; the messages are above.')


if __name__ == '__main__':
    main()
