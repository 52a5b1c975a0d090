"""MMPose: parts of its configs in which every class of module occurs."""
import torch
from torch import nn

from tests import zoo
from tests.sweeps import openmmlab
from tests.sweeps.libraries import first_of

REQUIREMENTS = ('mmpretrain==1.2.0', 'ftfy==6.3.1', 'json-tricks==3.17.3',
                'munkres==3.0.0', 'torchvision==0.28.0')
ALONE = ('mmpose==1.3.2', )
SIZES = openmmlab.SIZES
names, build, inputs_of_part = openmmlab.functions(
    'mmpose',
    absent=('xtcocotools', 'xtcocotools.coco', 'xtcocotools.cocoeval',
            'xtcocotools.mask'))
# Poses of the clips that its networks for video take.
FRAMES = 243


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    if name.startswith('TCN'):
        return torch.randn(2, model.in_channels, FRAMES),
    if '(head' not in name:
        return inputs_of_part(name, model, size)
    if name.startswith('MSPNHead'):
        return [zoo.maps([model.unit_channels] * model.num_units, size // 4)
                for _ in range(model.num_stages)],
    channels = first_of(model, nn.modules.conv._ConvNd).in_channels
    if name.startswith('RTMOHead'):
        # One half is for the classes, one for the poses.
        return zoo.maps([2 * channels] * len(model.featmap_strides),
                        size // 4),
    side = size // 8
    width, height = getattr(model, 'in_featuremap_size', (side, side))
    if name.startswith('RTMWHead'):
        return (torch.randn(2, model.in_channels // 2, 2 * height, 2 * width),
                torch.randn(2, model.in_channels, height, width)),
    return (torch.randn(2, channels, height, width), ),
