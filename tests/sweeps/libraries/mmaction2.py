"""MMAction2: parts of its configs in which every class of module occurs."""
import torch
from torch import nn

from tests.sweeps import openmmlab
from tests.sweeps.libraries import first_of

REQUIREMENTS = ('mmpretrain==1.2.0', 'ftfy==6.3.1', 'einops==0.8.2',
                'importlib-metadata==10.2.0', 'torchvision==0.28.0')
ALONE = ('mmaction2==1.2.0', )
SIZES = openmmlab.SIZES
names, build, inputs_of_part = openmmlab.functions(
    'mmaction', absent=('mmaction.models.localizers.drn',
                        'mmaction.models.localizers.drn.drn'))
FRAMES = 16


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    if hasattr(model, 'graph'):
        return torch.randn(2, 2, FRAMES, model.graph.num_node, 3),
    if name.startswith('OmniHead'):
        return torch.randn(2, model.in_channels, 4, 7, 7),
    if name.startswith('TPN'):
        return tuple(torch.randn(2, channels, FRAMES // 2, size >> i,
                                 size >> i)
                     for i, channels in enumerate(model.in_channels, 4)),
    first = first_of(model, nn.Conv2d, nn.Conv3d)
    if name.startswith('ACRNHead'):
        channels = first.in_channels // 2
        rois = torch.tensor([[i, 0., 0., 1., 1.] for i in range(2)])
        return (torch.randn(2, channels, 1, 7, 7),
                torch.randn(2, channels, 1, 7, 7), rois)
    if name.startswith('RGBPoseConv3D'):
        return (torch.randn(2, 3, FRAMES // 2, size, size),
                torch.randn(2, 17, 2 * FRAMES, size // 4, size // 4))
    if name.startswith('C2D') or (
            '(backbone' in name and isinstance(first, nn.Conv3d)):
        return torch.randn(2, first.in_channels, FRAMES, size, size),
    if '(backbone' in name:
        # Clips of eight frames, one after the other.
        return torch.randn(16, first.in_channels, size, size),
    return inputs_of_part(name, model, size)
