"""Make the environment of a library that is swept, ``.venv-sweeps/LIB``.

It has what the library needs, and sees everything of ``.venv`` behind that:
torch is installed once. Where it is up to date this returns at once.
"""
import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.sweeps.libraries import library

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / 'requirements' / 'constraints.txt'


def main(name: str = '') -> None:
    """Bring the environment of a library up to date.

    Args:
        name (str): Of the library.

    Raises:
        SystemExit: If there is none of that name, or pip fails.
    """
    try:
        module = library(name)
    except ValueError as error:
        sys.exit(str(error))
    venv = ROOT / '.venv-sweeps' / name
    complete = venv / 'complete'
    wanted = fingerprint(module.REQUIREMENTS, module.ALONE)
    if complete.exists() and complete.read_text() == wanted:
        return
    run(sys.executable, '-m', 'venv', '--clear', '--without-pip', venv)
    base = packages_of(venv) / 'base.pth'
    base.write_text(f'{packages_of(Path(sys.prefix))}\n')
    pip = (venv / 'bin' / 'python', '-m', 'pip', 'install', '--quiet', '-c',
           CONSTRAINTS)
    if module.REQUIREMENTS:
        run(*pip, *module.REQUIREMENTS)
    if module.ALONE:
        run(*pip, '--no-deps', *module.ALONE)
    complete.write_text(wanted)


def packages_of(venv: Path) -> Path:
    """Where the packages of a virtual environment are."""
    return Path(sysconfig.get_path('purelib', vars={'base': str(venv)}))


def fingerprint(*requirements: tuple[str, ...]) -> str:
    """Return a digest of all that decides what is installed."""
    text = repr(requirements) + sys.version + CONSTRAINTS.read_text()
    return hashlib.sha256(text.encode()).hexdigest()


def run(*command: object) -> None:
    """Run a command whose output the user sees, and stop if it fails."""
    words = list(map(str, command))
    if subprocess.run(words).returncode:
        sys.exit(f'The set-up stopped, as `{" ".join(words)}` failed.')


if __name__ == '__main__':
    main(*sys.argv[1:])
