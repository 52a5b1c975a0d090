"""Batches to step on, where there is no data: of a detector, of any model."""
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from mmengine.config import Config

__all__ = ['Workload', 'detection_workload', 'image_workload']

# COCO has 7.3 annotated objects an image, a quarter of them wider than this.
OBJECTS = 7
SMALLEST, LARGEST = 16, 320


class Updater(Protocol):
    """What trains a model, such as MMEngine's ``OptimWrapper``."""

    optimizer: torch.optim.Optimizer

    def update_params(self, loss: Tensor) -> None:
        """Run backward and take a step."""


@dataclass(frozen=True)
class Workload:
    """What a training step of a model does.

    Attributes:
        images (Tensor): Shape (N, 3, H, W), normalized as the model has it.
        loss (Callable[[nn.Module, Tensor], Tensor]): Gives the scalar loss
            of a model on the images.
        updater (Callable[[nn.Module], Updater]): Makes what trains a model.
    """

    images: Tensor
    loss: Callable[[nn.Module, Tensor], Tensor]
    updater: Callable[[nn.Module], Updater]


class _SGD:
    """SGD with momentum, as most detectors are trained with."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad],
            lr=0.02,
            momentum=0.9,
            weight_decay=1e-4)

    def update_params(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def image_workload(shape: tuple[int, int],
                   batch_size: int,
                   device: str = 'cpu') -> Workload:
    """Make a step of a model that takes images and gives tensors.

    The loss is cross-entropy where the model gives one tensor of shape
    (N, classes), of two classes or more, and otherwise the sum of the mean
    squares of all tensors.

    Args:
        shape (tuple[int, int]): Height and width in pixels.
        batch_size (int): N.
        device (str): Where to put the images.

    Returns:
        Workload: Of random images, always the same; trained by SGD. Its
        loss raises a ValueError where the model cannot take them.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, *shape, generator=generator)
    labels = torch.randint(2**31, (batch_size, ), generator=generator)
    labels = labels.to(device)

    def loss(model: nn.Module, images: Tensor) -> Tensor:
        try:
            output = model(images)
        except (TypeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            message = str(error).strip().partition('\n')[0]
            dtype = str(images.dtype).removeprefix('torch.')
            raise ValueError(
                f'the model must take {dtype} images of shape '
                f'{tuple(images.shape)} as its one argument, but raised '
                f'{type(error).__name__}: {message}') from error
        if (isinstance(output, Tensor) and output.dim() == 2
                and output.shape[1] > 1):
            return F.cross_entropy(output, labels % output.shape[1])
        maps = [leaf for leaf in tree_leaves(output)
                if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not maps:
            raise ValueError(
                'the model must give tensors of floats, but gave '
                f'{type(output).__name__}')
        return torch.stack([m.float().square().mean() for m in maps]).sum()

    return Workload(images.to(device), loss, _SGD)


def detection_workload(config: 'Config',
                       model: Any,
                       shape: tuple[int, int],
                       batch_size: int) -> Workload:
    """Make a step of an MMDetection model, with its own losses.

    Args:
        config (Config): Of the model; its optimizer trains it.
        model (nn.Module): Built from the config, on its device; its data
            preprocessor is used.
        shape (tuple[int, int]): Height and width in pixels.
        batch_size (int): N.

    Returns:
        Workload: Of noise with as many objects as COCO's images have, with
        masks and a semantic map where the config's pipeline loads them.
        Always the same.

    Raises:
        ValueError: If the model is no detector that learns from annotated
            images alone, or has several optimizers.
    """
    from mmdet.models.detectors import (
        BaseDetector,
        FastRCNN,
        SemiBaseDetector,
    )
    if not isinstance(model, BaseDetector) or isinstance(
            model, (FastRCNN, SemiBaseDetector)):
        raise ValueError(
            "the config's model must be a detector of MMDetection that learns "
            f'from annotated images alone, but is a {type(model).__name__}; '
            'pass other models with --model')
    settings = config.get('optim_wrapper') or {}
    if 'optimizer' not in settings:
        raise ValueError(
            'the config must have one `optim_wrapper` with an `optimizer`, '
            f'but has {settings!r}; name one')
    generator = torch.Generator().manual_seed(0)
    classes = _num_classes(config.model)
    dataset = config.get('train_dataloader')
    # This loads both, as long as the config does not say otherwise.
    panoptic = _has_type(dataset, 'LoadPanopticAnnotations')
    with_mask = panoptic or _has(dataset, 'with_mask')
    with_seg = panoptic or _has(dataset, 'with_seg')
    samples = [
        _annotate(shape, index, classes, with_mask, with_seg, generator)
        for index in range(batch_size)
    ]
    images = torch.randint(
        256, (batch_size, 3, *shape), generator=generator, dtype=torch.uint8)
    # Augmentations of whole batches would change the shape, and ask a run
    # how far it is.
    with mock.patch.object(
            model.data_preprocessor, 'batch_augments', None, create=True):
        data = model.data_preprocessor(
            dict(inputs=list(images), data_samples=samples), training=True)

    def loss(model: Any, images: Tensor) -> Tensor:
        # Some heads change them.
        samples = copy.deepcopy(data['data_samples'])
        losses = model(images, samples, mode='loss')
        return model.parse_losses(losses)[0]

    return Workload(data['inputs'], loss,
                    lambda model: _optim_wrapper(config, model))


def _optim_wrapper(config: 'Config', model: nn.Module) -> Updater:
    from mmengine.optim import build_optim_wrapper
    settings = config.optim_wrapper.copy()
    # The step itself runs under autocast, on the CPU too, which MMEngine's
    # wrapper refuses.
    settings.type = 'OptimWrapper'
    for name in ('dtype', 'loss_scale', 'use_fsdp'):
        settings.pop(name, None)
    # Every step is to be alike, with an update.
    settings.pop('accumulative_counts', None)
    return build_optim_wrapper(model, settings)


def _num_classes(settings: Any) -> int:
    """Find how many classes the head with the fewest tells apart."""
    if not isinstance(settings, (dict, list, tuple)):
        return sys.maxsize
    if not isinstance(settings, dict):
        return min(map(_num_classes, settings), default=sys.maxsize)
    # None and the like are there too.
    found = [
        own for own in map(settings.get, ('num_classes', 'num_things_classes'))
        if isinstance(own, int) and own > 0
    ]
    return min([*found, *map(_num_classes, settings.values())])


def _has(settings: Any, switch: str) -> bool:
    """Tell whether a switch is on anywhere in a part of a config."""
    if isinstance(settings, dict):
        return bool(settings.get(switch)) or _has(
            list(settings.values()), switch)
    if isinstance(settings, (list, tuple)):
        return any(_has(value, switch) for value in settings)
    return False


def _has_type(settings: Any, name: str) -> bool:
    """Tell whether anything in a part of a config is of a type."""
    if isinstance(settings, dict):
        return settings.get('type') == name or _has_type(
            list(settings.values()), name)
    if isinstance(settings, (list, tuple)):
        return any(_has_type(value, name) for value in settings)
    return False


def _annotate(shape: tuple[int, int], index: int, classes: int,
              with_mask: bool, with_seg: bool,
              generator: torch.Generator) -> Any:
    """Annotate an image with random objects, their size log-uniform."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData, PixelData
    height, width = shape

    def uniform() -> Tensor:
        return torch.rand(OBJECTS, 2, generator=generator)

    limit = torch.tensor([width, height], dtype=torch.float32)
    size = (SMALLEST * (LARGEST / SMALLEST)**uniform()).minimum(limit / 2)
    start = uniform() * (limit - size)
    boxes = torch.cat([start, start + size], dim=1)
    labels = torch.randint(classes, (OBJECTS, ), generator=generator)
    sample = DetDataSample(
        metainfo=dict(
            img_id=index,
            img_shape=shape,
            ori_shape=shape,
            batch_input_shape=shape,
            scale_factor=(1., 1.),
            flip=False),
        gt_instances=InstanceData(bboxes=boxes, labels=labels),
        ignored_instances=InstanceData(
            bboxes=boxes[:0], labels=labels[:0]))
    if with_mask:
        sample.gt_instances.masks = _fill(boxes, height, width)
    if with_seg:
        sample.gt_sem_seg = PixelData(
            sem_seg=torch.randint(
                classes, (1, height // 8, width // 8), generator=generator))
    return sample


def _fill(boxes: Tensor, height: int, width: int) -> Any:
    """Make masks that fill their boxes."""
    import numpy as np
    from mmdet.structures.mask import BitmapMasks
    masks = np.zeros((len(boxes), height, width), dtype=np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    return BitmapMasks(masks, height, width)
