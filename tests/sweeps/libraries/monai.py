"""MONAI: each of its networks that takes batch normalization."""
from collections.abc import Callable

import torch
from torch import nn

from tests.sweeps.libraries import first_of

REQUIREMENTS = ('monai==1.6.1', 'einops==0.8.2', 'torchvision==0.28.0')
ALONE = ()
SIZES = (32, 64, 96, 128)


def networks() -> dict[str, Callable[[], nn.Module]]:
    from monai.networks import nets
    channels = dict(spatial_dims=2, in_channels=3, out_channels=2)
    steps = dict(channels=(4, 8, 16), strides=(2, 2))
    kernels = dict(kernel_size=[3, 3, 3], strides=[1, 2, 2],
                   upsample_kernel_size=[2, 2])
    return {
        'AHNet': lambda: nets.AHNet(
            layers=(1, 1, 1, 1), spatial_dims=2, in_channels=3,
            out_channels=2),
        'AttentionUnet': lambda: nets.AttentionUnet(**channels, **steps),
        'BasicUNet': lambda: nets.BasicUNet(
            **channels, features=(4, 4, 8, 8, 16, 4), norm='batch'),
        'BasicUNetPlusPlus': lambda: nets.BasicUNetPlusPlus(
            **channels, features=(4, 4, 8, 8, 16, 4), norm='batch'),
        'DAF3D': lambda: nets.DAF3D(
            in_channels=1, out_channels=2, visual_output=False),
        'DenseNet121': lambda: nets.DenseNet121(**channels),
        'DynUNet': lambda: nets.DynUNet(
            **channels, **kernels, norm_name='batch', res_block=True,
            filters=[4, 8, 16]),
        'EfficientNetBN': lambda: nets.EfficientNetBN(
            'efficientnet-b0', pretrained=False),
        'FlexibleUNet': lambda: nets.FlexibleUNet(
            3, 2, 'efficientnet-b0', decoder_channels=(32, 16, 8, 4, 4)),
        'Generator': lambda: nets.Generator(
            (16, ), (8, 4, 4), [8, 4, 1], [2, 2, 2], norm='BATCH'),
        'HighResNet': lambda: nets.HighResNet(
            **channels, norm_type='batch'),
        'MILModel': lambda: nets.MILModel(
            num_classes=2, pretrained=False, backbone='resnet18'),
        'RegUNet': lambda: nets.RegUNet(2, 3, 4, 3, out_channels=2),
        'resnet10, 3D': lambda: nets.resnet10(
            spatial_dims=3, n_input_channels=1),
        'resnet50': lambda: nets.resnet50(spatial_dims=2, n_input_channels=3),
        'SegResNet': lambda: nets.SegResNet(
            **channels, init_filters=8, norm='batch'),
        'SEResNet50': lambda: nets.SEResNet50(spatial_dims=2, in_channels=3),
        'SwinUNETR': lambda: nets.SwinUNETR(
            **channels, feature_size=12, norm_name='batch'),
        'UNet': lambda: nets.UNet(
            **channels, **steps, num_res_units=2, norm='batch'),
        'UNETR': lambda: nets.UNETR(
            3, 2, (64, 64), feature_size=4, hidden_size=48, mlp_dim=96,
            num_heads=4, norm_name='batch', spatial_dims=2),
        'VNet': lambda: nets.VNet(
            spatial_dims=2, in_channels=1, out_channels=2,
            dropout_prob_up=(0.5, 0.5)),
    }


def names() -> list[str]:
    return sorted(networks())


def build(name: str) -> nn.Module:
    return networks()[name]()


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    if name == 'Generator':
        return torch.randn(2, 16),
    if name == 'MILModel':
        return torch.randn(2, 3, 3, size, size),
    conv = first_of(model, nn.Conv2d, nn.Conv3d)
    sides = [size] * len(conv.kernel_size)
    return torch.randn(2, conv.in_channels, *sides),
