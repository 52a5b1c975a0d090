"""A small ResNet, its pretraining, and the scales of its blocks."""
import copy
import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mmtune import turn_on
from mmtune.analysis import BlockScale, block_scales
from reproductions.material import put_in_folding_mode

# Deploy with the gradient of its weights multiplied by coeff^2.
CORRECTED = 'Deploy, gradient x coeff^2'
MODES = ('Eval', 'Tune', 'Deploy', CORRECTED)

PRETRAINED_ON, FINE_TUNED_ON = range(5), range(5, 10)
BATCH_SIZE = 32
MOMENTUM = 0.9
PRETRAIN_LR = 0.05


class ResidualBlock(nn.Module):
    """A basic block of a ResNet; strides in the first convolution."""

    def __init__(self, in_channels: int, out_channels: int,
                 stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(
            out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
            nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def build_model(classes: int) -> nn.Sequential:
    """Build a ResNet for images of 8 x 8 pixels.

    Returns:
        nn.Sequential: Nine convolutions, each with a BatchNorm, and a linear
        layer, the last module, which starts from zero.
    """
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
        nn.ReLU(), ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode='fan_out', nonlinearity='relu')
    reset_head(model)
    return model


def reset_head(model: nn.Sequential) -> None:
    """Let the last layer know nothing."""
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)


def load_data(classes: Sequence[int], seed: int) -> list[Tensor]:
    """Load scikit-learn's handwritten digits.

    Args:
        classes (Sequence[int]): Which digits, one after the other.
        seed (int): Of the split.

    Returns:
        list[Tensor]: Images of shape (n, 1, 8, 8) and labels from 0 on, to
        train with, and then a fourth of all, to test with.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(digits.target) - classes[0]
    chosen = torch.nonzero((labels >= 0) & (labels < len(classes))).flatten()
    generator = torch.Generator().manual_seed(seed)
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    parts = chosen.tensor_split([len(chosen) * 3 // 4])
    return [data[part] for part in parts for data in (images, labels)]


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int,
          lr: float, seed: int, weight_decay: float = 0.) -> list[float]:
    """Train by SGD with momentum, in the mode that a model is in.

    Returns:
        list[float]: The loss of each step; only the last may not be finite:
        there training stops.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        learning, lr=lr, momentum=MOMENTUM, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    while len(losses) < steps and all(map(math.isfinite, losses[-1:])):
        batch = torch.randint(
            len(labels), (BATCH_SIZE, ), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Tell the share of images that is recognised."""
    return (model(images).argmax(1) == labels).float().mean().item()


@functools.cache
def pretrain(seed: int, steps: int) -> tuple[nn.Sequential, float]:
    """Train on the first five digits, in Train mode.

    Args:
        seed (int): Of weights, split and batches.
        steps (int): How many.

    Returns:
        tuple[nn.Sequential, float]: The model, to be copied, with a head
        that has learned nothing; and its accuracy before that.
    """
    torch.manual_seed(seed)
    model = build_model(len(PRETRAINED_ON))
    *training, images, labels = load_data(PRETRAINED_ON, seed)
    train(model, *training, steps, PRETRAIN_LR, seed, weight_decay=5e-4)
    reached = accuracy(model.eval(), images, labels)
    reset_head(model)
    return model, reached


def find_scales(model: nn.Module) -> list[BlockScale]:
    """Compute the scales of the blocks of a stock model."""
    report = turn_on(copy.deepcopy(model), activations=False)
    return block_scales(model, report)


@torch.no_grad()
def multiply_scales(model: nn.Module, times: float) -> None:
    """Multiply every scale of a model, but leave its function alone.

    In Train mode a weight can be multiplied without any effect, so a
    checkpoint may as well have turned out like this.
    """
    for scale in find_scales(model):
        conv = model.get_submodule(scale.conv)
        norm = model.get_submodule(scale.bn)
        conv.weight.div_(times)
        norm.running_mean.div_(times)
        norm.running_var.add_(norm.eps).div_(times**2).sub_(norm.eps)


def learn_weights_alone(model: nn.Module) -> None:
    """Let the convolutions' weights learn, and nothing that has no scale."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.requires_grad_()


def put(model: nn.Module, mode: str) -> nn.Module:
    """Copy a stock model into one of :data:`MODES`, BatchNorms fixed."""
    scales = find_scales(model)
    model = copy.deepcopy(model)
    put_in_folding_mode(model, mode.split(',')[0])
    if mode == CORRECTED:
        for scale in scales:
            weight = model.get_submodule(scale.conv).weight
            square = scale.coeff.square().to(weight.dtype)
            weight.register_hook(
                lambda grad, square=square: grad * square.view(-1, 1, 1, 1))
    return model
