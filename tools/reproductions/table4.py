"""The paper's Table 4: memory of a training step of detectors on COCO."""
import copy
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from mmengine.fileio import load
from torch import nn
from torch.nn import functional as F

from mmtune.analysis.estimate import AffineMemory, fit_affine
from mmtune.analysis.memory import saved_bytes
from mmtune.analysis.modes import randomize_new_norms
from mmtune.analysis.sources import build_model, load_config
from mmtune.analysis.steps import Step
from mmtune.analysis.workloads import detection_workload
from reproductions.material import (
    in_processes,
    put_in_folding_mode,
    put_in_paper_mode,
)
from reproductions.pages import mib, paragraph, table

TITLE = 'Memory on COCO'
OF_PAPER = 'Table 4, memory'
QUESTION = paragraph("""
    The paper's Table 4 trains 11 detectors on COCO in Eval and in Tune mode,
    and gives the memory that each took on a GPU. Does a training step here
    save as much, with MMEngine's rewrite, `efficient_conv_bn_eval`, which is
    the paper's method, and with mmtune?
    """)

CONFIGS = Path('configs')
# The modes of the paper, its Tune being MMEngine's.
PAPER = ('Eval', 'MMEngine')
MODES = (*PAPER, 'Tune')
NAMES = dict(MMEngine="MMEngine's rewrite", Tune='mmtune')
# A saving counts as reproduced where it differs by no more than this share.
TOLERANCE = 0.05
# A row whose figures do not look like its label, and what they look like.
SUSPECT = 'mask-rcnn_r101_fpn_8xb16-amp-tune-1x_coco'
SUSPECTED = 'configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'


# --------------------------------------------------------------------------
# What the paper has
# --------------------------------------------------------------------------


def read_rows(folder: Path = CONFIGS) -> list[dict]:
    """Read the rows of Table 4 from the metafiles beside the configs.

    Args:
        folder (Path): With a folder for each kind of model.

    Returns:
        list[dict]: ``name`` and ``config`` of the Tune config, ``eval``, the
        config of its Eval twin, ``batch``, ``precision``, and of the paper
        ``gb`` and ``ap``, each of Eval and of Tune.
    """
    models = {
        model['Config']: model
        for path in sorted(folder.glob('*/metafile.yml'))
        for model in load(path)['Models']
        if 'Table 4' in model['Metadata'].get('Figures From', '')
    }
    rows = []
    for path, model in models.items():
        if 'tune-' not in path:
            continue
        twins = [models[path.replace('tune-', '')], model]
        rows.append(
            dict(
                name=model['Name'],
                config=path,
                eval=twins[0]['Config'],
                batch=model['Metadata']['Batch Size'],
                precision=model['Metadata']['Precision'],
                gb=[twin['Metadata']['Training Memory (GB)']
                    for twin in twins],
                ap=[twin['Results'][0]['Metrics']['box AP']
                    for twin in twins]))
    return rows


# --------------------------------------------------------------------------
# What a step takes here
# --------------------------------------------------------------------------


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

    Raises:
        ValueError: If there is no row of a name.
    """
    rows = read_rows()
    known = [row['name'] for row in rows]
    for name in names or []:
        if name not in known:
            raise ValueError(f'Table 4 has no row {name!r}; name some of '
                             f'{", ".join(known)}')
    rows = [row for row in rows if names is None or row['name'] in names]
    suspected = [
        dict(row, name=Path(SUSPECTED).stem, eval=SUSPECTED) for row in rows
        if row['name'] == SUSPECT
    ]
    # Several rows share a model, which then takes each batch once.
    first: dict[tuple[str, str], dict] = {}
    todo: dict[str, set[int]] = {}
    for row in rows + suspected:
        model = str(load_config(row['eval']).model)
        same = first.setdefault((model, row['precision']), row)
        row['model'] = f'{same["eval"]} in {row["precision"]}'
        todo.setdefault(row['model'], set()).update(
            [row['batch']] if row['batch'] <= max(batches) else batches)
    # The paper's question alone is asked of the suspected model.
    modes = {row['model']: PAPER for row in suspected}
    modes.update({row['model']: MODES for row in rows})
    measured: dict[str, dict] = {model: {} for model in todo}
    steps = [(row, batch, mode) for row in first.values()
             for batch in sorted(todo[row['model']])
             for mode in modes[row['model']]]
    taken = in_processes(measure, [(*step, shape) for step in steps], 'steps')
    for (row, batch, mode), found in zip(steps, taken):
        measured[row['model']].setdefault(str(batch), {})[mode] = found
    for row in rows + suspected:
        row['weights'] = count_weights(row)
        row['steps'] = {
            batch: by_mode
            for batch, by_mode in measured[row['model']].items()
            if int(batch) == row['batch'] or row['batch'] > max(batches)
        }
    return dict(
        shape=list(shape),
        batches=list(batches),
        rows=rows,
        suspected=suspected,
        kept_per_weight=kept_per_weight(),
        autocast=autocast_dtypes())


@functools.lru_cache(maxsize=1)
def _build(path: str) -> tuple[Any, nn.Module]:
    # Some warn of each argument that newer configs name otherwise.
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        config = load_config(path)
        torch.manual_seed(0)
        model = build_model(config)
    randomize_new_norms(model)
    return config, model


def measure(row: dict, batch: int, mode: str, shape: Sequence[int]) -> dict:
    """Take a step with the backbone in a mode.

    Returns:
        dict: Bytes ``kept`` for backward, ``peak`` and ``resident``.
    """
    config, stock = _build(row['eval'])
    model = copy.deepcopy(stock)
    height, width = shape
    workload = detection_workload(config, model, (height, width), batch)
    put_in_paper_mode(model, mode, ['backbone'])
    step = Step(model, workload, amp=row['precision'] == 'FP16')
    return dataclasses.asdict(step.memory())


def count_weights(row: dict) -> int:
    """Count the numbers in the weights that Tune folds in training.

    Returns:
        int: Of the backbone's convolutions, the frozen ones left out.
    """
    _, model = _build(row['eval'])
    return sum(
        module.weight.numel() for module in model.backbone.modules()
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad)


def kept_per_weight() -> dict[str, dict[str, float]]:
    """Count what a block keeps for backward beside feature maps.

    Returns:
        dict[str, dict[str, float]]: Bytes for each number in the weight, by
        precision and mode, of a block whose feature maps have one pixel.
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
    """Look at what a CPU's autocast makes of halves.

    Returns:
        dict[str, str]: The dtype of the output of operations on halves.
    """
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


# --------------------------------------------------------------------------
# What is said of it
# --------------------------------------------------------------------------


def paper_saving(row: dict) -> float:
    """Read what Tune saved in the paper.

    Returns:
        float: Bytes. What is logged as GB are MiB divided by 1000.
    """
    before, after = row['gb']
    return (before - after) * 1000 * 2**20


def total(step: dict) -> int:
    return step['peak'] + step['resident']


def fit_saving(row: dict, mode: str) -> AffineMemory:
    """Fit what a mode saves over the batch.

    Args:
        row (dict): With ``steps`` at three batches or more.
        mode (str): One of ``MODES``.

    Returns:
        AffineMemory: Of the saving, not of what a step takes.
    """
    return fit_affine(
        [int(batch) for batch in row['steps']],
        [total(step['Eval']) - total(step[mode])
         for step in row['steps'].values()])


def saving(row: dict, mode: str) -> tuple[float, float | None]:
    """Tell what a mode saves at a row's batch.

    Args:
        row (dict): With ``steps``.
        mode (str): One of ``MODES``.

    Returns:
        tuple[float, float | None]: Bytes, and the error where they are
        extrapolated.
    """
    step = row['steps'].get(str(row['batch']))
    if step is not None:
        return total(step['Eval']) - total(step[mode]), None
    fit = fit_saving(row, mode)
    return fit.at(row['batch']), fit.error(row['batch'])


def eval_total(row: dict) -> float:
    """Tell what a step takes in Eval mode at a row's batch, in bytes."""
    step = row['steps'].get(str(row['batch']))
    if step is not None:
        return total(step['Eval'])
    steps = row['steps'].items()
    return fit_affine([int(batch) for batch, _ in steps],
                      [total(step['Eval']) for _, step in steps]).at(
                          row['batch'])


def ratio(row: dict, mode: str = 'MMEngine') -> float:
    return saving(row, mode)[0] / paper_saving(row)


def is_close(value: float) -> bool:
    return abs(value - 1) <= TOLERANCE


def label(row: dict) -> str:
    return Path(row['eval']).stem.replace('-1x_coco', '').replace(
        '_1x_coco', '')


def saved_text(row: dict, mode: str) -> str:
    saved, error = saving(row, mode)
    bar = '' if error is None else f' ± {error / 2**20:.1f}'
    return (f'{saved / 2**20:.0f}{bar} '
            f'({saved / eval_total(row):.1%})')


def answer(found: dict) -> str:
    """Say in a sentence what came out."""
    return verdict(found['rows'])


def page(found: dict) -> str:
    """Write what came out."""
    rows = found['rows']
    height, width = found['shape']
    batches = ', '.join(map(str, found['batches']))
    parts = [
        paragraph(f"""
        One training step on images of {height} x {width}, the largest that
        these configs train on, in each mode: the detector's own losses on
        noise with seven objects an image, backward, the config's SGD. The
        backbone is in the mode, as in the paper. As these configs have it,
        its stem and first stage are frozen, but nothing in HRNet.
        A step takes the most bytes of tensors that it has alive at once,
        counted one by one, and what is there all the time: parameters,
        buffers, momentum, images. FP16 is autocast in bfloat16 on a CPU,
        which has as many bytes; where MMCV has no CPU kernel for it, or the
        CPU none for products, the kernel computes on copies in float32, which
        are not counted. Where a row's batch is above
        {max(found['batches'])}, what is saved is a line through batches of
        {batches}; ± is how far the lines through two of them end from it.
        """),
        paragraph("""
        The paper's figures stand in the `metafile.yml` beside the configs.
        Its GB are as logged, MiB divided by 1000. Shares are of what Eval
        takes, there and here.
        """),
        table([
            'row', 'batch', 'precision', 'paper: Eval → Tune (GB)',
            'Eval here (GB)',
            'paper saves (MiB)', "MMEngine's saves here (MiB)",
            'here / paper', f'within {TOLERANCE:.0%}',
            'mmtune saves (MiB)', "mmtune / MMEngine's"
        ], [row_cells(row) for row in rows]),
        paragraph(verdict_on_mmtune(rows)),
        paragraph(verdict_on_eval(rows)),
    ]
    trio = next((group for group in by_model(rows) if len(group) > 2), None)
    if trio is not None:
        parts += ['## FP16', *explain_half(found, trio)]
    for row, suspected in zip(
        [row for row in rows if row['name'] == SUSPECT], found['suspected']):
        parts += [
            '## The row of Mask R-CNN R101',
            *explain_suspect(row, suspected)
        ]
    parts += [
        '## What a step takes (MiB)',
        paragraph("""
        Resident is what is there all the time: parameters, buffers, momentum,
        images.
        """),
        table(['model', 'precision', 'batch', 'mode', 'kept for backward',
               'peak', 'resident'],
              [[label(row), row['precision'], batch, mode,
                *(mib(step[key]) for key in ('kept', 'peak', 'resident'))]
               for row in map(longest, by_model(rows + found['suspected']))
               for batch, steps in row['steps'].items()
               for mode, step in steps.items()]),
        '## Not run here',
        paragraph("""
        Training on COCO. These are the commands for 8 GPUs; box AP is the
        paper's. None has been run by this project, nor has the memory of a
        GPU been measured, which holds besides what cuDNN works in, what the
        allocator rounds up, and the buckets of distributed training. With
        batches of more than 2 the learning rate is scaled linearly; the paper
        does not say what it did.
        """),
        table(['command', "paper's box AP", 'here'],
              [[f'`bash tools/dist_train.sh {config} 8{scaling(row)}`',
                f'{ap:.2f}', 'not run here'] for row in rows
               for config, ap in zip((row['eval'], row['config']),
                                     row['ap'])])
    ]
    return '\n\n'.join(parts)


def scaling(row: dict) -> str:
    """What the launch command needs where the config's batch is not 2."""
    return '' if row['batch'] == 2 else ' --auto-scale-lr'


def row_cells(row: dict) -> list[object]:
    before, after = row['gb']
    return [
        label(row), row['batch'], row['precision'],
        f'{before:.3f} → {after:.3f}', f'{eval_gb(row):.3f}',
        f'{paper_saving(row) / 2**20:.0f} ({(before - after) / before:.1%})',
        saved_text(row, 'MMEngine'), f'{ratio(row):.3f}',
        'yes' if is_close(ratio(row)) else 'no',
        saved_text(row, 'Tune'),
        f'{saving(row, "Tune")[0] / saving(row, "MMEngine")[0]:.3f}'
    ]


def by_model(rows: Iterable[dict]) -> list[list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row['model'], []).append(row)
    return list(groups.values())


def verdict(rows: Sequence[dict]) -> str:
    """Count the rows that come out as the paper has them."""
    parts = []
    for precision in ('FP32', 'FP16'):
        ratios = [ratio(row) for row in rows
                  if row['precision'] == precision]
        if ratios:
            close = sum(map(is_close, ratios))
            parts.append(
                f'{close} of {len(ratios)} rows in {precision} save within '
                f"{TOLERANCE:.0%} of the paper's figure "
                f'({min(ratios):.3f} to {max(ratios):.3f} times it)')
    return f"With MMEngine's rewrite, {' and '.join(parts)}."


def verdict_on_mmtune(rows: Sequence[dict]) -> str:
    ratios = [saving(row, 'Tune')[0] / saving(row, 'MMEngine')[0]
              for row in rows]
    more = sum(value > 1 for value in ratios)
    text = (f"mmtune saves more than MMEngine's rewrite in {more} of "
            f'{len(rows)} rows, {min(ratios):.3f} to {max(ratios):.3f} times '
            'as much')
    if more == len(rows):
        return f'{text}: it keeps no folded weights for backward.'
    return f'{text}.'


def verdict_on_eval(rows: Sequence[dict]) -> str:
    """Compare what Eval takes with the paper's figures."""
    totals = {label(row): row['gb'][0] / eval_gb(row) for row in rows}
    text = f"""Eval takes {min(totals.values()):.2f} to
        {max(totals.values()):.2f} times as much in the paper as here; a GPU
        holds more than tensors (see below)."""
    less = [name for name, value in totals.items() if value < 1]
    if less:
        text += f""" It takes less in {', '.join(less)}."""
    if any('retinanet' in name for name in less):
        text += """ RetinaNet's focal loss is one kernel on a GPU; on a CPU
            MMDetection computes it from several operations, which keep more.
            Both modes do so, and the saving does not change."""
    return text


def explain_half(found: dict, rows: Sequence[dict]) -> list[str]:
    """Split savings in FP16 into what grows with the batch and the rest.

    Returns:
        list[str]: Paragraphs and a table.
    """
    row = rows[0]
    paper = fit_affine([row['batch'] for row in rows],
                       [round(paper_saving(row)) for row in rows])
    fits = dict(paper=paper, **{
        NAMES[mode]: fit_saving(longest(rows), mode) for mode in MODES[1:]
    })
    here = fits[NAMES['MMEngine']]
    growth = here.per_image / paper.per_image
    # Without the sign of a zero.
    gap = round((here.fixed - paper.fixed) / row['weights'], 2) + 0
    probe = found['kept_per_weight']
    excess = {
        precision: probe[precision]['MMEngine'] - probe[precision]['Eval']
        for precision in probe
    }
    parts = [
        paragraph(f"""
        The paper has {label(row)} at {len(rows)} batches. A line through
        what they save splits it into feature maps, which grow with the
        batch, and what does not:
        """),
        table(['', 'an image (MiB)', 'whatever the batch (MiB)',
               'the latter, bytes for each folded weight'],
              [[name, mib(fit.per_image), mib(fit.fixed),
                f'{fit.fixed / row["weights"]:.2f}']
               for name, fit in fits.items()]),
        paragraph(f"""
        {row['weights'] / 1e6:.1f} million numbers are in the weights of the
        backbone that learn. An image saves {growth:.3f} times what it does in
        the paper, {'within' if is_close(growth) else 'not within'}
        {TOLERANCE:.0%}. The rest differs by {gap:.2f} bytes for each of those
        numbers{', about what a copy of them in float32 takes' if
        3.5 <= gap <= 4.5 else ''}. Of a block alone, MMEngine's rewrite keeps
        for each number in its weight so many bytes more than Eval:
        {excess['FP32']:.2f} in FP32, which is the folded weight, and
        {excess['FP16']:.2f} under autocast, where
        {autocast_text(excess['FP16'])}
        """),
        paragraph(f"""
        So these rows {'follow the paper in the feature maps, and not in'
        if is_close(growth) else 'do not follow the paper in the feature maps,'
        ' and so cannot be judged by'} the weights. Why cannot be told without
        the paper's code and a GPU. Feature maps are halves here as there:
        autocast on this CPU gives {dtypes_text(found['autocast'])}.
        """),
    ]
    half = [row for row in found['rows'] + found['suspected']
            if row['precision'] == 'FP16']
    tests = ', '.join(f'{label(row)} {ratio_with_copy(row):.3f}'
                      for row in half if row not in rows)
    parts += [
        paragraph(f"""
        If the paper kept a float32 copy of these weights, here / paper would
        be as below. The {len(rows)} rows fit by construction, since the copy
        was inferred from them. Others are a test of it, as far as their
        models are what they are labelled as: {tests or 'there is none'}.
        """),
        table(['row', 'batch', 'as measured', 'with the copy'],
              [[label(row), row['batch'], f'{ratio(row):.3f}',
                f'{ratio_with_copy(row):.3f}'] for row in half])
    ]
    return parts


def longest(rows: Sequence[dict]) -> dict:
    """Find the row with steps at the most batches."""
    return max(rows, key=lambda row: len(row['steps']))


def ratio_with_copy(row: dict) -> float:
    """Compare with the paper as if folded weights were kept in float32."""
    copies = 4 * row['weights']
    return (saving(row, 'MMEngine')[0] - copies) / paper_saving(row)


def autocast_text(excess: float) -> str:
    return ('it keeps the folded weight as a half where Eval keeps the '
            'weight as one.' if abs(excess) < 0.5 else
            'it keeps more than Eval.')


def dtypes_text(dtypes: dict[str, str]) -> str:
    groups: dict[str, list[str]] = {}
    for name, dtype in dtypes.items():
        groups.setdefault(dtype, []).append(f'`{name}`')
    return '; '.join(f'{dtype} from {", ".join(names)}'
                     for dtype, names in groups.items())


def explain_suspect(row: dict, suspected: dict) -> list[str]:
    """Compare a row's figures with what another model takes.

    Args:
        row (dict): As the paper labels it.
        suspected (dict): The same row with another model.

    Returns:
        list[str]: A table and a paragraph.
    """
    both = (row, suspected)
    nearer = min(both, key=lambda it: abs(ratio(it) - 1))
    other = suspected if nearer is row else row
    text = f"""
        The paper's saving is {1 / ratio(nearer):.3f} times that of
        {label(nearer)} and {1 / ratio(other):.3f} times that of
        {label(other)}.
        """
    text += ("""The row fits a ResNet-50 better than the ResNet-101 that it is
        labelled as; a smaller batch of the ResNet-101 would save as little,
        too.""" if nearer is suspected else
             """By what it saves the row is the ResNet-101's that it is
        labelled as; the note in its metafile is wrong.""")
    near_total = min(both, key=lambda it: abs(eval_gb(it) - row['gb'][0]))
    text += f""" By what Eval takes, too, it is nearer to {label(near_total)}.
        """ if near_total is nearer else f""" But by what Eval takes it is
        nearer to {label(near_total)}."""
    return [
        table([
            'model', 'Eval here (GB)', 'paper: Eval (GB)',
            "MMEngine's saves here (MiB)", 'paper saves (MiB)',
            'here / paper', f'within {TOLERANCE:.0%}'
        ], [[
            label(it), f'{eval_gb(it):.3f}', f'{it["gb"][0]:.3f}',
            saved_text(it, 'MMEngine'), f'{paper_saving(it) / 2**20:.0f}',
            f'{ratio(it):.3f}', 'yes' if is_close(ratio(it)) else 'no'
        ] for it in both]),
        paragraph(text)
    ]


def eval_gb(row: dict) -> float:
    """Tell what Eval takes, in the paper's GB."""
    return eval_total(row) / 2**20 / 1000


def plot(found: dict, path: Path) -> None:
    """Plot what is saved, row by row."""
    rows = sorted(found['rows'], key=paper_saving)
    figure = Figure(
        figsize=(8, 1.8 + 0.35 * len(rows)), layout='constrained')
    axes = figure.subplots()
    places = range(len(rows))
    axes.axvspan(
        1 - TOLERANCE, 1 + TOLERANCE, color='tab:green', alpha=0.2,
        label=f'within {TOLERANCE:.0%} of the paper')
    for mode, marker in zip(MODES[1:], 'ox'):
        axes.plot([ratio(row, mode) for row in rows], places, marker,
                  label=f'{NAMES[mode]}, here')
    axes.set_yticks(places, [
        f'{label(row)}, batch {row["batch"]}: {paper_saving(row) / 2**20:.0f}'
        for row in rows
    ])
    axes.set(xlabel='saved here / saved in the paper (MiB, left)')
    axes.grid(axis='x', alpha=0.3)
    figure.legend(loc='outside lower center', ncols=3)
    figure.savefig(path, dpi=120)
