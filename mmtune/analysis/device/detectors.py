"""Measure a training step of torchvision's detectors on a device."""
import importlib.util
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmtune.analysis.device.ways import how_it_ran, put_in_way, way_context
from mmtune.analysis.modes import randomize_new_norms
from mmtune.analysis.steps import Step, difference
from mmtune.analysis.timing import interleaved_seconds, quartiles
from mmtune.analysis.workloads import Workload, image_workload

__all__ = ['DETECTORS', 'check_torchvision', 'measure_detector']

BATCH = 2
CLASSES = 91
# COCO has 7.3 annotated objects an image.
OBJECTS = 7


def check_torchvision() -> None:
    """Raise where there are no detectors.

    Raises:
        ValueError: If torchvision is not installed.
    """
    if importlib.util.find_spec('torchvision') is None:
        raise ValueError(
            'the table of detectors needs torchvision, which is not '
            'installed; pip install the torchvision of your torch '
            f'{torch.__version__}, or choose other --tables')


def _build(name: str, shape: tuple[int, int]) -> nn.Module:
    from torchvision.models import detection

    # Sizes between which the model would scale images: so they stay.
    return getattr(detection, name)(
        weights=None, weights_backbone=None, num_classes=CLASSES,
        min_size=min(shape), max_size=max(shape))


# Each makes a model for images of a shape. Nothing of it is frozen, and its
# BatchNorms are BatchNorms.
DETECTORS: dict[str, Callable[[tuple[int, int]], nn.Module]] = {
    'Faster R-CNN, ResNet-50-FPN': partial(_build, 'fasterrcnn_resnet50_fpn'),
    'RetinaNet, ResNet-50-FPN': partial(_build, 'retinanet_resnet50_fpn'),
}


def measure_detector(name: str, ways: list[str], shape: tuple[int, int],
                     device: str, amp: bool,
                     rounds: int) -> dict[str, dict[str, Any]]:
    """Measure a training step in ways that are compared with Eval.

    Args:
        name (str): Key of :data:`DETECTORS`.
        ways (list[str]): Of :data:`mmtune.analysis.device.ways.WAYS`; Eval
            comes first.
        shape (tuple[int, int]): Height and width of the images.
        device (str): Where.
        amp (bool): Whether to run under autocast, see
            :class:`mmtune.analysis.steps.Step`.
        rounds (int): How often to time each way.

    Returns:
        dict[str, dict[str, Any]]: By way: bytes ``kept``, ``peak`` and
        ``resident`` of :class:`mmtune.analysis.steps.StepMemory`, how blocks
        ``ran`` in Tune mode, the ``loss``, how far the gradient is
        ``off_eval``, ``seconds``, and their ``ratio`` to Eval's with its
        ``ratio_quartiles``; or only ``failed``, which says why.
    """
    workload = _workload(shape, device)
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], None]] = {}
    stock: dict[str, Tensor] = {}
    for way in ways:
        try:
            step, found[way], gradients = _measure(name, way, workload, shape,
                                                   device, amp)
        except RuntimeError as error:  # out of memory among them
            message = str(error).strip().partition('\n')[0]
            found[way] = dict(failed=f'{type(error).__name__}: {message}')
            continue
        if way == 'Eval':
            stock = gradients
        # Deploy learns other parameters; Eval may have failed.
        compares = way != 'Deploy' and stock
        found[way]['off_eval'] = _finite(
            difference(gradients, stock)) if compares else None
        steps[way] = partial(_run_step, step, way)
        del gradients
    stock.clear()
    if steps:
        _add_times(found, steps, rounds)
    return found


def _measure(name: str, way: str, workload: Workload, shape: tuple[int, int],
             device: str, amp: bool) -> tuple[Step, dict, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = DETECTORS[name](shape)
    randomize_new_norms(model)
    model.to(device)
    put_in_way(model, way)
    step = Step(model, workload, amp=amp)
    with way_context(way):
        # First: an update by gradients that are not finite changes
        # parameters even at a learning rate of 0.
        loss, gradients = step.gradients()
        memory = step.memory()
    return step, dict(asdict(memory), loss=_finite(loss),
                      ran=how_it_ran(model)), gradients


def _run_step(step: Step, way: str) -> None:
    with way_context(way):
        step.run()


def _add_times(found: dict[str, dict[str, Any]],
               steps: dict[str, Callable[[], None]], rounds: int) -> None:
    times = list(interleaved_seconds(steps, rounds, warm_up=1))
    for way in steps:
        found[way]['seconds'] = quartiles(t[way] for t in times)[1]
        if 'Eval' in steps:
            low, ratio, high = quartiles(t[way] / t['Eval'] for t in times)
            found[way].update(ratio=ratio, ratio_quartiles=[low, high])


def _workload(shape: tuple[int, int], device: str) -> Workload:
    """Make a step on noise, with boxes that are always the same."""
    generator = torch.Generator().manual_seed(0)
    height, width = shape
    limit = torch.tensor([width, height], dtype=torch.float32)
    targets = []
    for _ in range(BATCH):
        start, side = torch.rand(2, OBJECTS, 2, generator=generator)
        start = start * limit * .5
        boxes = torch.cat([start, start + limit * (.1 + .4 * side)], dim=1)
        labels = torch.randint(1, CLASSES, (OBJECTS, ), generator=generator)
        targets.append(dict(boxes=boxes.to(device), labels=labels.to(device)))

    def loss(model: nn.Module, images: Tensor) -> Tensor:
        return torch.stack(list(model(list(images), targets).values())).sum()

    images = image_workload(shape, BATCH, device)
    return Workload(images.images, loss, images.updater)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
