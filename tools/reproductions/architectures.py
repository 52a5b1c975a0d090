"""Which architectures Tune saves memory of, and how much."""
import copy
import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmtune.analysis.modes import randomize_new_norms
from mmtune.analysis.sources import build_model, load_config
from mmtune.analysis.steps import Step
from mmtune.analysis.workloads import (
    Workload,
    detection_workload,
    image_workload,
)
from reproductions.material import in_processes, put_in_paper_mode
from reproductions.pages import mib, paragraph, table

TITLE = 'Memory across architectures'
OF_PAPER = '40% less memory'
QUESTION = paragraph("""
    The paper reports about 40% less memory: 38% for a classifier, up to 36%
    for a detector. Of which architectures is that true, and at which size of
    images? Feature maps are what Tune saves, weights are there anyway, so
    that the ratio of the two should tell.
    """)

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
        name (str): See :func:`build`.
        setting (str): See :func:`build`.
        size (Sequence[int]): Batch, height and width of the images.
        device (str): Where to run a backbone. Defaults to 'meta', where
            tensors have a size and no content. Whole detectors run on the
            CPU: what they keep depends on what they see.

    Returns:
        dict: The name, the setting, the bytes of the ``parameters``, and
        what each of the ``modes`` takes, see :func:`take_step`.
    """
    config, model = build(name, setting)
    batch, height, width = size
    if setting == WHOLE:
        workload = detection_workload(config, model, (height, width), batch)
    else:
        model.to(device)
        workload = image_workload((height, width), batch, device)
    return dict(
        name=name,
        setting=setting,
        parameters=sum(p.nbytes for p in model.parameters()),
        modes={mode: take_step(model, mode, workload) for mode in MODES})


def build(name: str, setting: str) -> tuple[Any, nn.Module]:
    """Build an architecture with weights and statistics that are random.

    Args:
        name (str): In ``DETECTORS`` for whole ones, else in ``BACKBONES``.
        setting (str): One of the three above.

    Returns:
        tuple[Config, nn.Module]: Of backbones nothing is frozen.
    """
    from mmdet.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    # Some warn of how newer configs name arguments.
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if setting == WHOLE:
            config = load_config(DETECTORS[name])
        else:
            config = load_config(BACKBONES[name])
            config.model = config.model.backbone
            config.pop('data_preprocessor', None)
            # By default none is.
            config.model.pop('frozen_stages', None)
        torch.manual_seed(0)
        model = build_model(config)
    randomize_new_norms(model)
    return config, model


def take_step(stock: nn.Module, mode: str, workload: Workload) -> dict:
    """Take a step in a mode.

    Args:
        stock (nn.Module): Is left as it is.
        mode (str): One of ``MODES``.
        workload (Workload): What to compute.

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


# --------------------------------------------------------------------------
# What is said of it
# --------------------------------------------------------------------------


def total(step: dict) -> int:
    return step['peak'] + step['resident']


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

    Returns:
        float: Where a step takes what is kept, and three times the weights:
        themselves, their gradients, momentum.
    """
    return share * ratio / (ratio + 3)


def answer(found: dict) -> str:
    """Say in a sentence what came out."""
    rows = [row for row in found['rows']
            if 'error' not in row['modes']['Tune']]
    if not rows:
        return 'None of these architectures can be put into Tune mode.'
    return counts_text(rows)


def page(found: dict) -> str:
    """Write what came out."""
    rows = found['rows']
    folds = [row for row in rows if 'error' not in row['modes']['Tune']]
    sizes = {setting: f'{batch} x 3 x {height} x {width}'
             for setting, (batch, height, width) in found['sizes'].items()}
    parts = [
        paragraph(f"""
        One training step in FP32 on random images. Backbones of MMDetection
        alone, nothing frozen, SGD with momentum: at {sizes[DETECTION]} as in
        detection, and at {sizes[CLASSIFICATION]} as in classification;
        counted on tensors that have a size and no content. Whole
        detectors at {sizes[WHOLE]}, with their own losses, optimizer and
        frozen stages; there necks and heads are in the mode too. Eval holds
        all BatchNorms in eval mode, also where the architecture is usually
        trained otherwise.
        """),
        paragraph("""
        Maps / weights: bytes that Eval keeps for backward, parameters and
        buffers not counted, over the bytes of all parameters. Saved of kept:
        by how much that shrinks. Saved of all: the same of the whole step,
        its peak (feature maps, gradients) with parameters, buffers, the
        optimizer's state and the images. Words in the place of a figure say
        why there is none: the exception that the mode raises, or that there
        is no BatchNorm to fold. MMEngine's rewrite traces the whole of what
        it is given, and here that is what a row names; of a detector it may
        take the backbone alone, as on the page [Table 4](table4.md).
        """),
        paragraph("""
        Tune is the paper's here, with stock activations. What those save
        besides when they keep one map, which is on unless one asks for stock
        ones, is on the page [One map a block](../activations.md).
        """)
    ]
    for setting, size in sizes.items():
        part = [row for row in rows if row['setting'] == setting]
        if not part:
            continue
        part.sort(key=maps_to_weights, reverse=True)
        parts += [
            f'## {setting.capitalize()} ({size})',
            table([
                'architecture', 'maps / weights', 'Eval, kept (MiB)',
                'Eval, all (MiB)', 'Tune: saved of kept',
                'Tune: saved of all', f'{CLAIM:.0%} of all',
                "MMEngine's: saved of all", 'Deploy: saved of all'
            ], map(row_cells, part))
        ]
    if folds:
        parts += [f'## Where the {CLAIM:.0%} holds', *verdict(folds)]
    parts += [paragraph(text) for text in (left_out(folds), stock(rows))
              if text]
    parts += [
        '## Not run here',
        paragraph("""
        FP16, and other batches and sizes: more pixels move a row to the right
        in the figure, along the curve of its own share. On a GPU kernels need
        memory to work in besides.
        """)
    ]
    return '\n\n'.join(parts)


def row_cells(row: dict) -> list[object]:
    modes = row['modes']
    return [
        row['name'], f'{maps_to_weights(row):.1f}',
        mib(modes['Eval']['kept']), mib(total(modes['Eval'])),
        share_text(row, 'Tune', kept_saved),
        share_text(row, 'Tune', total_saved),
        'yes' if reaches(row) else 'no',
        share_text(row, 'MMEngine', total_saved),
        share_text(row, 'Deploy', total_saved)
    ]


def share_text(row: dict, mode: str, share: Any) -> str:
    error = row['modes'][mode].get('error')
    return error or f'{share(row, mode):.1%}'


def reaches(row: dict) -> bool:
    """Tell whether Tune saves what the paper claims."""
    return ('error' not in row['modes']['Tune']
            and total_saved(row) >= CLAIM)


def verdict(rows: Sequence[dict]) -> list[str]:
    """Say where the claim holds.

    Args:
        rows (Sequence[dict]): Those that have a Tune mode.

    Returns:
        list[str]: Paragraphs.
    """
    text = counts_text(rows) + ' '
    yes = [row for row in rows if reaches(row)]
    no = [row for row in rows if not reaches(row)]
    if yes:
        text += f"""The least maps / weights with which one does is
            {min(map(maps_to_weights, yes)):.1f}. """
    if yes and no:
        text += f"""The most with which one does not is
            {max(map(maps_to_weights, no)):.1f}. """
    parts = [paragraph(text)]
    errors = [abs(total_saved(row) - foretell(row)) for row in rows]
    parts.append(paragraph(f"""
        Two figures tell. With r for maps / weights and s for what is saved of
        kept, s * r / (r + 3) is what is saved of all where a step takes the
        maps, the weights, gradients and momentum: it is off by
        {100 * max(errors):.1f} percentage points at most, by
        {100 * sum(errors) / len(errors):.1f} on average. So s is the limit
        for large images and batches, and for {CLAIM:.0%} r has to be at least
        3 * {CLAIM:g} / (s - {CLAIM:g}), or
        {3 * CLAIM / (0.5 - CLAIM):.0f} where s is a half.
        """))
    never = [row for row in rows if kept_saved(row) <= CLAIM]
    if never:
        parts.append(paragraph(f"""
        s is {CLAIM:.0%} or less, and so no r enough, for
        {names(never)}. {half_text(rows)}
        """))
    rest = [row for row in no if row not in never]
    small = [row for row in rest if foretell(row) < CLAIM]
    if small:
        parts += [
            'Too few or too small images, by this formula:',
            table(['architecture', 'setting', 'r here', 'r needed'], [[
                row['name'], row['setting'], f'{maps_to_weights(row):.1f}',
                f'{3 * CLAIM / (kept_saved(row) - CLAIM):.1f}'
            ] for row in small])
        ]
    for row in rest:
        if row not in small:
            parts.append(paragraph(f"""
                {row['name']} ({row['setting']}) has an r that would do: the
                formula foretells {foretell(row):.1%}, but
                {total_saved(row):.1%} was counted. At its peak there is more
                than what is kept.
                """))
    return parts


def foretell(row: dict) -> float:
    """Give what :func:`foretold` says of a row."""
    return foretold(kept_saved(row), maps_to_weights(row))


def left_out(rows: Sequence[dict]) -> str:
    """Explain where Deploy saves less than Tune."""
    less = {}
    for row in rows:
        deploy = row['modes']['Deploy']
        if 'error' not in deploy and (
                total_saved(row) - total_saved(row, 'Deploy') > .005):
            less[row['name']] = (deploy['left_out'],
                                 row['modes']['Tune']['left_out'])
    if not less:
        return ''
    counts = ', '.join(f'{name} {deploy} against {tune}'
                       for name, (deploy, tune) in less.items())
    text = f"""Deploy saves less than Tune in {', '.join(less)}. Blocks left
        out in Deploy and in Tune: {counts}."""
    if all(deploy > tune for deploy, tune in less.values()):
        text += """ Deploy can fold a convolution for good only where it has
            one BatchNorm and a weight of its own; Tune folds at each call."""
    return text


def stock(rows: Sequence[dict]) -> str:
    """Name what cannot be put into Tune mode."""
    errors = {
        row['name']: row['modes']['Tune']['error']
        for row in rows if 'error' in row['modes']['Tune']
    }
    if not errors:
        return ''
    reasons = ', '.join(f'{name} ({error})' for name, error in errors.items())
    return f'Not put into Tune mode, and so saving nothing: {reasons}.'


def counts_text(rows: Sequence[dict]) -> str:
    """Count where the claim holds."""
    counts = []
    for setting in dict.fromkeys(row['setting'] for row in rows):
        part = [row for row in rows if row['setting'] == setting]
        counts.append(f'{sum(map(reaches, part))} of {len(part)} '
                      f'({setting})')
    low, high = min(map(total_saved, rows)), max(map(total_saved, rows))
    return (f'Tune saves {CLAIM:.0%} of all or more in {", ".join(counts)}; '
            f'from {low:.1%} to {high:.1%}.')


def half_text(rows: Iterable[dict]) -> str:
    best = max(rows, key=kept_saved)
    return f"""At most s is {kept_saved(best):.1%} ({best['name']}): a block
        keeps one map instead of two, or one instead of three where two blocks
        read the same map. Whatever else keeps a map does so in
        either mode: an activation that does not work in place, a product or
        a blend of maps, a head or a neck without BatchNorm."""


def names(rows: Iterable[dict]) -> str:
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row['name'], []).append(f'{kept_saved(row):.1%}')
    return ', '.join(f'{name} ({", ".join(dict.fromkeys(shares))})'
                     for name, shares in found.items())


def plot(found: dict, path: Path) -> None:
    """Plot what is saved against maps / weights."""
    figure = Figure(figsize=(8, 6), layout='constrained')
    axes = figure.subplots()
    rows = [row for row in found['rows']
            if 'error' not in row['modes']['Tune']]
    points: dict[str, list[tuple[float, float]]] = {}
    for (setting, size), marker in zip(found['sizes'].items(), 'osD'):
        part = {
            row['name']: (maps_to_weights(row), 100 * total_saved(row))
            for row in rows if row['setting'] == setting
        }
        batch, height, width = size
        axes.plot([x for x, _ in part.values()],
                  [y for _, y in part.values()],
                  marker,
                  markersize=5,
                  label=f'{setting}, {batch} x 3 x {height} x {width}')
        for name, point in part.items():
            points.setdefault(name, []).append(point)
    for name, ends in points.items():
        # One name for a backbone, beside the larger of its sizes.
        axes.plot(*zip(*ends), color='gray', linewidth=0.5)
        above = is_crowded(max(ends), sum(points.values(), []))
        axes.annotate(
            name, max(ends), (0, 5) if above else (5, 0),
            textcoords='offset points', fontsize=6,
            ha='center' if above else 'left',
            va='bottom' if above else 'center')
    ratios = [maps_to_weights(row) for row in rows]
    curve = torch.logspace(*torch.tensor(
        [min(ratios) / 1.5, max(ratios) * 1.5]).log10().tolist(), 100)
    axes.plot(curve, [100 * foretold(0.5, r) for r in curve.tolist()],
              color='gray', linewidth=1,
              label='half of the maps saved, 3 x weights kept')
    axes.axhline(100 * CLAIM, color='black', linestyle='--', linewidth=1,
                 label=f'{CLAIM:.0%}')
    axes.set(xscale='log',
             xlabel='maps kept in Eval / weights (bytes)',
             ylabel='saved by Tune of all memory of a step (%)')
    figure.legend(loc='outside lower center', ncols=2)
    figure.savefig(path, dpi=120)


def is_crowded(point: tuple[float, float],
               points: Iterable[tuple[float, float]]) -> bool:
    """Tell whether there is no room for a name on the right of a point.

    Args:
        point (tuple[float, float]): Maps / weights, and the share in percent.
        points (Iterable[tuple[float, float]]): All that are plotted.

    Returns:
        bool: Whether one of them is about where the name would be.
    """
    x, y = point
    return any(1 < other_x / x < 1.8 and abs(other_y - y) < 0.45
               for other_x, other_y in points)
