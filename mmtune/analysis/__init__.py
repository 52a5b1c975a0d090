"""Look into a model: its blocks, their scales, what the modes cost."""
from mmtune.analysis.blocks import Block, TensorInfo, list_blocks
from mmtune.analysis.memory import peak_bytes, peak_on, saved_bytes
from mmtune.analysis.scales import (
    BlockScale,
    Shares,
    best_lr,
    block_scales,
    diagnose,
    lr_limit,
    quantiles,
    shares,
    step_ratios,
)

__all__ = [
    'Block', 'BlockScale', 'Shares', 'TensorInfo', 'best_lr', 'block_scales',
    'diagnose', 'list_blocks', 'lr_limit', 'peak_bytes', 'peak_on',
    'quantiles', 'saved_bytes', 'shares', 'step_ratios'
]
