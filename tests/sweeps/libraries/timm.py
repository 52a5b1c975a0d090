"""timm: the smallest networks in which every class of its modules occurs.

And its ways to exchange normalizations, and to cut a network for features.
"""
from collections.abc import Callable

from torch import nn

from tests.sweeps.libraries import images, representatives

REQUIREMENTS = ('timm==1.0.31', 'torchvision==0.28.0')
ALONE = ()
SIZES = (64, 96, 128, 224, 256)


def changed() -> dict[str, Callable[[], nn.Module]]:
    import timm
    from timm.layers import convert_splitbn_model, convert_sync_batchnorm
    from timm.models import FeatureGraphNet
    from timm.utils import freeze

    def frozen(name: str) -> nn.Module:
        model = timm.create_model(name)
        freeze(model)
        return model

    def with_(convert: Callable, name: str) -> nn.Module:
        return convert(timm.create_model(name))

    return {
        'resnet18, freeze': lambda: frozen('resnet18'),
        'efficientnet_b0, freeze': lambda: frozen('efficientnet_b0'),
        'efficientnet_b0, convert_sync_batchnorm': lambda: with_(
            convert_sync_batchnorm, 'efficientnet_b0'),
        'resnet18, convert_splitbn_model': lambda: with_(
            convert_splitbn_model, 'resnet18'),
        'resnet18, features_only': lambda: timm.create_model(
            'resnet18', features_only=True),
        'mobilenetv3_small_050, features_only': lambda: timm.create_model(
            'mobilenetv3_small_050', features_only=True),
        'resnet18, FeatureGraphNet': lambda: FeatureGraphNet(
            timm.create_model('resnet18'), out_indices=(1, 3)),
    }


def names() -> list[str]:
    import timm
    models = [name for name in timm.list_models()
              if not name.startswith('test_')]
    return [*representatives(models, build), *changed()]


def build(name: str) -> nn.Module:
    import timm
    return changed()[name]() if ', ' in name else timm.create_model(name)


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    return images(size),
