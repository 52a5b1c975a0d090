"""torchvision: every model that differs in its modules, and fx's graphs."""
import inspect

import torch
from torch import nn

from tests.sweeps.libraries import images, representatives

REQUIREMENTS = ('torchvision==0.28.0', )
ALONE = ()
SIZES = (64, 128, 224, 300)

FROZEN = 'fasterrcnn_resnet50_fpn with FrozenBatchNorm2d'
GRAPH = 'create_feature_extractor of '


def names() -> list[str]:
    from torchvision.models import list_models
    return [*representatives(list_models(), build), FROZEN,
            f'{GRAPH}resnet18', f'{GRAPH}mobilenet_v3_small']


def build(name: str) -> nn.Module:
    from torchvision import models
    from torchvision.models.detection.backbone_utils import (
        resnet_fpn_backbone,
    )
    from torchvision.models.feature_extraction import (
        create_feature_extractor,
    )
    from torchvision.ops import FrozenBatchNorm2d
    if name.startswith(GRAPH):
        model = build(name.removeprefix(GRAPH))
        return create_feature_extractor(model, [
            child for child, _ in model.named_children()][-3:-1])
    if name == FROZEN:
        backbone = resnet_fpn_backbone(
            backbone_name='resnet50', weights=None,
            norm_layer=FrozenBatchNorm2d)
        model = models.detection.FasterRCNN(backbone, num_classes=3)
    else:
        options = dict(weights=None)
        asked = inspect.signature(models.get_model_builder(name)).parameters
        if 'weights_backbone' in asked:
            options['weights_backbone'] = None
        if name.removeprefix('quantized_') in ('googlenet', 'inception_v3'):
            options['init_weights'] = False  # which takes half a minute
        model = models.get_model(name, **options)
    if is_detector(model) and not name.startswith('ssd'):
        model.transform.min_size, model.transform.max_size = (128, ), 160
    if hasattr(model, 'roi_heads'):
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 32
    return model


def is_detector(model: nn.Module) -> bool:
    return hasattr(model, 'transform')


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    from torchvision.models import get_model_builder
    if is_detector(model):
        return list(images(size)), [target(size) for _ in range(2)]
    if name.startswith('raft'):
        return images(size // 8 * 8), images(size // 8 * 8)
    if not name.startswith((FROZEN, GRAPH)) and (
            '.video.' in get_model_builder(name).__module__):
        return torch.randn(2, 3, 16, size, size),
    return images(size),


def target(size: int) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[.1, .1, .6, .7], [.4, .3, .9, .9]]) * size
    return dict(
        boxes=boxes,
        labels=torch.tensor([1, 1]),
        masks=torch.ones(2, size, size, dtype=torch.uint8),
        keypoints=torch.cat([torch.rand(2, 17, 2) * size,
                             torch.ones(2, 17, 1)], -1))
