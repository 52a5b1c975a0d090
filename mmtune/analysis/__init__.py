from mmtune.analysis.memory import peak_bytes, saved_bytes

__all__ = ['peak_bytes', 'saved_bytes']
