"""MMAction2: parts of its configs in which every class of module occurs."""
import torch
from torch import nn

from tests.sweeps import openmmlab

REQUIREMENTS = ('einops==0.8.2', 'importlib-metadata==10.2.0',
                'torchvision==0.28.0')
ALONE = ('mmaction2==1.2.0', )
SIZES = openmmlab.SIZES
names, build, inputs_of_part = openmmlab.functions(
    'mmaction', absent=('mmaction.models.localizers.drn',
                        'mmaction.models.localizers.drn.drn'))
FRAMES = 16


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    first = next(module for module in model.modules()
                 if isinstance(module, (nn.Conv2d, nn.Conv3d)))
    if hasattr(model, 'graph'):
        return torch.randn(2, 2, FRAMES, model.graph.num_node, 3),
    if name.startswith('RGBPoseConv3D'):
        return (torch.randn(2, 3, FRAMES // 2, size, size),
                torch.randn(2, 17, 2 * FRAMES, size, size))
    if '(backbone' in name and isinstance(first, nn.Conv3d):
        return torch.randn(2, first.in_channels, FRAMES, size, size),
    if '(backbone' in name:
        # Clips of eight frames, one after the other.
        return torch.randn(16, first.in_channels, size, size),
    return inputs_of_part(name, model, size)
