"""Say what a figure was measured on."""
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from mmtune.version import __version__

__all__ = ['describe_commit', 'describe_machine']


def describe_machine(device: str = 'cpu') -> dict[str, Any]:
    """Describe the machine, and the versions that run on it.

    Args:
        device (str): ``'cpu'`` or ``'cuda'``: what was measured on.

    Returns:
        dict[str, Any]: Names of the ``device`` and the ``cpu``, the number
        of ``cores``, the versions of ``torch`` and ``mmtune``.
    """
    return dict(
        device='CPU' if device == 'cpu' else torch.cuda.get_device_name(),
        cpu=_cpu_model(),
        cores=os.cpu_count(),
        torch=torch.__version__,
        mmtune=__version__)


def describe_commit(folder: Path) -> str | None:
    """Name the state of the repository that a folder belongs to.

    Args:
        folder (Path): Any folder of it.

    Returns:
        str: As ``git describe`` does, with ``'-dirty'`` where files differ
        from the commit, those in ``docs`` aside, which figures are written
        to; None outside of a repository, or where there is no git.
    """
    try:
        commit = _git(folder, 'describe', '--always')
        changes = _git(folder, 'status', '--porcelain', '--untracked-files=no',
                       '--', ':(top)', ':(top,exclude)docs')
    except (OSError, subprocess.CalledProcessError):
        return None
    return f'{commit}-dirty' if changes else commit


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(['git', *arguments],
                          cwd=folder,
                          capture_output=True,
                          text=True,
                          check=True).stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(':')[2].strip()
                 for line in lines if line.startswith('model name')),
                platform.processor())
