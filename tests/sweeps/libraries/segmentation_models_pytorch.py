"""segmentation-models-pytorch: each architecture, and distinct encoders."""
from torch import nn

from tests.sweeps.libraries import images, representatives

REQUIREMENTS = ('segmentation-models-pytorch==0.6.0', 'timm==1.0.31',
                'torchvision==0.28.0')
ALONE = ()
SIZES = (64, 128, 224, 256)

# Of architectures that take no other.
ENCODERS = dict(dpt='tu-vit_tiny_patch16_224')


def names() -> list[str]:
    import segmentation_models_pytorch as smp
    found = [f'unet of {encoder}'
             for encoder in smp.encoders.get_encoder_names()]
    architectures = [
        f'{architecture} of {ENCODERS.get(architecture, "resnet18")}'
        for architecture in smp.MODEL_ARCHITECTURES_MAPPING
    ]
    return [*representatives(found, build), 'unet of vgg11_bn',
            *architectures]


def build(name: str) -> nn.Module:
    import segmentation_models_pytorch as smp
    architecture, encoder = name.split(' of ')
    return smp.create_model(architecture, encoder, encoder_weights=None)


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    return images(size),
