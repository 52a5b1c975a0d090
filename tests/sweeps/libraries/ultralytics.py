"""Ultralytics: every config of a model, at its smallest scale."""
from pathlib import Path

from torch import nn

from tests.sweeps.libraries import images

REQUIREMENTS = ('ultralytics==8.4.190', 'torchvision==0.28.0')
ALONE = ()
SIZES = (64, 128, 224)


def names() -> list[str]:
    return sorted(configs())


def configs() -> dict[str, Path]:
    import ultralytics
    root = Path(ultralytics.__file__).parent / 'cfg' / 'models'
    return {str(path.relative_to(root)): path
            for path in root.rglob('*.yaml')}


def build(name: str) -> nn.Module:
    from ultralytics.nn import tasks
    path = configs()[name]
    settings = tasks.yaml_model_load(path)
    if 'scales' in settings:
        settings['scale'] = next(iter(settings['scales']))
    for *_, arguments in settings['backbone']:
        if 'DEFAULT' in arguments:  # torchvision's weights
            arguments[arguments.index('DEFAULT')] = None
    head = settings['head'][-1][2]
    kind = {
        'Classify': tasks.ClassificationModel,
        'OBB': tasks.OBBModel,
        'OBB26': tasks.OBBModel,
        'Pose': tasks.PoseModel,
        'Pose26': tasks.PoseModel,
        'Segment': tasks.SegmentationModel,
        'Segment26': tasks.SegmentationModel,
        'RTDETRDecoder': tasks.RTDETRDetectionModel,
        'WorldDetect': tasks.WorldModel,
        'YOLOEDetect': tasks.YOLOEModel,
        'YOLOESegment': tasks.YOLOESegModel,
        'YOLOESegment26': tasks.YOLOESegModel,
    }.get(head, tasks.DetectionModel)
    return kind(settings, verbose=False)


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    return images(size),
