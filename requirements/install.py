"""Make the project's virtual environment, `.venv`, with pinned versions.

`make env` runs this with the Python that `.venv` is to be made from; only the
standard library is needed. Arguments are extras of setup.py that most targets
do without, such as `docs`: they are installed into `.venv` as well. Where
`.venv` is complete and up to date it returns at once; where an earlier run was
cut short it goes on from there. pip obeys its own settings, so an index or a
folder of wheels named in `PIP_*` variables is used.
"""
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / 'requirements' / 'constraints.txt'
SITECUSTOMIZE = ROOT / 'requirements' / 'mmcv_build'
VENV = ROOT / '.venv'
PYTHON = VENV / 'bin' / 'python'
# Holds the fingerprint of what a complete environment was made from.
COMPLETE = VENV / 'complete'
# Is there while pip changes the environment: found at the start of a run, it
# tells that pip was cut short, which can leave packages installed by half.
CHANGING = VENV / 'changing'

# Compiling mmcv 2.1.0 took 16 minutes on 2 cores.
CORE_MINUTES = 32

OPS_WORK = """
import torch
from mmcv.ops import get_compiling_cuda_version
if torch.cuda.is_available():
    assert get_compiling_cuda_version() != 'not available'
"""

DESCRIBE = """
import json, os, sys, sysconfig, torch
from torch.utils.cpp_extension import CUDA_HOME
gpu = torch.cuda.is_available()
print(json.dumps(dict(
    tag='-'.join((f'torch{torch.__version__}', 'cuda' if gpu else 'cpu',
                  sys.implementation.cache_tag)),
    gpu=gpu,
    cuda=torch.version.cuda,
    nvcc=CUDA_HOME is not None,
    header=os.path.join(sysconfig.get_path('include'), 'Python.h'))))
"""


def main(extras=()):
    """Bring `.venv` up to date, one run at a time."""
    if sys.version_info < (3, 10):  # noqa: UP036 - make may name any Python
        found = '.'.join(map(str, sys.version_info[:2]))
        sys.exit(f'mmtune needs Python 3.10 or later, but {sys.executable} '
                 f'is {found}: name another one, as in '
                 '`make env PYTHON=python3.12`.')
    with CONSTRAINTS.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = fingerprint()
        if not is_complete(wanted):
            install()
            COMPLETE.write_text(wanted)
            say('Done')
        for extra in extras:
            add(extra, wanted)


def add(extra, wanted):
    """Install what an extra of setup.py needs, unless it is there."""
    complete = COMPLETE.with_name(f'complete-{extra}')
    if complete.exists() and complete.read_text() == wanted:
        return
    say(f'Installing the packages of the extra `{extra}`')
    with changing():
        pip('install', '--no-build-isolation', '--editable',
            f'{ROOT}[{extra}]')
    complete.write_text(wanted)


def is_complete(wanted):
    """Return whether `.venv` was made from what `wanted` is a digest of."""
    return (PYTHON.exists() and COMPLETE.exists()
            and COMPLETE.read_text() == wanted)


def fingerprint():
    """Return a digest of every file that decides what is installed."""
    files = (CONSTRAINTS, ROOT / 'setup.py', ROOT / 'pyproject.toml',
             ROOT / 'mmtune' / 'version.py')
    content = b'\0'.join(file.read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()


def install():
    """Run every step of the set-up; what is there already costs seconds."""
    if CHANGING.exists() or not runs():
        say(f'Making .venv from {sys.executable}')
        run(sys.executable, '-m', 'venv', '--clear', VENV)
    COMPLETE.unlink(missing_ok=True)
    say('Installing PyTorch; some builds of it are several gigabytes')
    with changing():
        pip('install', 'setuptools', 'wheel', 'ninja', 'torch')
    if not ops_work():
        install_mmcv()
    say('Installing the other packages')
    with changing():
        pip('install', '--no-build-isolation', '--editable',
            f'{ROOT}[mmdet,tests,lint]')
    run(PYTHON, '-c', OPS_WORK)
    build_native()


def build_native():
    """Build ahead what the first fold would; without it, Python serves."""
    say('Building the native node of Tune mode')
    subprocess.run([PYTHON, '-m', 'mmtune.native'])


def install_mmcv():
    """Install mmcv from a wheel where one serves, else compile it."""
    say('Looking for a wheel of mmcv')
    with changing():
        answer = subprocess.run(
            pip_command('install', '--only-binary=mmcv', 'mmcv'),
            stderr=subprocess.PIPE,
            text=True)
    if answer.returncode:
        print(answer.stderr.strip())
    elif ops_work():
        return
    wheel = compile_mmcv()
    with changing():
        pip('install', '--force-reinstall', '--no-deps', wheel)


def compile_mmcv():
    """Compile mmcv with its ops, showing progress.

    The sources stay in `build/`, so that a run that was cut short goes on
    with the files that were not compiled yet.

    Returns:
        Path: The wheel.
    """
    answer = subprocess.run([PYTHON, '-c', DESCRIBE],
                            check=True,
                            stdout=subprocess.PIPE,
                            text=True)
    about = json.loads(answer.stdout)
    folder = ROOT / 'build' / f'mmcv-{about["tag"]}'
    wheels = list(folder.glob('*.whl'))
    if wheels:
        return wheels[0]
    check_compiler(about)

    jobs = int(os.environ.get('MAX_JOBS', os.cpu_count()))
    # torch looks for ninja on the PATH.
    env = dict(
        os.environ,
        MMCV_WITH_OPS='1',
        MAX_JOBS=str(jobs),
        PATH=f'{PYTHON.parent}{os.pathsep}{os.environ["PATH"]}',
        PYTHONPATH=str(SITECUSTOMIZE))
    say(f'Compiling mmcv, once, with {jobs} jobs (MAX_JOBS): about '
        f'{CORE_MINUTES / jobs:.0f} minutes'
        f'{", and longer for its CUDA kernels" if about["gpu"] else ""}')
    sources = unpack_mmcv(folder, env)
    command = pip_command('wheel', '--verbose', '--no-deps',
                          '--no-build-isolation', '--wheel-dir', folder,
                          sources)
    show_compiling(command, env, folder / 'compile.log')
    shutil.rmtree(sources)
    return next(folder.glob('*.whl'))


def check_compiler(about):
    """Stop with advice where compiling mmcv is bound to fail."""
    compiler = os.environ.get('CXX', 'c++')
    if not shutil.which(compiler):
        sys.exit('mmcv has to be compiled, but there is no C++ compiler '
                 f'`{compiler}`: install one, for example the package g++.')
    if not os.path.exists(about['header']):
        sys.exit(f'mmcv has to be compiled, but {about["header"]} is missing: '
                 "install Python's headers, for example the package "
                 'python3-dev.')
    if about['gpu'] and not about['nvcc']:
        sys.exit('mmcv has to be compiled for the GPU that PyTorch sees, but '
                 f'there is no nvcc: install CUDA {about["cuda"]}, or set '
                 'CUDA_VISIBLE_DEVICES to the empty string to work on the '
                 'CPU.')


def unpack_mmcv(folder, env):
    """Return the folder of mmcv's sources, downloading them if need be."""
    sources = folder / 'sources'
    if sources.exists():
        return sources
    download = folder / 'download'
    shutil.rmtree(download, ignore_errors=True)
    run(*pip_command('download', '--no-deps', '--no-binary=mmcv',
                     '--no-build-isolation', '--dest', download, 'mmcv'),
        env=env)
    archive = next(download.glob('*.tar.gz'))
    shutil.unpack_archive(archive, download)
    # A rename is done or not: half-unpacked sources are never compiled.
    next(path for path in download.iterdir() if path.is_dir()).rename(sources)
    return sources


def show_compiling(command, env, log):
    """Run a build, showing ninja's counter and keeping all it says in `log`.

    Raises:
        SystemExit: The build failed; the end of the log is shown.
    """
    start = time.monotonic()
    end = '\r' if sys.stdout.isatty() else '\n'
    with log.open('w') as file, subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace') as build:
        for line in build.stdout:
            file.write(line)
            counter = re.match(r'\s*\[(\d+)/(\d+)\]', line)
            if counter:
                done, total = map(int, counter.groups())
                minutes = (time.monotonic() - start) / 60
                print(f'  {done:3} of {total} files, {minutes:4.1f} minutes, '
                      f'about {minutes * (total - done) / done:4.1f} left ',
                      end=end,
                      flush=True)
    print()
    if build.returncode:
        print(log.read_text()[-5000:])
        sys.exit(f'mmcv did not compile; {log} has the whole output.')


def runs():
    """Return whether `.venv` has a working Python with pip."""
    return PYTHON.exists() and succeeds(PYTHON, '-m', 'pip', '--version')


def ops_work():
    """Return whether mmcv's compiled ops can be used with this PyTorch."""
    return succeeds(PYTHON, '-c', OPS_WORK)


def succeeds(*command):
    """Return whether a command ends well, whatever it prints."""
    return not subprocess.run(command, capture_output=True).returncode


@contextmanager
def changing():
    """Mark the environment as unsound until the block has ended well."""
    CHANGING.touch()
    yield
    CHANGING.unlink()


def pip_command(action, *arguments):
    """Return the command line of `pip`, held to the constraints."""
    return [PYTHON, '-m', 'pip', action, '-c', CONSTRAINTS, *arguments]


def pip(action, *arguments):
    """Run pip in `.venv`."""
    run(*pip_command(action, *arguments))


def run(*command, env=None):
    """Run a command whose output the user sees, and stop if it fails."""
    try:
        subprocess.run(command, check=True, env=env)
    except subprocess.CalledProcessError as error:
        sys.exit(f'The set-up stopped, as `{" ".join(map(str, command))}` '
                 f'failed with status {error.returncode}.')


def say(text):
    """Show which step has begun."""
    print(f'\n== {text}', flush=True)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit('\nThe set-up was interrupted; the same command goes on.')
