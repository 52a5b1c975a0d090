"""The memory of a training step of the detectors of the paper's Table 4."""
import copy
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.fileio import load
from torch import nn
from torch.nn import functional as F

from mmtune.analysis.memory import saved_bytes
from mmtune.analysis.sources import load_config
from mmtune.analysis.steps import Step
from mmtune.analysis.workloads import detection_workload
from reproductions.material import (
    in_processes,
    put_in_folding_mode,
    put_in_paper_mode,
    random_model,
)

# The modes of the paper, its Tune being MMEngine's.
PAPER = ('Eval', 'MMEngine')
MODES = (*PAPER, 'Tune')
# A row whose figures do not look like its label, and what they look like.
SUSPECT = 'mask-rcnn_r101_fpn_8xb16-amp-tune-1x_coco'
SUSPECTED = 'configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'


def read_rows() -> list[dict]:
    """Read the rows of Table 4 from the metafiles beside the configs.

    Returns:
        list[dict]: ``name`` and ``config`` of the Tune config, ``eval``, the
        config of its Eval twin, ``batch``, ``precision``, and of the paper
        ``gb`` and ``ap``, each of Eval and of Tune.
    """
    models = {
        model['Config']: model
        for path in sorted(Path('configs').glob('*/metafile.yml'))
        for model in load(path)['Models']
        if 'Table 4' in model['Metadata'].get('Figures From', '')
    }
    rows = []
    for path, model in models.items():
        if 'tune-' not in path:
            continue
        twins = [models[path.replace('tune-', '')], model]
        rows.append(dict(
            name=model['Name'], config=path, eval=twins[0]['Config'],
            batch=model['Metadata']['Batch Size'],
            precision=model['Metadata']['Precision'],
            gb=[twin['Metadata']['Training Memory (GB)'] for twin in twins],
            ap=[twin['Results'][0]['Metrics']['box AP'] for twin in twins]))
    return rows


def run(shape: Sequence[int] = (800, 1344),
        batches: Sequence[int] = (1, 2, 3),
        names: Sequence[str] | None = None) -> dict:
    """Count the memory of training steps.

    Args:
        shape (Sequence[int]): Height and width of the images.
        batches (Sequence[int]): To extrapolate from, where a row's batch is
            larger than all of these.
        names (Sequence[str], optional): Of the rows. Defaults to all.

    Returns:
        dict: ``rows``, from :func:`read_rows`, each with ``model``, alike
        where rows share one, ``steps``, the bytes by batch and mode, and
        ``weights`` from :func:`count_weights`; ``suspected``, the same of
        what a row may be in truth; and what :func:`kept_per_weight` and
        :func:`autocast_dtypes` find.
    """
    rows = [row for row in read_rows()
            if names is None or row['name'] in names]
    suspected = [
        dict(row, name=Path(SUSPECTED).stem, eval=SUSPECTED) for row in rows
        if row['name'] == SUSPECT
    ]
    # Several rows share a model, which then takes each batch once.
    first: dict[tuple[str, str], str] = {}
    plan: dict[str, list[tuple]] = {}
    for row in rows + suspected:
        path = first.setdefault(
            (str(load_config(row['eval']).model), row['precision']),
            row['eval'])
        row['model'] = f'{path} in {row["precision"]}'
        row['weights'] = count_weights(row)
        # The paper's question alone is asked of the suspected model.
        plan[row['name']] = list(itertools.product(
            [path], [row['precision']],
            [row['batch']] if row['batch'] <= max(batches) else batches,
            PAPER if row in suspected else MODES))
    steps = sorted({step for own in plan.values() for step in own})
    taken = dict(zip(steps, in_processes(
        measure, [(*step, shape) for step in steps], 'steps')))
    for row in rows + suspected:
        row['steps'] = {}
        for step in plan[row['name']]:
            _, _, batch, mode = step
            row['steps'].setdefault(str(batch), {})[mode] = taken[step]
    return dict(
        shape=list(shape), batches=list(batches), rows=rows,
        suspected=suspected, kept_per_weight=kept_per_weight(),
        autocast=autocast_dtypes())


# Steps of the same model come one after another.
build = functools.lru_cache(maxsize=1)(random_model)


def measure(path: str, precision: str, batch: int, mode: str,
            shape: Sequence[int]) -> dict:
    """Take a step with the backbone in a mode, and count its bytes."""
    config, stock = build(path)
    model = copy.deepcopy(stock)
    height, width = shape
    workload = detection_workload(config, model, (height, width), batch)
    put_in_paper_mode(model, mode, ['backbone'])
    step = Step(model, workload, amp=precision == 'FP16')
    return dataclasses.asdict(step.memory())


def count_weights(row: dict) -> int:
    """Count the numbers in the weights of the backbone that learn."""
    _, model = build(row['eval'])
    return sum(
        module.weight.numel() for module in model.backbone.modules()
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad)


def kept_per_weight() -> dict[str, dict[str, float]]:
    """Count what a block keeps for backward beside feature maps.

    In bytes for each number in its weight, by precision and mode. The feature
    maps have one pixel.
    """
    found: dict[str, dict[str, float]] = {}
    for precision, mode in itertools.product(('FP32', 'FP16'), MODES):
        model = nn.Sequential(
            nn.Conv2d(256, 256, 3, padding=1, bias=False),
            nn.BatchNorm2d(256))
        put_in_folding_mode(model, mode)
        # Learns too, as inside of a network.
        x = torch.randn(1, 256, 1, 1, requires_grad=True)
        with torch.autocast(
                'cpu', torch.bfloat16, enabled=precision == 'FP16'):
            with saved_bytes(model) as saved:
                output = model(x)
                kept = saved.total / model[0].weight.numel()
        found.setdefault(precision, {})[mode] = kept
        del output
    return found


def autocast_dtypes() -> dict[str, str]:
    """Tell the dtype that a CPU's autocast makes of halves, by operation."""
    x = torch.randn(2, 8, 8, 8, dtype=torch.bfloat16)
    operations = {
        'convolution': nn.Conv2d(8, 8, 3),
        'batch_norm': nn.BatchNorm2d(8).eval(),
        'relu': nn.ReLU(),
        'max_pool2d': nn.MaxPool2d(2),
        'interpolate': nn.Upsample(scale_factor=2),
        'linear': nn.Linear(8, 8),
        'cross_entropy': lambda x: F.cross_entropy(x[..., 0, 0], x[..., 0, 0]),
    }
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        return {
            name: str(operation(x).dtype).removeprefix('torch.')
            for name, operation in operations.items()
        }
