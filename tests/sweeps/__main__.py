"""Sweep a library, and keep what was found in docs/en/sweeps.json.

``make sweep LIB=timm`` calls this in the environment of the library, as
``python -m tests.sweeps timm``. With names of networks behind it, it sweeps
those alone and keeps nothing.
"""
import argparse
import importlib.metadata
import json
import re
import resource
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from mmtune import native
from mmtune.analysis.machine import describe_commit, describe_machine
from tests.sweeps.isolation import Failed, isolated
from tests.sweeps.libraries import LIBRARIES, library
from tests.sweeps.oracle import STATES, Outcome, compare

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'docs' / 'en' / 'sweeps.json'
# A network that takes longer is left out, with that as the reason.
SECONDS = 480
MOST_BYTES = 16 * 2**30


def main() -> None:
    """Parse the command line, sweep, and show and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('library', choices=LIBRARIES)
    parser.add_argument('networks', nargs='*', help='default: all of it')
    options = parser.parse_args()
    module = library(options.library)
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    native.node()  # is loaded once for all processes
    commit = describe_commit(ROOT)  # files may change meanwhile
    found = sweep(module, options.networks or module.names())
    if not options.networks:
        keep(options.library, record(options.library, module, found, commit))


def sweep(module: ModuleType, names: Iterable[str]) -> dict[str, Outcome]:
    """Compare networks one after the other, each in its own process."""
    names, found = list(names), {}
    # A thread that draws would be forked in the middle of it.
    with Progress(console=Console(width=79), auto_refresh=False) as progress:
        task = progress.add_task('', total=len(names))
        for name in names:
            progress.update(task, description=name, refresh=True)
            start = time.monotonic()
            outcome = found[name] = try_one(module, name)
            seconds = time.monotonic() - start
            progress.console.print(f'{name}: {line(outcome)}, {seconds:.0f} s',
                                   highlight=False, markup=False)
            progress.advance(task)
    return found


def try_one(module: ModuleType, name: str) -> Outcome:
    """Compare a network, whatever becomes of its process."""
    try:
        return isolated(in_float64, module, name, seconds=SECONDS)
    except Failed as error:
        is_ours = error.doing == 'running in Tune mode'
        return Outcome('raised' if is_ours else 'skipped', str(error))


def in_float64(module: ModuleType, name: str,
               tell: Callable[[str], None]) -> Outcome:
    """Compare a network whose forward makes tensors in float64 as well."""
    torch.set_default_dtype(torch.float64)
    # What is too large is to fail by itself, and nothing beside it.
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    return compare(module, name, tell)


def line(outcome: Outcome) -> str:
    """Say an outcome in a line."""
    text = f'{outcome.state}, {outcome.fused} of {outcome.eligible}'
    reasons = [f'{count} x {reason}'
               for reason, count in outcome.left_out.items()]
    return '; '.join(filter(None, [text, outcome.detail, *reasons]))


def record(name: str, module: ModuleType, found: dict[str, Outcome],
           commit: str | None) -> dict[str, Any]:
    """Write down what a sweep found, and what it ran on.

    Returns:
        dict[str, Any]: ``networks`` has for each that was compared its
        eligible and its fused normalizations; the other states have for each
        what happened. ``left_out`` has for each reason a count, and an
        example.
    """
    packages = [re.split('[=<>]', requirement)[0]
                for requirement in (*module.ALONE, *module.REQUIREMENTS)]
    result = dict(
        command=f'make sweep LIB={name}',
        **describe_machine(),
        commit=commit,
        versions={package: importlib.metadata.version(package)
                  for package in packages},
        networks={network: [outcome.eligible, outcome.fused]
                  for network, outcome in found.items()
                  if outcome.state in ('equal', 'wrong', 'raised')},
        left_out=left_out(found))
    for state in STATES[1:]:
        result[state] = {network: outcome.detail
                         for network, outcome in found.items()
                         if outcome.state == state}
    return result


def left_out(found: dict[str, Outcome]) -> dict[str, list]:
    """Count the reasons of all networks, the most frequent first."""
    counts: dict[str, list] = {}
    for network, outcome in found.items():
        for reason, count in outcome.left_out.items():
            # The name of a layer makes no other reason.
            entry = counts.setdefault(re.sub("'[^']*'", '...', reason),
                                      [0, network])
            entry[0] += count
    return dict(sorted(counts.items(), key=lambda item: -item[1][0]))


def keep(name: str, result: dict[str, Any]) -> None:
    """Write a library's result beside those of the others."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = result
    text = json.dumps(dict(sorted(results.items())), indent=1)
    # A pair of numbers on one line.
    text = re.sub(r'\[\s+(\d+),\s+([^\[\]]+?)\s+\]', r'[\1, \2]', text)
    RESULTS.write_text(text + '\n')


if __name__ == '__main__':
    main()
