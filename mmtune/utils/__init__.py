"""Helpers of the tools."""
from mmtune.utils.wheel import read_from_wheel

__all__ = ['read_from_wheel']
