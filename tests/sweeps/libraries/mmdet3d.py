"""MMDetection3D: parts of its configs in which every class occurs."""
from tests.sweeps import openmmlab

REQUIREMENTS = ('numba==0.68.1', 'pandas==3.1.1', 'pyquaternion==0.9.9',
                'trimesh==5.2.0')
ALONE = ('mmdet3d==1.4.0', )
SIZES = openmmlab.SIZES
names, build, inputs = openmmlab.functions(
    'mmdet3d',
    absent=('lyft_dataset_sdk.eval.detection.mAP_evaluation',
            'lyft_dataset_sdk.lyftdataset',
            'lyft_dataset_sdk.utils.data_classes', 'nuscenes',
            'nuscenes.eval.detection.config',
            'nuscenes.eval.detection.data_classes',
            'nuscenes.utils.data_classes', 'nuscenes.utils.geometry_utils',
            'open3d', 'open3d.visualization'),
    told=dict(mmdet='3.2.0'))
