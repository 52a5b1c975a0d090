"""The node of ``mmtune/csrc/fold.cpp``, built for the torch that is running.

It is built at the first fold, in about half a minute, and kept in a folder
that is named for the torch, the Python, the source and the compiler:
``$TORCH_EXTENSIONS_DIR/mmtune`` or ``~/.cache/mmtune``. Where it cannot be
built, :mod:`mmtune.functional.fold` computes the same in Python. The
environment variable ``MMTUNE_NATIVE`` says otherwise: 0 never uses it, 1 makes
its absence an error. To build it ahead, in an image say, and see where it
lies::

    python -m mmtune.native
"""
import contextlib
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ['BuildError', 'built_file', 'is_wanted', 'load', 'node']

SOURCE = Path(__file__).parents[1] / 'csrc' / 'fold.cpp'
NAME = 'mmtune_fold'
# Seconds that a build may take, and that one process waits for another's.
TIMEOUT = 600


class BuildError(RuntimeError):
    """Says why there is no native node and what to do, in one sentence."""


class _Outcome(NamedTuple):
    module: ModuleType | None
    error: BuildError | None


_outcome: _Outcome | None = None
_loading = threading.Lock()


def node() -> ModuleType | None:
    """Give the native node; the first call builds it where need be.

    Returns:
        ModuleType | None: With ``fold_and_run``, see ``csrc/fold.cpp``; None
        where it is turned off or, after one warning, cannot be had.

    Raises:
        BuildError: If it cannot be had and ``MMTUNE_NATIVE`` is 1.
        ValueError: If ``MMTUNE_NATIVE`` is neither 0 nor 1 nor empty.
    """
    global _outcome
    if _outcome is None:
        with _loading:
            if _outcome is None:
                _outcome = _first_outcome()
    if _outcome.error is not None:
        raise _outcome.error
    return _outcome.module


def is_wanted() -> bool:
    """Whether ``MMTUNE_NATIVE`` asks for the node, on any device."""
    return os.environ.get('MMTUNE_NATIVE') == '1'


def _first_outcome() -> _Outcome:
    wanted = os.environ.get('MMTUNE_NATIVE', '')
    if wanted not in ('', '0', '1'):
        raise ValueError(f'MMTUNE_NATIVE is to be 0 or 1, but is {wanted!r}; '
                         'unset it to use the native node where it builds')
    if wanted == '0':
        return _Outcome(None, None)
    try:
        return _Outcome(load(), None)
    except BuildError as error:
        if wanted == '1':
            return _Outcome(None, error)
        warnings.warn(
            f'Tune mode runs in Python, slower for small maps: {error}; '
            'MMTUNE_NATIVE=0 silences this',
            stacklevel=2)
        return _Outcome(None, None)


def load() -> ModuleType:
    """Load the native node, whatever ``MMTUNE_NATIVE`` says.

    Returns:
        ModuleType: A new one at every call, unlike :func:`node`.

    Raises:
        BuildError: If it cannot be had.
    """
    try:
        return _imported(built_file())
    except ImportError:
        # Built for another torch of the same version, say.
        try:
            return _imported(built_file(anew=True))
        except ImportError as error:
            raise BuildError(
                f'the native node was built but does not load ({error}); '
                f'set MMTUNE_NATIVE=0') from error


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------
# The folder of builds
# --------------------------------------------------------------------------


def built_file(anew: bool = False) -> Path:
    """Find the built node, or build it.

    Args:
        anew (bool): Whether to build even if there is one.

    Returns:
        Path: A shared library, with its own digest in its name.

    Raises:
        BuildError: If there is none and it cannot be built.
    """
    compiler = _compiler()
    builds = _builds()
    if compiler is None:
        # A build of before serves: images often leave out the compiler.
        for path in sorted(builds.glob(f'*/{NAME}-*.so')):
            if not anew and _is_whole(path):
                return path
        raise BuildError('found no C++ compiler to build the native node '
                         'with; install g++, or point CXX to one')
    version = _version(compiler)
    command = _command(compiler, version)
    folder = builds / _digest('\0'.join([*command, version]).encode())
    try:
        if not anew:
            # Without the lock, which a folder of an image may not allow.
            for path in folder.glob(f'{NAME}-*.so'):
                if _is_whole(path):
                    return path
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / 'lock'):
            for path in folder.glob(f'{NAME}-*.so'):
                if not anew and _is_whole(path):
                    return path
                path.unlink()
            return _build(command, folder)
    except OSError as error:
        raise BuildError(
            f'the native node cannot be kept in {folder} ({error}); set '
            'TORCH_EXTENSIONS_DIR to a folder that can be written') from error


def _builds() -> Path:
    root = os.environ.get('TORCH_EXTENSIONS_DIR')
    if not root:
        root = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    return (
        Path(root).expanduser().absolute() / 'mmtune' /
        '-'.join([torch.__version__, str(sys.implementation.cache_tag),
                  platform.machine(), _digest(_sources())]))


def _sources() -> bytes:
    """The source and what it includes."""
    return b''.join(
        path.read_bytes() for path in sorted(SOURCE.parent.glob('*.*')))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _is_whole(path: Path) -> bool:
    """To load a file that was cut short would end the process."""
    return path.stem == f'{NAME}-{_digest(path.read_bytes())}'


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that goes when its process does.

    A process that hangs is not waited for in the end: two builds at a time
    are a waste, but no harm.
    """
    with path.open('w') as file:
        end = time.monotonic() + TIMEOUT
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    break
                time.sleep(.1)
            except OSError:  # some network folders have no locks
                break
        yield


# --------------------------------------------------------------------------
# The compiler
# --------------------------------------------------------------------------


def _compiler() -> list[str] | None:
    """What ``CXX`` says, as torch's own loader has it, or what is found."""
    named = shlex.split(os.environ.get('CXX', ''))
    if named:
        return named if shutil.which(named[0]) else None
    for name in ('c++', 'g++', 'clang++'):
        found = shutil.which(name)
        if found:
            return [found]
    return None


def _version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, '--version'], capture_output=True,
                              text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f'the compiler {shlex.join(compiler)} does not run '
                         f'({error}); point CXX to one that does') from error


def _command(compiler: list[str], version: str) -> list[str]:
    """The call of the compiler, but for where its output goes.

    Nothing here depends on this very processor, and nothing allows the
    compiler to change a result.
    """
    package = Path(torch.__file__).parent
    standard = ('c++17' if 'C++ Version: 201703' in torch.__config__.show()
                else 'c++20')
    abi = int(torch.compiled_with_cxx11_abi())
    include = package / 'include'
    command = [
        *compiler, '-O3', '-fno-math-errno', '-fPIC', '-shared',
        f'-std={standard}',
        f'-D_GLIBCXX_USE_CXX11_ABI={abi}', f'-DTORCH_EXTENSION_NAME={NAME}',
        f'-isystem{include}', f'-isystem{include}/torch/csrc/api/include',
        f'-isystem{sysconfig.get_path("include")}', str(SOURCE),
        f'-L{package / "lib"}', '-lc10', '-ltorch_cpu', '-ltorch',
        '-ltorch_python'
    ]
    if sys.platform == 'darwin':
        command += ['-undefined', 'dynamic_lookup']
    elif 'clang' not in version:
        # By torch's own OpenMP: of two, each would have threads of its own.
        own = [*(package / 'lib').glob('libgomp*'),
               *(package.with_name('torch.libs')).glob('libgomp*')]
        command += ['-fopenmp', *map(str, own[:1])]
    return command


def _build(command: list[str], folder: Path) -> Path:
    start = time.monotonic()
    _say(f'building the native node of Tune mode for torch '
         f'{torch.__version__}, once, in about half a minute ...')
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / f'{NAME}.so'
        try:
            result = subprocess.run([*command, '-o', str(output)],
                                    capture_output=True, text=True,
                                    errors='replace', timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise BuildError(
                f'{command[0]} was not done with the native node after '
                f'{TIMEOUT} s; set MMTUNE_NATIVE=0') from error
        if result.returncode or not output.exists():
            lines = [line for line in result.stderr.splitlines() if line]
            errors = [line for line in lines if 'error' in line] or lines
            raise BuildError(
                f'{command[0]} cannot build the native node '
                f'({(errors or ["without a message"])[0].strip()}); install '
                "the compiler and Python's headers, or point CXX to another "
                'compiler')
        path = folder / f'{NAME}-{_digest(output.read_bytes())}.so'
        output.replace(path)
    _say(f'built in {time.monotonic() - start:.0f} s: {path}')
    return path


def _say(line: str) -> None:
    print(f'mmtune: {line}', file=sys.stderr, flush=True)

