"""nnU-Net: its architectures with batch normalization, in two and three
dimensions."""
import torch
from torch import nn

REQUIREMENTS = ('dynamic-network-architectures==0.4.4', 'torchvision==0.28.0')
ALONE = ()
SIZES = (32, )

ARCHITECTURES = ('PlainConvUNet', 'ResidualUNet', 'ResidualEncoderUNet')


def names() -> list[str]:
    return [f'{name}, {dimensions}D' for name in ARCHITECTURES
            for dimensions in (2, 3)]


def build(name: str) -> nn.Module:
    from dynamic_network_architectures.architectures import unet
    kind, dimensions = name.removesuffix('D').split(', ')
    is_2d = dimensions == '2'
    blocks = 'n_conv_per_stage' if kind == 'PlainConvUNet' else (
        'n_blocks_per_stage')
    return getattr(unet, kind)(
        input_channels=1,
        n_stages=3,
        features_per_stage=(8, 16, 32),
        conv_op=nn.Conv2d if is_2d else nn.Conv3d,
        kernel_sizes=3,
        strides=(1, 2, 2),
        num_classes=2,
        n_conv_per_stage_decoder=(2, 2),
        conv_bias=True,
        norm_op=nn.BatchNorm2d if is_2d else nn.BatchNorm3d,
        norm_op_kwargs={},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={},
        **{blocks: (2, 2, 2)})


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    return torch.randn(2, 1, *[size] * (2 if '2D' in name else 3)),
