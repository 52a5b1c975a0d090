"""torchaudio: its models that keep running statistics."""
from collections.abc import Callable

import torch
from torch import nn

REQUIREMENTS = ('torchaudio==2.11.0', )
ALONE = ()
SIZES = (64, )


def networks() -> dict[str, Callable[[], nn.Module]]:
    from torchaudio import models
    return {
        'Conformer': lambda: models.Conformer(
            input_dim=16, num_heads=2, ffn_dim=32, num_layers=2,
            depthwise_conv_kernel_size=15),
        'Conformer, convolution first': lambda: models.Conformer(
            input_dim=16, num_heads=2, ffn_dim=32, num_layers=2,
            depthwise_conv_kernel_size=15, convolution_first=True),
        'Tacotron2': models.Tacotron2,
        'WaveRNN': lambda: models.WaveRNN(
            upsample_scales=[4, 4], n_classes=16, hop_length=16, n_rnn=32,
            n_fc=32),
    }


def names() -> list[str]:
    return sorted(networks())


def build(name: str) -> nn.Module:
    return networks()[name]()


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    if name.startswith('Conformer'):
        return torch.randn(2, size, 16), torch.tensor([size, size])
    if name == 'Tacotron2':
        mel = torch.randn(2, 80, size)
        return (torch.randint(0, 100, (2, 12)), torch.tensor([12, 12]), mel,
                torch.tensor([size, size]))
    steps = 12
    return torch.randn(2, 1, (steps - 4) * 16), torch.randn(2, 1, 128, steps)
