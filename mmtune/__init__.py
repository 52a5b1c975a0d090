"""Tune mode for Conv+BN blocks (arXiv 2305.11624)."""
from mmtune.api import turn_off, turn_on
from mmtune.version import __version__

__all__ = ['__version__', 'turn_off', 'turn_on']
