"""Count what a block keeps for backward, in each way that there is.

A block is a convolution, a BatchNorm in eval mode and an activation, as
MMCV's ConvModule has them. Counted is what a row of blocks keeps with one
more in it, so that the maps at its ends make no difference::

    python tests/benchmarks/ways.py --json docs/en/ways.json

``python docs/render.py`` then writes the table of docs/en/comparison.md.
"""
import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from mmcv.cnn import ConvModule
from mmengine.model.efficient_conv_bn_eval import (
    turn_on_efficient_conv_bn_eval_for_single_model,
)
from torch import Tensor, nn

from mmtune import turn_on
from mmtune.analysis import saved_bytes
from mmtune.analysis.machine import describe_commit, describe_machine
from mmtune.analysis.modes import randomize_new_norms

ROOT = Path(__file__).resolve().parents[2]
ACTIVATIONS = ('ReLU', 'SiLU')
CHANNELS = 64


class FrozenBatchNorm(nn.Module):
    """The arithmetic of torchvision's FrozenBatchNorm2d.

    Args:
        norm (nn.BatchNorm2d): Whose statistics and affine parameters it has.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        self.register_buffer('scale', scale.detach()[:, None, None])
        bias = norm.bias - norm.running_mean * scale
        self.register_buffer('bias', bias.detach()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a map.

        Args:
            x (Tensor): Of shape (N, C, H, W).

        Returns:
            Tensor: Of the same shape.
        """
        return x * self.scale + self.bias


def build(blocks: int, activation: str, **options: bool) -> nn.Sequential:
    """Build blocks in a row, with their BatchNorms in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(*[
        ConvModule(CHANNELS, CHANNELS, 3, padding=1, norm_cfg=dict(type='BN'),
                   act_cfg=dict(type=activation, inplace=False), **options)
        for _ in range(blocks)])
    randomize_new_norms(model)
    return model.eval()


def rewritten(blocks: int, activation: str) -> nn.Module:
    """Blocks under MMEngine's efficient_conv_bn_eval."""
    model = build(blocks, activation)
    turn_on_efficient_conv_bn_eval_for_single_model(model)
    return model


def frozen(blocks: int, activation: str) -> nn.Module:
    """Blocks with FrozenBatchNorms."""
    model = build(blocks, activation)
    for block in model:
        setattr(block, block.norm_name, FrozenBatchNorm(block.norm))
    return model


def tuned(blocks: int, activation: str, **options: object) -> nn.Module:
    """Blocks in a mode of mmtune."""
    model = build(blocks, activation)
    turn_on(model, **options)
    return model


WAYS: dict[str, Callable[[int, str], nn.Module]] = {
    'stock': build,
    'stock, `torch.compile`': lambda *row: torch.compile(build(*row)),
    '`FrozenBatchNorm2d`': frozen,
    "MMEngine's `efficient_conv_bn_eval`": rewritten,
    "MMCV's `ConvModule(efficient_conv_bn_eval=True)`":
        lambda *row: build(*row, efficient_conv_bn_eval=True),
    "Inductor's `efficient_conv_bn_eval_fx_passes`":
        lambda *row: torch.compile(
            build(*row), options={'efficient_conv_bn_eval_fx_passes': True}),
    'Deploy': lambda *row: tuned(*row, mode='Deploy'),
    'Tune': tuned,
    'Tune, `torch.compile`': lambda *row: torch.compile(tuned(*row)),
}


def count(way: str, activation: str, size: int) -> float:
    """Count what one more block keeps.

    Args:
        way (str): One of :data:`WAYS`.
        activation (str): One of :data:`ACTIVATIONS`.
        size (int): Height and width of a map.

    Returns:
        float: Bytes, as a multiple of a map's.
    """
    images = torch.randn(2, CHANNELS, size, size, requires_grad=True)
    totals = []
    for blocks in (2, 3):
        torch.compiler.reset()
        model = WAYS[way](blocks, activation)
        with saved_bytes(model) as saved:
            output = model(images)
        totals.append(saved.total)
        del output
    return (totals[1] - totals[0]) / (images.numel() * images.element_size())


def main(arguments: list[str] | None = None) -> None:
    """Count, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--json', type=Path, required=True, metavar='FILE')
    parser.add_argument('--size', type=int, default=56)
    args = parser.parse_args(arguments)
    rows = {way: {activation: count(way, activation, args.size)
                  for activation in ACTIVATIONS}
            for way in WAYS}
    found = dict(
        command='python tests/benchmarks/ways.py --json docs/en/ways.json',
        **describe_machine(),
        commit=describe_commit(ROOT),
        size=args.size,
        rows=rows)
    args.json.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main()
