"""MMYOLO: parts of its configs in which every class of module occurs."""
from torch import nn

from tests import zoo
from tests.sweeps import openmmlab

REQUIREMENTS = ('prettytable==3.18.0', 'torchvision==0.28.0')
ALONE = ('mmyolo==0.6.0', )
SIZES = openmmlab.SIZES
names, build, inputs_of_part = openmmlab.functions(
    'mmyolo', told=dict(mmcv='2.0.1'))

# Their `in_channels` are those of the widest network.
UNSCALED = ('YOLOv5PAFPN', 'YOLOv6', 'YOLOv8PAFPN')


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    if '(backbone' in name:
        return inputs_of_part(name, model, size)
    channels = getattr(model, 'head_module', model).in_channels
    if isinstance(channels, int):
        channels = [channels] * model.num_levels
    elif hasattr(model, 'extra_in_channel'):
        channels = [model.extra_in_channel, *channels]
    if '(neck' in name and name.startswith(UNSCALED):
        channels = [int(c * model.widen_factor) for c in channels]
    return zoo.maps(channels, size // 4),
