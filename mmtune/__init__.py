"""Tune mode for Conv+BN blocks (arXiv 2305.11624)."""
import torch

from mmtune.version import __version__

if tuple(int(part) for part in torch.__version__.split('.')[:2]) < (2, 4):
    raise ImportError(f'mmtune needs torch 2.4 or later, but found '
                      f'{torch.__version__}; pip install "torch>=2.4"')

from mmtune.api import turn_off, turn_on  # noqa: E402

__all__ = ['__version__', 'turn_off', 'turn_on']
