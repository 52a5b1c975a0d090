"""MMDetection: parts of its configs in which every class of module occurs."""
import torch
from torch import nn

from tests.sweeps import openmmlab

REQUIREMENTS = ('mmdet==3.3.0', 'mmpretrain==1.2.0', 'ftfy==6.3.1',
                'timm==1.0.31', 'torchvision==0.28.0')
ALONE = ()
SIZES = openmmlab.SIZES
names, build, inputs_of_part = openmmlab.functions('mmdet')


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    if name.startswith('LinearReIDHead'):
        return (torch.randn(2, model.in_channels), ),
    return inputs_of_part(name, model, size)
