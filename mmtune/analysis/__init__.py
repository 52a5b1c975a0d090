"""Measure what the modes cost."""
from mmtune.analysis.memory import peak_bytes, saved_bytes

__all__ = ['peak_bytes', 'saved_bytes']
