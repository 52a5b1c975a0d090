"""MMagic: the networks of its configs in which every class occurs."""
import numpy as np
import torch
from torch import nn

from tests.sweeps import openmmlab
from tests.sweeps.libraries import first_of

REQUIREMENTS = ('click==8.5.1', 'einops==0.8.2', 'imageio==2.38.1',
                'torchvision==0.28.0')
ALONE = ('mmagic==1.2.0', )
SIZES = openmmlab.SIZES
# Parts that need diffusers, or read what others have downloaded.
names_of_parts, build, inputs_of_part = openmmlab.functions(
    'mmagic',
    roles=('backbone', 'disc', 'discriminator', 'encdec', 'extractor',
           'generator', 'refiner', 'unet'),
    absent=('albumentations', 'diffusers', 'lpips',
            'mmagic.models.archs.attention_injection',
            'mmagic.models.editors.animatediff',
            'mmagic.models.editors.disco_diffusion',
            'mmagic.models.editors.fastcomposer',
            'mmagic.models.editors.vico'))
# Pictures of a clip.
FRAMES = {'CAIN': 2, 'FLAVR': 4, 'TOFlowVFI': 2, 'TOFlowVSR': 7}


def names() -> list[str]:
    np.bool8 = np.bool_  # as it was called before NumPy 2
    return names_of_parts()


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    if hasattr(model, 'noise_size'):
        noise = torch.randn(2, model.noise_size)
        classes = getattr(model, 'num_classes', None)
        if not classes:
            return noise,
        label = torch.randint(classes, (2, ))
        by_place = (label, ) if name.startswith('BigGAN') else (0, label)
        return noise, *by_place
    if name.startswith('SinGANMultiScaleDiscriminator'):
        return torch.randn(2, 3, size, size), len(model.blocks) - 1
    if name.startswith('SinGAN'):
        scales = len(model.blocks)
        sides = [size // 2 + 4 * scale for scale in range(scales)]
        noises = [torch.randn(2, 3, side, side) for side in sides]
        return (noises[0], noises, [1.] * scales, 'rand', scales - 1, 2)
    for kind, frames in FRAMES.items():
        if name.startswith(kind):
            return torch.randn(2, frames, 3, size, size),
    channels = first_of(model, nn.Conv2d, nn.ConvTranspose2d).in_channels
    image = torch.randn(2, channels, size, size)
    if name.startswith('GLDiscs'):
        return (torch.randn(2, channels, 256, 256),
                torch.randn(2, channels, 128, 128)),
    if name.startswith('PConvEncoderDecoder'):
        return image, torch.ones(2, channels, size, size)
    return image,
