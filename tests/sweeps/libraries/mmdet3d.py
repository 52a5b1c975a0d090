"""MMDetection3D: parts of its configs in which every class occurs."""
import torch
from torch import nn

from tests import zoo
from tests.sweeps import openmmlab

REQUIREMENTS = ('numba==0.68.1', 'pandas==3.1.1', 'pyquaternion==0.9.9',
                'trimesh==5.2.0')
ALONE = ('mmdet3d==1.4.0', )
SIZES = openmmlab.SIZES
names, build_part, inputs_of_part = openmmlab.functions(
    'mmdet3d',
    absent=('lyft_dataset_sdk.eval.detection.mAP_evaluation',
            'lyft_dataset_sdk.lyftdataset',
            'lyft_dataset_sdk.utils.data_classes', 'nuscenes',
            'nuscenes.eval.detection.config',
            'nuscenes.eval.detection.data_classes',
            'nuscenes.utils.data_classes', 'nuscenes.utils.geometry_utils',
            'open3d', 'open3d.visualization'),
    told=dict(mmdet='3.2.0'))

# They sample, group and interpolate points.
OF_POINTS = ('DGCNNBackbone', 'GroupFree3DHead', 'H3DBboxHead',
             'MultiBackbone', 'PAConvHead', 'PointNet', 'PointRCNNBboxHead',
             'SSD3DHead', 'VoteHead')


def build(name: str) -> nn.Module:
    part = build_part(name)
    if name.startswith(OF_POINTS):
        raise NotImplementedError(
            "MMCV's operators on points are for GPUs alone")
    return part


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    first = next((module for module in model.modules()
                  if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))),
                 None)
    if name.startswith('CenterHead'):
        return zoo.maps([first.in_channels], size // 4),
    if name.startswith('NoStemRegNet'):
        return torch.randn(2, first.in_channels, size // 4, size // 4),
    if name.startswith('DGCNNHead'):
        return dict(fa_points=torch.randn(2, size, first.in_channels)),
    if name.startswith('ForegroundSegmentationHead'):
        return torch.randn(size, first.in_features),
    if name.startswith('PVRCNNBBoxHead'):
        side = model.grid_size
        return torch.randn(2, side, side, side, first.in_channels // side**3),
    return inputs_of_part(name, model, size)
