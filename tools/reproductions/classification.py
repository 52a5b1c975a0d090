"""Fine-tune a classifier in Train, Eval and Tune mode, as in Table 3."""
import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import finetune_digits
import torch
from matplotlib.figure import Figure
from mmdet.models import ResNet
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmtune.analysis import peak_bytes
from mmtune.behaviours import convolution
from reproductions.material import (
    digits,
    fetch_weights,
    in_processes,
    measure_in_turns,
    pretrained_classifier,
    put_in_paper_mode,
)
from reproductions.page import (
    MIB,
    STEP_COLUMNS,
    Difference,
    Page,
    drawing,
    each_mode,
    mean_spread,
    mib,
    shape_text,
    table,
)

MODES = ('Train', 'Eval', 'Tune')
# In which memory is counted.
COUNTED = ('Train', 'Eval', 'MMEngine', 'Tune')
# What the paper logged of CUB-200 in its Table 3, in MiB.
PAPER = dict(Train=19967, MMEngine=12323)


class ResNet50Classifier(nn.Module):
    """What the paper's Table 3 trains."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = ResNet(50, out_indices=(3, ))
        self.head = nn.Linear(2048, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Give a score a class, shape (N, classes)."""
        features, = self.backbone(images)
        return self.head(features.mean(dim=(2, 3)))


def fine_tune(mode: str, lr: float, seed: int, work_dir: str,
              settings: dict) -> dict:
    """Run tools/finetune_digits.py; tell what was run, and the accuracy."""
    runner = finetune_digits.build_runner(
        mode.lower(), seed, lr=lr, work_dir=f'{work_dir}/{lr:g}-{seed}',
        log_level='WARNING', activations=False, **settings)
    runner.train()
    accuracy = runner.message_hub.get_scalar('val/accuracy').current()
    return dict(mode=mode, lr=lr, seed=seed, accuracy=float(accuracy))


def digits_step(mode: str, batch_size: int, size: int) -> Callable[[], None]:
    """Make a training step of the script's classifier, to call."""
    model = pretrained_classifier()
    put_in_paper_mode(model, mode, ['backbone'])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    batch = digits(size, batch_size)

    def step() -> None:
        model(*batch, mode='loss')['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_steps(batch_size: int, size: int, rounds: int) -> dict:
    """Measure a step of each mode; see :func:`measure_in_turns`."""
    steps = {mode: digits_step(mode, batch_size, size) for mode in COUNTED}
    return dict(
        batch_size=batch_size, size=size, **measure_in_turns(steps, rounds))


def count_training(mode: str, batch_size: int, size: int,
                   device: str = 'meta') -> int:
    """Count all that training a ResNet-50 has in memory.

    On the device 'meta' tensors have a size but no content, so that batches
    can be counted that no memory here would hold.

    Returns:
        int: The most bytes alive at once in the second step of SGD with
        momentum, in float32: parameters, gradients, momentum, images and
        feature maps.
    """
    with peak_bytes() as memory, torch.device(device):
        model = ResNet50Classifier(classes=200)
        put_in_paper_mode(model, mode, ['backbone'])
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        images = torch.ones(batch_size, 3, size, size)
        labels = torch.zeros(batch_size, dtype=torch.long)
        for _ in range(2):
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return memory.peak


def run(seeds: Sequence[int] = (0, 1, 2),
        lrs: Sequence[float] = (3e-5, 1e-4, 3e-4, 1e-3),
        epochs: int = 3,
        size: int = 64,
        batch_size: int = 32,
        step_sizes: Sequence[int] = (64, 128),
        rounds: int = 10,
        batches: Sequence[tuple[int, int]] = ((64, 448), (32, 224))
        ) -> dict:
    """Fine-tune in each mode, and measure a step.

    Args:
        seeds (Sequence[int]): A run in each mode for each of them.
        lrs (Sequence[float]): Learning rates to try with each seed.
        epochs (int): How long to train.
        size (int): Height and width of the images, in pixels.
        batch_size (int): Images a step.
        step_sizes (Sequence[int]): Height and width of the images in the
            steps to measure.
        rounds (int): How many steps to time in each mode.
        batches (Sequence[tuple[int, int]]): Images a step, and their height
            and width, in the counts beside Table 3. The first is taken for
            the paper's.
    """
    settings = dict(epochs=epochs, size=size, batch_size=batch_size,
                    weights=fetch_weights())
    with tempfile.TemporaryDirectory() as work_dir:
        runs = in_processes(fine_tune, [
            (mode, lr, seed, work_dir, settings)
            for lr, seed, mode in product(lrs, seeds, MODES)
        ], 'Fine-tune')
    return dict(
        seeds=list(seeds), lrs=list(lrs), epochs=epochs, size=size,
        batch_size=batch_size,
        images=[len(part) for part in finetune_digits.load_data(size)],
        runs=runs,
        steps=[
            measure_steps(batch_size, pixels, rounds)
            for pixels in track(step_sizes, 'Measure a step')
        ],
        counts=[
            dict(batch_size=images, size=pixels, peak={
                mode: count_training(mode, images, pixels)
                for mode in COUNTED
            }) for images, pixels in batches
        ])


def accuracies(found: dict, mode: str, lr: float) -> list[float]:
    """Give the accuracy of each seed."""
    return [
        run['accuracy'] for run in found['runs']
        if (run['mode'], run['lr']) == (mode, lr)
    ]


def best_lrs(found: dict) -> dict[str, float]:
    """Find the learning rate with which each mode is the most accurate."""
    return {
        mode: max(found['lrs'], key=lambda lr: statistics.mean(
            accuracies(found, mode, lr))) for mode in MODES
    }


def compare(found: dict, other: str) -> Difference:
    """Compare Tune with another mode, each at its best learning rate."""
    best = best_lrs(found)
    return Difference.of(*(accuracies(found, mode, best[mode])
                           for mode in ('Tune', other)))


def fails_with_fixed_statistics(found: dict, lr: float) -> bool:
    """Tell whether Train alone learns at a learning rate."""
    train, *others = (accuracies(found, mode, lr) for mode in MODES)
    return min(train) > .5 and all(max(other) < .5 for other in others)


def batch_text(batch: dict) -> str:
    """Write the shape of a batch."""
    return shape_text(batch['batch_size'], batch['size'], batch['size'])


def saved(peak: dict, mode: str = 'MMEngine') -> float:
    """The share of Train's peak that a mode saves."""
    return 1 - peak[mode] / peak['Train']


def counts_table(found: dict) -> str:
    """Lay out what was counted, and what the paper logged."""
    return table(each_mode(found['counts']), {
        'batch': lambda it: batch_text(it[0]),
        'mode': STEP_COLUMNS['mode'],
        'counted, MiB': STEP_COLUMNS['peak, MiB'],
        'to Train': STEP_COLUMNS['to Train'],
        'paper, MiB': lambda it: PAPER.get(it[1], '')
        if it[0] is found['counts'][0] else ''
    })


def figures(found: dict) -> dict[str, object]:
    """Write what the page shows."""
    best = best_lrs(found)
    step = next(step for step in found['steps']
                if step['size'] == found['size'])
    counted, *others = found['counts']
    peak = counted['peak']
    per_image = (peak['Train'] - peak['MMEngine']) / counted['batch_size']
    script = Path(finetune_digits.__file__).read_text(encoding='utf-8')
    columns: dict[str, Callable[[float], str]] = {
        mode: lambda lr, mode=mode: mean_spread(accuracies(found, mode, lr))
        for mode in MODES
    }
    return {
        'reached': ', '.join(
            f'{mean_spread(accuracies(found, mode, lr))} in {mode}'
            for mode, lr in best.items()),
        'saved': f'{saved(step["peak"], "Tune"):.0%}',
        'at': batch_text(step),
        'script': f'```python\n{script}```',
        'size': f'{found["size"]} x {found["size"]}',
        'train-images': found['images'][0],
        'test-images': found['images'][1],
        'epochs': found['epochs'],
        'batch': found['batch_size'],
        'seeds': len(found['seeds']),
        'accuracies': table(
            found['lrs'], {'learning rate': '{:g}'.format, **columns}),
        **{f'best-{mode}': f'{lr:g}' for mode, lr in best.items()},
        **{f'less-{other}': compare(found, other)
           for other in ('Eval', 'Train')},
        'failed': ', '.join(
            f'{lr:g}' for lr in found['lrs']
            if fails_with_fixed_statistics(found, lr)) or 'none',
        'small': f'{convolution.SMALL_MAP:,}',
        'steps': table(each_mode(found['steps']), {
            'batch': lambda it: batch_text(it[0]), **STEP_COLUMNS
        }),
        'counts': counts_table(found),
        'off': f'{peak["Train"] / MIB / PAPER["Train"] - 1:+.1%}',
        'share': f'{saved(peak):.0%}',
        'claimed': f'{saved(PAPER):.0%}',
        'per-image': mib(per_image),
        'images': '{:.0f}'.format(
            (PAPER['Train'] - PAPER['MMEngine']) * MIB / per_image),
        'other-sizes': ', '.join(
            f'{saved(count["peak"]):.0%} at {batch_text(count)}'
            for count in others)
    }


def claims(found: dict) -> dict[str, bool]:
    """Tell what the page says, and whether it is so."""
    claimed = saved(PAPER)
    best = best_lrs(found)
    edges = min(found['lrs']), max(found['lrs'])
    return {
        'these runs cannot tell Tune from Eval, nor from Train':
        not any(compare(found, other).is_certain
                for other in ('Eval', 'Train')),
        'the best learning rate of Train, and of no other mode, is at the '
        'edge of those tried':
        [mode for mode, lr in best.items() if lr in edges] == ['Train'],
        'at some learning rate Train alone learns':
        any(fails_with_fixed_statistics(found, lr) for lr in found['lrs']),
        "the rewrite saves more than the paper's share, at any size":
        all(saved(count['peak']) > claimed + .05 for count in found['counts'])
    }


@drawing(3.6)
def plot(found: dict, figure: Figure) -> None:
    """Draw accuracy by learning rate, and memory beside the paper's."""
    points, bars = figure.subplots(1, 2)
    places = {lr: place for place, lr in enumerate(found['lrs'])}
    for shift, mode in zip((-.2, 0, .2), MODES):
        runs = [run for run in found['runs'] if run['mode'] == mode]
        points.plot([places[run['lr']] + shift for run in runs],
                    [run['accuracy'] for run in runs], 'o', alpha=.7,
                    label=mode)
    points.set_xticks(list(places.values()), [f'{lr:g}' for lr in places])
    points.set(
        xlabel='learning rate', ylabel='accuracy', title='Digits, a dot a run')
    points.legend()
    counted = found['counts'][0]
    peak = counted['peak']
    container = bars.bar(list(peak), [n / MIB for n in peak.values()])
    bars.bar_label(container, fmt='%.0f')
    for mode, value in PAPER.items():
        bars.plot(mode, value, 'k_', markersize=30)
    bars.plot([], [], 'k_', label="the paper's")
    bars.set(ylabel='MiB', title=f'ResNet-50, {batch_text(counted)}, counted')
    bars.set_ylim(top=1.25 * peak['Train'] / MIB)
    bars.legend()


PAGE = Page(run, figures, claims, plot)
