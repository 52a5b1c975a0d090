"""What mmtune runs with, for bug reports: ``python -m mmtune.collect_env``."""
import platform
import sys
import warnings
from importlib import metadata

import torch

from mmtune import native
from mmtune.version import __version__

__all__ = ['collect_env', 'native_status']

PACKAGES = ('mmengine', 'mmcv', 'mmdet', 'torchvision', 'numpy')


def collect_env() -> dict[str, str]:
    """Collect versions and devices, in the manner of MMEngine's function.

    Returns:
        dict[str, str]: By what is asked. MMEngine's own answers come first
        where it is installed.
    """
    try:
        from mmengine.utils.dl_utils import collect_env as collect_mmengine
        env = {name: str(value) for name, value in collect_mmengine().items()}
    except ImportError:
        env = {
            'sys.platform': sys.platform,
            'Python': sys.version.replace('\n', ''),
            'CUDA available': str(torch.cuda.is_available()),
            'PyTorch': torch.__version__
        }
    env['Processor'] = f'{platform.machine()}, {torch.get_num_threads()} ' \
        f'threads, {torch.backends.cpu.get_cpu_capability()}'
    env.update({name: _version(name) for name in PACKAGES})
    env['mmtune'] = __version__
    env['Native node'] = native_status()
    return env


def native_status() -> str:
    """Say whether blocks run by the native node; builds it where need be.

    Returns:
        str: Where it lies, or why there is none.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try:
            node = native.node()
        except native.BuildError as error:
            return f'no: {error}'
    if node is not None:
        return f'yes: {node.__file__}'
    return f'no: {caught[-1].message if caught else "off or not to be had"}'


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'not installed'


if __name__ == '__main__':
    for name, value in collect_env().items():
        print(f'{name}: {value}')
