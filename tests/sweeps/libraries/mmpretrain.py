"""MMPretrain: parts of its configs in which every class of module occurs."""
import torch
from torch import nn

from tests.sweeps import openmmlab
from tests.sweeps.libraries import first_of

REQUIREMENTS = ('mmpretrain==1.2.0', 'ftfy==6.3.1', 'torchvision==0.28.0')
ALONE = ()
SIZES = openmmlab.SIZES
names, build_part, inputs_of_part = openmmlab.functions('mmpretrain')

# They take a vector an image.
OF_VECTORS = ('ClsBatchNormNeck', 'LatentPredictHead', 'LeViTClsHead',
              'MoCoV3Head', 'VigClsHead')


def build(name: str) -> nn.Module:
    part = build_part(name)
    # A head whose forward is a loss has its network here.
    return getattr(part, 'predictor', part)


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    from mmpretrain.models.utils import SparseHelper
    side = size // 32
    # Which patches its sparse backbones see.
    SparseHelper._cur_active = torch.rand(2, 1, side, side) > 0.3
    if name.startswith('SparKLightDecoder'):
        return [torch.randn(2, model.feature_dim, side, side)],
    if name.startswith('SwAVNeck'):
        channels = model.projection_neck[0].in_features
        return [(torch.randn(2, channels, side, side), ) for _ in range(2)],
    if name.startswith(OF_VECTORS):
        first = first_of(model, nn.Linear, nn.BatchNorm1d)
        return (torch.randn(2, getattr(first, 'in_features', None)
                            or first.num_features), ),
    return inputs_of_part(name, model, size)
