"""MMOCR: parts of its configs in which every class of module occurs."""
import torch
from torch import nn

from tests.sweeps import openmmlab
from tests.sweeps.libraries import first_of

REQUIREMENTS = ('lmdb==3.0.0', 'pyclipper==1.4.0', 'rapidfuzz==3.14.6',
                'scikit-image==0.26.0', 'torchvision==0.28.0')
ALONE = ('mmocr==1.0.1', )
SIZES = openmmlab.SIZES
names, build, inputs_of_part = openmmlab.functions(
    'mmocr', absent=('imgaug', 'imgaug.augmenters'), told=dict(mmdet='3.1.0'))


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    first = first_of(model, nn.Conv2d)
    if name.startswith(('MiniVGG', 'NRTRModalityTransform')):
        # A line of text.
        return torch.randn(2, first.in_channels, 32, size),
    if name.startswith(('PANHead', 'PSEHead')):
        return torch.randn(2, first.in_channels, size // 4, size // 4),
    return inputs_of_part(name, model, size)
