"""efficientnet-pytorch: the networks of different depth and width."""
from torch import nn

from tests.sweeps.libraries import images

REQUIREMENTS = ('efficientnet-pytorch==0.7.1', )
ALONE = ()
SIZES = (64, )


def names() -> list[str]:
    return [f'efficientnet-b{i}' for i in range(5)]


def build(name: str) -> nn.Module:
    from efficientnet_pytorch import EfficientNet
    return EfficientNet.from_name(name)


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    return images(size),
