"""Models and wrappers for MMEngine's configs."""
from mmtune.models.distributed import TuneModeDistributedDataParallel
from mmtune.models.tune_mode_model import TuneModeModel

__all__ = ['TuneModeDistributedDataParallel', 'TuneModeModel']
