"""Check what of the paper can be checked here, and write the pages of it.

Without names, all of them, one after another, each in a process of its own.
Each writes its figures, a plot and a page to docs/en/reproduction; the index
of them is docs/en/reproduction.md.
"""
import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType

from mmengine.logging import MMLogger
from reproductions import records
from reproductions.pages import paragraph, table

from mmtune.analysis.machine import describe_commit, describe_machine

ROOT = Path(__file__).resolve().parents[1]
NAMES = ('table4', 'accuracy', 'coefficients', 'mechanism', 'classification',
         'architectures', 'adversarial', 'statistics', 'precision', 'scratch',
         'normalizations')

INTRODUCTION = """\
# The paper, as far as small machines can check it

<!-- Written by tools/reproduce.py; do not edit. -->

Each page asks one question of
[arXiv 2305.11624](https://arxiv.org/abs/2305.11624), or one that it leaves
open, and answers it with figures that one command measures anew:

```bash
make reproduce                       # all pages
python tools/reproduce.py accuracy   # one of them
python tools/reproduce.py --render   # write the pages from their figures
```

The figures stand as JSON beside the pages, in
`docs/en/reproduction/`. Nothing was run on a GPU, nor on COCO, CUB-200,
Aircraft or Cars, so that no time on a GPU is checked; the commands for 8 GPUs
are on the pages on [Table 4](reproduction/table4.md#not-run-here) and
[Table 3](reproduction/classification.md#not-run-here). That 496 of 634 configs
of MMDetection train with BatchNorm in eval mode is not checked either."""


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


def load(name: str) -> ModuleType:
    """Import what makes a page.

    Args:
        name (str): Of :data:`NAMES`.

    Returns:
        ModuleType: With ``TITLE``, ``OF_PAPER`` (what of the paper it is
        about), ``QUESTION``, ``run``, ``answer``, ``page`` and ``plot``.
    """
    return importlib.import_module(f'reproductions.{name}')


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


def render(name: str, folder: Path) -> None:
    """Write the page and the plot of a reproduction from its figures.

    Args:
        name (str): Of :data:`NAMES`.
        folder (Path): With ``NAME.json``.
    """
    record = json.loads((folder / f'{name}.json').read_text())
    module = load(name)
    module.plot(record['found'], folder / f'{name}.png')
    (folder / f'{name}.md').write_text(write_page(name, module, record))


def write_page(name: str, module: ModuleType, record: dict) -> str:
    """Write a page.

    Args:
        name (str): Of :data:`NAMES`.
        module (ModuleType): From :func:`load`.
        record (dict): From :func:`measure`.

    Returns:
        str: Markdown.
    """
    how = (f'`{record["command"]}`, {duration(record["seconds"])} on '
           f'{record["cpu"]} ({record["cores"]} cores), on the '
           f'{record["device"]}; torch '
           f'{record["torch"]}, mmtune {record["mmtune"]}, commit '
           f'{record["commit"] or "unknown"}.')
    return '\n\n'.join([
        f'# {module.TITLE}', f'<!-- Written by {record["command"]}; do not '
        'edit. -->',
        paragraph(module.QUESTION),
        paragraph(f'**{module.answer(record["found"])}**'),
        f'![{module.TITLE}]({name}.png)',
        module.page(record['found']).strip(), '## How it was measured',
        paragraph(how)
    ]) + '\n'


def write_index(docs: Path) -> str:
    """Write the page that leads to the others.

    Args:
        docs (Path): The folder with ``reproduction/``.

    Returns:
        str: Markdown.
    """
    rows, missing, seconds, commits, machines = [], [], 0, set(), set()
    for name in NAMES:
        path = docs / f'reproduction/{name}.json'
        module = load(name)
        if not path.is_file():
            missing.append(f'- {module.TITLE}')
            continue
        record = json.loads(path.read_text())
        seconds += record['seconds']
        commits.add(record['commit'] or 'unknown')
        machines.add(f'{record["cpu"]} ({record["cores"]} cores)')
        rows.append((f'[{module.TITLE}](reproduction/{name}.md)',
                     module.OF_PAPER, module.answer(record['found']),
                     duration(record['seconds'])))
    total = paragraph(
        f'The runs took {duration(seconds)} together on '
        f'{", ".join(sorted(machines))}, on the CPU, at commit '
        f'{", ".join(sorted(commits))}.') if rows else ''
    titles = 'page', 'of the paper', 'what came out', 'time'
    parts = [INTRODUCTION, table(titles, rows), total]
    if missing:
        parts += ['Not run here:', '\n'.join(missing)]
    return '\n\n'.join(filter(None, parts)) + '\n'


def duration(seconds: int) -> str:
    """Write a time.

    Args:
        seconds (int): Whole seconds.

    Returns:
        str: Such as ``'3 min 20 s'``.
    """
    minutes, rest = divmod(seconds, 60)
    return f'{minutes} min {rest} s' if minutes else f'{rest} s'


def main() -> None:
    warnings.filterwarnings('ignore', 'pkg_resources is deprecated')
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    args = parse_args()
    folder = args.docs / 'reproduction'
    names = args.names or NAMES
    failed = []
    if not args.render:
        if len(names) == 1:
            measure(names[0], folder)
        else:
            # Each in a process of its own, or the settings that one leaves
            # behind would be those of the next.
            for name in names:
                print(f'== {name}', flush=True)
                command = [sys.executable, __file__, name, '--docs',
                           str(args.docs)]
                if subprocess.run(command).returncode:
                    failed.append(name)
    for name in names:
        if (folder / f'{name}.json').is_file() and name not in failed:
            render(name, folder)
    (args.docs / 'reproduction.md').write_text(write_index(args.docs))
    if failed:
        sys.exit(f'{", ".join(failed)} failed; the messages are above.')


if __name__ == '__main__':
    main()
