"""Which architectures Tune saves memory of, and how much."""
import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmtune.analysis.steps import Step
from mmtune.analysis.workloads import (
    Workload,
    detection_workload,
    image_workload,
)
from reproductions.material import (
    in_processes,
    put_in_paper_mode,
    random_model,
    total,
)
from reproductions.page import Page, by, drawing, mib, shape_text, span, table

MODES = ('Eval', 'MMEngine', 'Tune', 'Deploy')
CLAIM = 0.4

# Each backbone is the one of a config of MMDetection.
BACKBONES = {
    'ResNet-18': 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
    'ResNet-50': 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'ResNet-101': 'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py',
    'ResNeXt-101 32x4d':
    'mmdet::retinanet/retinanet_x101-32x4d_fpn_1x_coco.py',
    'RegNetX-3.2GF': 'mmdet::regnet/retinanet_regnetx-3.2GF_fpn_1x_coco.py',
    'HRNetV2-W32': 'mmdet::hrnet/faster-rcnn_hrnetv2p-w32-1x_coco.py',
    'Res2Net-101': 'mmdet::res2net/faster-rcnn_res2net-101_fpn_2x_coco.py',
    'ResNeSt-50': 'mmdet::resnest/faster-rcnn_s50_fpn_syncbn-backbone+head_'
                  'ms-range-1x_coco.py',
    'MobileNetV2': 'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py',
    'MobileNetV2, LeakyReLU':
    'mmdet::yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py',
    'Darknet-53': 'mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py',
    'CSPDarknet-S': 'mmdet::yolox/yolox_s_8xb8-300e_coco.py',
    'CSPNeXt-S': 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py',
    'EfficientNet-B3':
    'mmdet::efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py',
    'VGG-16 of SSD': 'mmdet::ssd/ssd300_coco.py',
    'Swin-T': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
}
DETECTORS = {
    'Faster R-CNN R50': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'RetinaNet R50': 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'YOLOv3 D53': 'mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py',
    'YOLOX-S': 'mmdet::yolox/yolox_s_8xb8-300e_coco.py',
    'RTMDet-S': 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py',
}
DETECTION, CLASSIFICATION, WHOLE = (
    'backbone, as in detection', 'backbone, as in classification',
    'whole detector')
# Why a mode rewrites nothing.
NO_NORM = 'no BatchNorm'


def run(detection: Sequence[int] = (2, 800, 1344),
        classification: Sequence[int] = (32, 224, 224),
        whole: Sequence[int] = (2, 384, 672),
        backbones: Sequence[str] = tuple(BACKBONES),
        detectors: Sequence[str] = tuple(DETECTORS)) -> dict:
    """Count the memory of a step of each architecture in each mode.

    Args:
        detection (Sequence[int]): Batch, height and width of the images for
            backbones of detectors.
        classification (Sequence[int]): The same as for classifiers.
        whole (Sequence[int]): The same for whole detectors.
        backbones (Sequence[str]): Names in ``BACKBONES``.
        detectors (Sequence[str]): Names in ``DETECTORS``.

    Returns:
        dict: The sizes, and ``rows``: name, setting, bytes of parameters,
        and by mode the bytes, or the exception where it cannot be.
    """
    sizes = {DETECTION: detection, CLASSIFICATION: classification,
             WHOLE: whole}
    todo = [(name, setting) for name in backbones
            for setting in (DETECTION, CLASSIFICATION)]
    todo += [(name, WHOLE) for name in detectors]
    return dict(
        sizes={setting: list(size) for setting, size in sizes.items()},
        rows=in_processes(measure, [(*task, sizes[task[1]]) for task in todo],
                          'architectures'))


def measure(name: str, setting: str, size: Sequence[int],
            device: str = 'meta') -> dict:
    """Take a step of an architecture in each mode.

    Args:
        name (str): Of :data:`DETECTORS` in the setting :data:`WHOLE`, else
            of :data:`BACKBONES`.
        setting (str): How it is used.
        size (Sequence[int]): Batch, height and width of the images.
        device (str): Where to run a backbone. Defaults to 'meta', where
            tensors have a size and no content. Whole detectors run on the
            CPU: what they keep depends on what they see.

    Returns:
        dict: The name, the setting, the bytes of the ``parameters``, and
        what each of the ``modes`` takes, see :func:`take_step`.
    """
    batch, height, width = size
    if setting == WHOLE:
        config, model = random_model(DETECTORS[name])
        workload = detection_workload(config, model, (height, width), batch)
    else:
        _, model = random_model(BACKBONES[name], 'backbone')
        model.to(device)
        workload = image_workload((height, width), batch, device)
    return dict(
        name=name,
        setting=setting,
        parameters=sum(p.nbytes for p in model.parameters()),
        modes={mode: take_step(model, mode, workload) for mode in MODES})


def take_step(stock: nn.Module, mode: str, workload: Workload) -> dict:
    """Take a step in a mode, with a copy of a stock model.

    Returns:
        dict: Bytes ``kept`` for backward, ``peak`` and ``resident``, and, of
        mmtune's modes, the number of blocks ``left_out``; or the ``error``,
        why the model cannot be put into the mode.
    """
    norms = [m for m in stock.modules() if isinstance(m, _BatchNorm)]
    if not norms and mode in ('Tune', 'Deploy'):
        return dict(error=NO_NORM)
    model = copy.deepcopy(stock)
    try:
        report = put_in_paper_mode(model, mode)
    except Exception as error:  # MMEngine's rewrite raises of many classes
        return dict(error=type(error).__name__)
    taken = dataclasses.asdict(Step(model, workload).memory())
    if report is not None:
        taken['left_out'] = len(report.left_out)
    return taken


def maps_to_weights(row: dict) -> float:
    """Bytes kept for backward in Eval, over those of all parameters."""
    return row['modes']['Eval']['kept'] / row['parameters']


def kept_saved(row: dict, mode: str = 'Tune') -> float:
    """Share of the bytes kept for backward that a mode saves."""
    modes = row['modes']
    return 1 - modes[mode]['kept'] / modes['Eval']['kept']


def total_saved(row: dict, mode: str = 'Tune') -> float:
    """Share of what the whole step takes that a mode saves."""
    modes = row['modes']
    return 1 - total(modes[mode]) / total(modes['Eval'])


def foretold(share: float, ratio: float) -> float:
    """Foretell :func:`total_saved` from the share of what is kept.

    As if a step took what is kept, and three times the weights: themselves,
    their gradients, momentum.
    """
    return share * ratio / (ratio + 3)


def foretell(row: dict) -> float:
    """Give what :func:`foretold` says of a row."""
    return foretold(kept_saved(row), maps_to_weights(row))


def tuned(found: dict) -> list[dict]:
    """Give the rows that have a Tune mode."""
    return [row for row in found['rows']
            if 'error' not in row['modes']['Tune']]


def reaches(row: dict) -> bool:
    """Tell whether Tune saves what the paper claims."""
    return ('error' not in row['modes']['Tune']
            and total_saved(row) >= CLAIM)


def never_reaches(row: dict) -> bool:
    """Tell whether no size of images would do."""
    return kept_saved(row) <= CLAIM


def share_cell(mode: str, share: Callable[[dict, str], float]
               ) -> Callable[[dict], str]:
    """Write what a mode saves, or why there is no figure."""
    return lambda row: (row['modes'][mode].get('error')
                        or f'{share(row, mode):.1%}')


def setting_table(found: dict, setting: str) -> str:
    """Lay out the architectures of a setting."""
    rows = [row for row in found['rows'] if row['setting'] == setting]
    return table(sorted(rows, key=maps_to_weights, reverse=True), {
        'architecture': itemgetter('name'),
        'maps / weights': lambda row: f'{maps_to_weights(row):.1f}',
        'Eval, kept (MiB)': lambda row: mib(row['modes']['Eval']['kept']),
        'Eval, all (MiB)': lambda row: mib(total(row['modes']['Eval'])),
        'Tune: saved of kept': share_cell('Tune', kept_saved),
        'Tune: saved of all': share_cell('Tune', total_saved),
        f'{CLAIM:.0%} of all': lambda row: 'yes' if reaches(row) else 'no',
        "MMEngine's: saved of all": share_cell('MMEngine', total_saved),
        'Deploy: saved of all': share_cell('Deploy', total_saved)
    })


def counts_text(rows: Sequence[dict]) -> str:
    """Count where the claim holds."""
    return ', '.join(f'{sum(map(reaches, part))} of {len(part)} ({setting})'
                     for setting, part in by('setting', rows).items())


def names(rows: Iterable[dict]) -> str:
    """Name architectures, and what they save of what is kept."""

    def shares(part: Iterable[dict]) -> str:
        return ', '.join(
            dict.fromkeys(f'{kept_saved(row):.1%}' for row in part))

    return ', '.join(f'{name} ({shares(part)})'
                     for name, part in by('name', rows).items()) or 'none'


def less_in_deploy(rows: Iterable[dict]) -> dict[str, tuple[int, int]]:
    """Where Deploy saves less than Tune: how many blocks each leaves out."""
    return {
        row['name']: (row['modes']['Deploy']['left_out'],
                      row['modes']['Tune']['left_out'])
        for row in rows if 'error' not in row['modes']['Deploy']
        and total_saved(row) - total_saved(row, 'Deploy') > .005
    }


def figures(found: dict) -> dict[str, object]:
    """Write what the page shows."""
    rows = tuned(found)
    no = [row for row in rows if not reaches(row)]
    errors = [100 * abs(total_saved(row) - foretell(row)) for row in rows]
    best = max(rows, key=kept_saved)
    stock = {row['name']: row['modes']['Tune']['error']
             for row in found['rows'] if row not in rows}
    sizes = {f'size-{setting.split()[-1]}': shape_text(*size)
             for setting, size in found['sizes'].items()}
    return sizes | {
        setting.split()[-1]: setting_table(found, setting)
        for setting in found['sizes']
    } | {
        'counts': counts_text(rows),
        'saved': span(map(total_saved, rows), '.1%'),
        'least': span([min((maps_to_weights(row) for row in rows
                            if reaches(row)), default=None)], '.1f'),
        'most': span([max(map(maps_to_weights, no), default=None)], '.1f'),
        'off': f'{max(errors):.1f}',
        'off-mean': f'{sum(errors) / len(errors):.1f}',
        'never': names(filter(never_reaches, rows)),
        'best': f'{kept_saved(best):.1%} ({best["name"]})',
        'needs': table([row for row in no if not never_reaches(row)], {
            'architecture': itemgetter('name'),
            'setting': itemgetter('setting'),
            'r here': lambda row: f'{maps_to_weights(row):.1f}',
            'r needed': lambda row:
            f'{3 * CLAIM / (kept_saved(row) - CLAIM):.1f}',
            'foretold': lambda row: f'{foretell(row):.1%}',
            'counted': lambda row: f'{total_saved(row):.1%}'
        }),
        'less': ', '.join(
            f'{name} {deploy} against {tune}' for name, (deploy, tune)
            in less_in_deploy(rows).items()) or 'none',
        'stock': ', '.join(f'{name} ({error})'
                           for name, error in stock.items()) or 'none'
    }


def claims(found: dict) -> dict[str, bool]:
    """Tell what the page says, and whether it is so."""
    rows = tuned(found)
    return {
        'whole detectors do not reach it':
        not any(reaches(row) for row in rows if row['setting'] == WHOLE),
        'two figures foretell what is saved':
        all(abs(total_saved(row) - foretell(row)) < .1 for row in rows),
        'Deploy saves less than Tune where it leaves out more blocks':
        all(deploy > tune for deploy, tune in less_in_deploy(rows).values())
    }


@drawing(6)
def plot(found: dict, figure: Figure) -> None:
    """Draw what is saved against maps / weights."""
    axes = figure.subplots()
    rows = tuned(found)

    def place(row: dict) -> tuple[float, float]:
        return maps_to_weights(row), 100 * total_saved(row)

    for (setting, size), marker in zip(found['sizes'].items(), 'osD'):
        part = [place(row) for row in rows if row['setting'] == setting]
        axes.plot(*np.reshape(part, (-1, 2)).T, marker, markersize=5,
                  label=f'{setting}, {shape_text(*size)}')
    draw_names(axes, {name: list(map(place, part))
                      for name, part in by('name', rows).items()})
    ratios = [maps_to_weights(row) for row in rows]
    curve = np.geomspace(min(ratios) / 1.5, max(ratios) * 1.5, 100)
    axes.plot(curve, 100 * foretold(0.5, curve),
              color='gray', linewidth=1,
              label='half of the maps saved, 3 x weights kept')
    axes.axhline(100 * CLAIM, color='black', linestyle='--', linewidth=1,
                 label=f'{CLAIM:.0%}')
    axes.set(xscale='log',
             xlabel='maps kept in Eval / weights (bytes)',
             ylabel='saved by Tune of all memory of a step (%)')
    figure.legend(loc='outside lower center', ncols=2)


def draw_names(axes: Axes,
               points: dict[str, list[tuple[float, float]]]) -> None:
    """Write each name once, beside the larger of its points."""
    for name, ends in points.items():
        axes.plot(*zip(*ends), color='gray', linewidth=0.5)
        above = is_crowded(max(ends), sum(points.values(), []))
        axes.annotate(
            name, max(ends), (0, 5) if above else (5, 0),
            textcoords='offset points', fontsize=6,
            ha='center' if above else 'left',
            va='bottom' if above else 'center')


def is_crowded(point: tuple[float, float],
               points: Iterable[tuple[float, float]]) -> bool:
    """Tell whether another point is about where a point's name would be."""
    x, y = point
    return any(1 < other_x / x < 1.8 and abs(other_y - y) < 0.45
               for other_x, other_y in points)


PAGE = Page(run, figures, claims, plot)
