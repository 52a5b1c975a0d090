"""Check what of the paper can be checked here, and write the pages of it.

Without names, all of them, one after another, each in a process of its own.
Each writes its figures and its drawings to docs/en/reproduction and fills
them into its page there; the index of them is docs/en/reproduction.md.
"""
import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

from mmengine.logging import MMLogger
from reproductions import records
from reproductions.page import Page, duration, fill, table, without_places

from mmtune.analysis.machine import describe_commit, describe_machine

ROOT = Path(__file__).resolve().parents[1]
# Where the prose of the pages is.
TEXTS = ROOT / 'docs' / 'en'
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
        '--docs',
        type=Path,
        default=Path('docs/en'),
        metavar='FOLDER',
        help='where the pages are written (default: %(default)s)')
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


def source(name: str) -> str:
    """Tell under which name the figures of a page are measured."""
    return SOURCES.get(name, name)


def measure(name: str, folder: Path) -> None:
    """Run one reproduction, and keep its figures.

    Args:
        name (str): Of :data:`NAMES`.
        folder (Path): Where ``NAME.json`` is written.
    """
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
    records.write(folder / f'{name}.json', record)


def measure_all(names: Iterable[str], docs: Path) -> list[str]:
    """Run several reproductions.

    Each in a process of its own, or the settings that one leaves behind would
    be those of the next.

    Args:
        names (Iterable[str]): Of :data:`NAMES`.
        docs (Path): The folder with ``reproduction/``.

    Returns:
        list[str]: Those that failed.
    """
    failed = []
    for name in names:
        print(f'== {name}', flush=True)
        command = [sys.executable, __file__, name, '--docs', str(docs)]
        if subprocess.run(command).returncode:
            failed.append(name)
    return failed


def render(name: str, folder: Path) -> None:
    """Write the page and the plot of a reproduction from its figures.

    Args:
        name (str): Of :data:`NAMES`.
        folder (Path): With the JSON of its :func:`source`.
    """
    record = json.loads((folder / f'{source(name)}.json').read_text())
    page = load(name)
    page.plot(record['found'], folder / f'{name}.png')
    (folder / f'{name}.md').write_text(write_page(name, record))


def write_page(name: str, record: dict) -> str:
    """Fill a page with what was found.

    Args:
        name (str): Of :data:`NAMES`.
        record (dict): From :func:`measure`.

    Returns:
        str: Markdown.
    """
    text = (TEXTS / f'reproduction/{name}.md').read_text()
    return load(name).write(text, record)


def write_index(docs: Path) -> str:
    """Write the page that leads to the others.

    Args:
        docs (Path): The folder with ``reproduction/``.

    Returns:
        str: Markdown.
    """
    folder = docs / 'reproduction'
    done = [name for name in NAMES
            if (folder / f'{source(name)}.json').is_file()]
    records_ = {name: json.loads((folder / f'{name}.json').read_text())
                for name in dict.fromkeys(map(source, done))}
    # What has not been run has no page in another folder.
    heads = {name: read_head((folder if name in done else
                              TEXTS / 'reproduction') / f'{name}.md')
             for name in NAMES}
    parts = [table(done, {
        'page': lambda name: f'[{heads[name][0]}](reproduction/{name}.md)',
        'of the paper': NAMES.get,
        'what came out': lambda name: heads[name][1],
        'time': lambda name: duration(records_[source(name)]['seconds'])
    })]
    if done:
        parts.append(totals(records_.values()))
    missing = [f'- {heads[name][0]}' for name in NAMES if name not in done]
    if missing:
        parts += ['Not run here:', '\n'.join(missing)]
    return fill((TEXTS / 'reproduction.md').read_text(),
                dict(pages='\n\n'.join(parts)))


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
    folder = args.docs / 'reproduction'
    wanted = dict.fromkeys(map(source, args.names or NAMES))
    failed = []
    if not args.render and len(wanted) == 1:
        measure(*wanted, folder)
    elif not args.render:
        failed = measure_all(wanted, args.docs)
    for name in NAMES:
        measured = source(name)
        if (measured in wanted and measured not in failed
                and (folder / f'{measured}.json').is_file()):
            render(name, folder)
    (args.docs / 'reproduction.md').write_text(write_index(args.docs))
    if failed:
        sys.exit(f'{", ".join(failed)} failed; the messages are above.')


if __name__ == '__main__':
    main()
