"""pytorchcv: the smallest networks in which every class of module occurs.

But for those that differ in the data set alone that they are made for.
"""
import re

import torch
from torch import nn

from tests.sweeps.libraries import first_of, images, representatives

REQUIREMENTS = ('pytorchcv==0.0.74', )
ALONE = ()
SIZES = (64, 128, 224, 299, 512)


# Deeper ones of what is swept, and with other alphabets.
DEEPER = ('jasper10x', 'jasperdr', 'quartznet15x')
DATA_SETS = re.compile('_(ade20k|cifar|cub|coco|svhn|voc|celeb)')


def names() -> list[str]:
    from pytorchcv import model_provider
    models = [name for name in sorted(model_provider._models)
              if not (name.startswith(DEEPER) or DATA_SETS.search(name))]
    return representatives(models, build)


def build(name: str) -> nn.Module:
    from pytorchcv.model_provider import get_model
    options = dict(pretrained=False)
    if name.startswith(('jasper', 'quartznet')):
        options['from_audio'] = False  # which needs librosa
    return get_model(name, **options)


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    channels = first_of(model, nn.Conv1d, nn.Conv2d).in_channels
    if any(isinstance(module, nn.Conv1d) for module in model.modules()) and (
            not any(isinstance(module, nn.Conv2d)
                    for module in model.modules())):
        return torch.randn(2, channels, size), torch.tensor([size, size])
    count = 2 if name.startswith('raft') else 1
    return tuple(images(size // 8 * 8, channels) for _ in range(count))
