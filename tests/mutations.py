"""Break the core in ways that a mistake could, and see that a test turns red.

Each change is made in a copy of the package, and the tests that are to notice
it run there until the first of them fails::

    python tests/mutations.py

prints the table of docs/en/contributing.md, which names tests without their
cases. A change that no test notices is an error.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """A change that breaks the core.

    Attributes:
        what (str): In words.
        file (str): Where, in the package.
        old (str): What is there, once.
        new (str): What is put in its place.
        tests (str): Where a test has to notice it.
        native (bool): Whether the native node runs. It would hide a change
            of what it replaces.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str
    native: bool = False


CONVOLUTION = 'behaviours/test_convolution.py'
MUTATIONS = (
    Mutation('the mean added, not taken away', 'functional/fold.py',
             '.rsqrt_(), -running_mean', '.rsqrt_(), running_mean',
             'functional/test_fold.py'),
    Mutation("gamma's gradient without the bias's part",
             'functional/fold.py', 'grad_scale = (grad_coeff * rstd)',
             'grad_scale = (dot * rstd)', 'functional/test_fold.py'),
    Mutation("the bias's gradient not chained through the fold",
             'functional/fold.py', 'grad_bias = (grad_folded_bias * coeff)',
             'grad_bias = grad_folded_bias', 'functional/test_fold.py'),
    Mutation('the native coefficient without gamma', 'csrc/fold.cpp',
             'gamma ? rstd[c] * gamma[c] : rstd[c]', 'rstd[c]',
             'test_native.py', True),
    Mutation("the native bias's gradient without the coefficient",
             'csrc/fold.cpp', 'out[c] = sums[c] * coeff[c];',
             'out[c] = sums[c];', 'test_native.py', True),
    Mutation('statistics of the batch taken for fixed ones',
             'layers/kinds.py', 'return (not norm.training and buffers',
             'return (buffers', CONVOLUTION),
    Mutation('eps left out', 'functional/fold.py', '(running_var + eps)',
             'running_var.clone()', 'functional/test_fold.py'),
    Mutation('changes after the call not looked for',
             'behaviours/deferred.py',
             'return self.fingerprints != self.current_fingerprints()',
             'return False', CONVOLUTION),
    Mutation('code replaced on a class not looked for',
             'behaviours/forward.py',
             'and self.code == self.kind.code(type(layer))', '',
             'behaviours/test_known.py', True),
    Mutation('facts of a known pair not asked again',
             'csrc/guard.h', 'return all_hold(facts.ptr()) &&\n      like',
             'return like', 'behaviours/test_known.py', True),
    Mutation("a clamp's gradient let through at its border",
             'csrc/clamp.h', '(map[i] > low)', '(map[i] >= low)',
             'functional/test_clamp.py', True),
    Mutation('an output that was changed taken for the one that was given',
             'behaviours/remade.py',
             '                or tensor._version != self.output_version\n', '',
             'behaviours/test_activation.py'),
)


def first_failure(mutation: Mutation) -> str | None:
    """Make a change in a copy, and run the tests that are to notice it.

    Args:
        mutation (Mutation): The change.

    Returns:
        str | None: The first test that fails; None where all pass.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ('mmtune', 'tests', 'pyproject.toml'):
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, Path(folder, name))
        path = Path(folder, 'mmtune', mutation.file)
        text = path.read_text()
        if text.count(mutation.old) != 1:
            raise ValueError(f'{mutation.file} is to have {mutation.old!r} '
                             f'once, but has it {text.count(mutation.old)} '
                             'times; mend tests/mutations.py')
        path.write_text(text.replace(mutation.old, mutation.new))
        result = subprocess.run(
            [sys.executable, '-m', 'pytest', '-x', '-q', '-p',
             'no:cacheprovider', '-m', 'not slow and not exhaustive',
             f'tests/{mutation.tests}'], cwd=folder, capture_output=True,
            env={**os.environ, 'PYTHONPATH': folder,
                 'MMTUNE_NATIVE': str(int(mutation.native)),
                 'TORCH_EXTENSIONS_DIR': str(Path(folder, 'native'))},
            text=True)
    found = re.search(r'^(?:FAILED|ERROR) (\S+)', result.stdout, re.MULTILINE)
    return found and found[1]


def main() -> None:
    """Try every change, and print each row of the table as it is known."""
    print('| change | in | first test to fail |\n| --- | --- | --- |')
    unnoticed = 0
    for mutation in MUTATIONS:
        test = first_failure(mutation)
        unnoticed += test is None
        print(f'| {mutation.what} | `mmtune/{mutation.file}` | '
              f'{f"`{test}`" if test else "none"} |', flush=True)
    if unnoticed:
        sys.exit(f'{unnoticed} changes were noticed by no test')


if __name__ == '__main__':
    main()
