"""Measure what a fine-tuning step of three libraries' models saves.

DETR of Hugging Face, EfficientNet-B0 of timm and Faster R-CNN of torchvision,
with random weights and their BatchNorms in eval mode, as in fine-tuning. Bytes
are counted, times are taken in rounds, each mode once a round. It needs the
packages `transformers`, `timm` and `torchvision`, which `make sweep
LIB=transformers` installs::

    .venv-sweeps/transformers/bin/python tests/benchmarks/libraries.py \
        --json docs/en/libraries.json

``python docs/render.py`` then writes the table of docs/en/libraries.md.
"""
import argparse
import copy
import importlib.metadata
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mmtune import turn_on
from mmtune.analysis import peak_bytes, saved_bytes
from mmtune.analysis.machine import describe_commit, describe_machine
from mmtune.analysis.modes import randomize_new_norms
from mmtune.analysis.timing import interleaved_seconds, quartiles

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ('transformers', 'timm', 'torchvision')

Forward = Callable[[nn.Module], Tensor]


def detr(size: int) -> tuple[nn.Module, Forward]:
    """DETR with a ResNet-50, on two images with an object each."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    stages = ['stage4']
    model = DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False,
            backbone=None,
            use_pretrained_backbone=False,
            backbone_config=ResNetConfig(out_features=stages)))
    images = torch.randn(2, 3, size, size)

    def forward(model: nn.Module) -> Tensor:
        # Without the matching, which is SciPy's.
        output = model(images)
        return output.logits.square().mean() + output.pred_boxes.mean()

    return model, forward


def efficientnet(size: int) -> tuple[nn.Module, Forward]:
    """timm's EfficientNet-B0, on eight images."""
    import timm
    images, labels = torch.randn(8, 3, size, size), torch.arange(8)
    return timm.create_model('efficientnet_b0'), lambda model: (
        nn.functional.cross_entropy(model(images), labels))


def faster_rcnn(size: int,
                frozen: bool = True) -> tuple[nn.Module, Forward]:
    """torchvision's Faster R-CNN as it is fine-tuned, on two images.

    Args:
        size (int): Height and width of the images, in pixels.
        frozen (bool): Whether normalizations are ``FrozenBatchNorm2d``, as
            torchvision has them, or BatchNorms, whose affine parameters
            learn.

    Returns:
        tuple[nn.Module, Callable]: The model, and what gives its loss.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import (
        resnet_fpn_backbone,
    )
    from torchvision.ops import FrozenBatchNorm2d
    backbone = resnet_fpn_backbone(
        backbone_name='resnet50', weights=None, trainable_layers=3,
        norm_layer=FrozenBatchNorm2d if frozen else nn.BatchNorm2d)
    model = FasterRCNN(backbone, 5, min_size=size, max_size=size)
    images = torch.rand(2, 3, size, size)
    box = torch.tensor([[.1, .1, .6, .7]]) * size
    targets = [dict(boxes=box, labels=torch.tensor([1]))] * 2
    return model, lambda model: sum(model(list(images), targets).values())


MODELS = {
    'DETR, ResNet-50': (detr, 'transformers', 2),
    'EfficientNet-B0': (efficientnet, 'timm', 8),
    'Faster R-CNN, ResNet-50': (faster_rcnn, 'torchvision', 2),
    'the same with BatchNorms': (partial(faster_rcnn, frozen=False),
                                 'torchvision', 2),
}


class Step:
    """Takes training steps, but for the optimizer's part.

    Args:
        model (nn.Module): In train mode, its BatchNorms in eval mode.
        forward (Callable): Gives the loss of a model.
    """

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        self.model = model
        self.forward = forward

    def __call__(self) -> None:
        self.model.zero_grad()
        torch.manual_seed(0)
        self.forward(self.model).backward()

    def kept(self) -> int:
        """Count the bytes that a forward keeps for backward."""
        torch.manual_seed(0)
        with saved_bytes(self.model) as saved:
            loss = self.forward(self.model)
        total = saved.total
        loss.backward()
        return total

    def peak(self) -> int:
        """Count the most bytes that a step has alive at once."""
        with peak_bytes() as memory:
            self()
        return memory.peak


def measure(name: str, size: int, rounds: int) -> dict:
    """Measure a model in Eval and in Tune mode.

    Args:
        name (str): One of :data:`MODELS`.
        size (int): Height and width of the images, in pixels.
        rounds (int): How often to time each mode.

    Returns:
        dict: Bytes in each mode, and the quartiles of Tune's time as a share
        of Eval's in the same round.
    """
    build, package, batch = MODELS[name]
    torch.manual_seed(0)
    model, forward = build(size)
    randomize_new_norms(model)
    model.train()
    tuned = copy.deepcopy(model)
    turn_on(model, 'Eval')
    report = turn_on(tuned, norm_eval=True)
    steps = {'Eval': Step(model, forward), 'Tune': Step(tuned, forward)}
    bytes_of = {mode: dict(kept=step.kept(), peak=step.peak())
                for mode, step in steps.items()}
    times = list(interleaved_seconds(steps, rounds))
    return dict(
        name=name, package=package, batch=batch, size=size,
        blocks=len(report.rewritten), activations=len(report.activations),
        **bytes_of, time=quartiles(t['Tune'] / t['Eval'] for t in times))


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--json', type=Path, required=True, metavar='FILE')
    parser.add_argument('--size', type=int, default=320)
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args(arguments)
    rows = [measure(name, args.size, args.rounds) for name in MODELS]
    found = dict(
        command='.venv-sweeps/transformers/bin/python '
        'tests/benchmarks/libraries.py --json docs/en/libraries.json',
        **describe_machine(),
        threads=torch.get_num_threads(),
        packages={name: importlib.metadata.version(name)
                  for name in PACKAGES},
        commit=describe_commit(ROOT),
        found=dict(rounds=args.rounds, rows=rows))
    args.json.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main()
