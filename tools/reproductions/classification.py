"""Fine-tune a classifier in Train, Eval and Tune mode, as in Table 3."""
import statistics
from collections.abc import Sequence
from pathlib import Path

import finetune_digits
import torch
from matplotlib.figure import Figure
from mmdet.models import ResNet
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmtune.analysis import peak_bytes
from mmtune.analysis.timing import quartiles
from mmtune.behaviours import convolution
from reproductions.material import (
    fetch_weights,
    in_processes,
    measure_in_turns,
    put_in_paper_mode,
)
from reproductions.pages import (
    CONFIDENCE,
    difference_text,
    difference_verdict,
    mean_spread,
    mib,
    paired_difference,
    paragraph,
    table,
    track,
)

TITLE = 'Classification'
OF_PAPER = 'Table 3'
QUESTION = paragraph("""
    Does Tune mode help classifiers too? The paper fine-tunes a ResNet-50 on
    three datasets (its Table 3) and compares Tune with Train mode, which is
    usual there: as accurate, 38% less memory, 10 to 14% less time.""")

MODES = ('Train', 'Eval', 'Tune')
# The paper's Table 3: accuracy in percent, memory in MiB, seconds of an
# iteration, each in Train and in Tune mode.
TABLE_3 = {
    'CUB-200': ((83.07, 83.20), (19967, 12323), (.571, .501)),
    'Aircraft': ((85.40, 85.90), (19965, 12321), (.564, .505)),
    'Cars': ((89.87, 90.13), (19967, 12321), (.571, .491)),
}
# Top-1 accuracy in percent of resnet50_8xb8_cub, by mmpretrain's
# configs/resnet/README.md.
MMPRETRAIN_CUB = 88.45
MIB = 2**20


class ResNet50Classifier(nn.Module):
    """What the paper's Table 3 trains.

    Args:
        classes (int): How many there are.
    """

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
    """Run tools/finetune_digits.py.

    Args:
        mode (str): One of :data:`MODES`.
        lr (float): Learning rate.
        seed (int): Of the head's weights and the order of images.
        work_dir (str): For its logs and checkpoints.
        settings (dict): More arguments of ``build_runner``.

    Returns:
        dict: The arguments and the final ``accuracy``, a share.
    """
    runner = finetune_digits.build_runner(
        mode.lower(),
        seed,
        lr=lr,
        work_dir=f'{work_dir}/{lr:g}-{seed}',
        log_level='WARNING',
        activations=False,
        **settings)
    runner.train()
    accuracy = runner.message_hub.get_scalar('val/accuracy').current()
    return dict(mode=mode, lr=lr, seed=seed, accuracy=float(accuracy))


class DigitsStep:
    """A training step of the script's classifier, to call.

    Args:
        mode (str): One of :data:`mmtune.analysis.modes.MODES`.
        batch_size (int): How many images.
        size (int): Their height and width in pixels.
        weights (str, optional): The backbone's.
    """

    def __init__(self, mode: str, batch_size: int, size: int,
                 weights: str | None) -> None:
        torch.manual_seed(0)
        self.model = finetune_digits.Classifier(weights)
        self.model.init_weights()
        put_in_paper_mode(self.model, mode, ['backbone'])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.batch = finetune_digits.load_data(size)[0][:batch_size]

    def __call__(self) -> None:
        """Take the step."""
        self.model(*self.batch, mode='loss')['loss'].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure_steps(modes: Sequence[str], batch_size: int, size: int,
                  rounds: int, weights: str | None) -> dict:
    """Count the memory of a step and time it.

    Args:
        modes (Sequence[str]): What to compare.
        batch_size (int): How many images.
        size (int): Their height and width in pixels.
        rounds (int): How many steps to time in each mode.
        weights (str, optional): The backbone's.

    Returns:
        dict: The batch; of each mode the ``peak`` in bytes and the
        ``seconds`` of each round.
    """
    steps = {
        mode: DigitsStep(mode, batch_size, size, weights) for mode in modes
    }
    return dict(
        batch_size=batch_size,
        size=size,
        **measure_in_turns(steps, rounds))


def count_training(mode: str, batch_size: int, size: int,
                   device: str = 'meta') -> int:
    """Count all that training a ResNet-50 has in memory.

    On the device 'meta' tensors have a size but no content, so that batches
    can be counted that no memory here would hold.

    Args:
        mode (str): One of :data:`mmtune.analysis.modes.MODES`.
        batch_size (int): How many images.
        size (int): Their height and width in pixels.
        device (str): Where to run. Defaults to 'meta'.

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
        batches: Sequence[tuple[int, int]] = ((64, 448), (32, 224)),
        weights: str | None = 'fetch',
        work_dir: str = 'work_dirs/reproductions/classification') -> dict:
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
        weights (str, optional): Checkpoint of the backbone. ``'fetch'``, the
            default, is the ImageNet weights, fetched where they are missing.
        work_dir (str): For logs and checkpoints.

    Returns:
        dict: What was found, for :func:`page` and :func:`plot`.
    """
    if weights == 'fetch':
        weights = fetch_weights()
    plan = [(mode, lr, seed) for lr in lrs for seed in seeds
            for mode in MODES]
    settings = dict(
        epochs=epochs, size=size, batch_size=batch_size, weights=weights)
    runs = in_processes(fine_tune,
                        [(*arguments, work_dir, settings)
                         for arguments in plan], 'Fine-tune')
    train_set, test_set = finetune_digits.load_data(size)
    modes = ('Train', 'Eval', 'MMEngine', 'Tune')
    return dict(
        seeds=list(seeds),
        lrs=list(lrs),
        epochs=epochs,
        size=size,
        batch_size=batch_size,
        images=[len(train_set), len(test_set)],
        runs=runs,
        steps=[
            measure_steps(modes, batch_size, pixels, rounds, weights)
            for pixels in track(step_sizes, 'Measure a step')
        ],
        counts=[
            dict(
                batch_size=images,
                size=pixels,
                peak={
                    mode: count_training(mode, images, pixels)
                    for mode in modes
                }) for images, pixels in batches
        ])


def _accuracies(found: dict, mode: str, lr: float) -> list[float]:
    return [
        run['accuracy'] for run in found['runs']
        if (run['mode'], run['lr']) == (mode, lr)
    ]


def _best_lr(found: dict, mode: str) -> float:
    return max(
        found['lrs'],
        key=lambda lr: statistics.mean(_accuracies(found, mode, lr)))


def _accuracy_section(found: dict) -> str:
    rows = [[
        f'{lr:g}',
        *(mean_spread(_accuracies(found, mode, lr)) for mode in MODES)
    ] for lr in found['lrs']]
    best = {mode: _best_lr(found, mode) for mode in MODES}
    lines = [
        table(['learning rate', *MODES], rows),
        paragraph(f"""
            Differences are means over the seeds; in brackets their
            {CONFIDENCE:.0%} confidence interval (paired t-test)."""),
        *(_compare(found, other, best) for other in ('Eval', 'Train')),
        *filter(None, [_edges(found, best)])
    ]
    failed = [
        f'{lr:g}' for lr in found['lrs']
        if max(_accuracies(found, 'Tune', lr)) < .5
        and max(_accuracies(found, 'Eval', lr)) < .5
        and min(_accuracies(found, 'Train', lr)) > .5
    ]
    if failed:
        lines.append(
            paragraph(f"""
            At a learning rate of {', '.join(failed)} Train mode learns while
            Eval and Tune do not. That is what fixed statistics do, which Tune
            shares with Eval: a likely reason is that no statistics of the
            batch rein in maps that grow too large. Where a recipe for Train
            mode is taken over, smaller learning rates are worth a try."""))
    else:
        lines.append(
            paragraph("""
            At no learning rate tried did Train mode learn while Eval and Tune
            did not."""))
    return '\n\n'.join(lines)


def _compare(found: dict, other: str, best: dict) -> str:
    ours, theirs = (_accuracies(found, mode, best[mode])
                    for mode in ('Tune', other))
    mean, interval = paired_difference(ours, theirs)
    return paragraph(f"""
        Tune at its best learning rate ({best['Tune']:g}) less {other} at its
        own ({best[other]:g}): {difference_text(mean, interval)},
        {difference_verdict(interval)}.""")


def _edges(found: dict, best: dict) -> str:
    """Name the modes whose best learning rate may not be among those tried."""
    edges = min(found['lrs']), max(found['lrs'])
    modes = [mode for mode, lr in best.items() if lr in edges]
    if not modes:
        return ''
    return paragraph(f"""The best learning rate of {', '.join(modes)} is the
        smallest or the largest that was tried; one beyond may be better.""")


def _shape(batch: dict) -> str:
    size = batch['size']
    return f'{batch["batch_size"]} x 3 x {size} x {size}'


def _step_section(found: dict) -> str:
    rows = []
    for step in found['steps']:
        peak, seconds = step['peak'], step['seconds']
        for mode in peak:
            ratios = [a / b for a, b in zip(seconds[mode], seconds['Train'])]
            low, median, high = quartiles(ratios)
            rows.append([
                _shape(step), mode,
                mib(peak[mode]), f'{peak[mode] / peak["Train"] - 1:+.1%}',
                f'{median:.3f} ({low:.3f}-{high:.3f})'
            ])
    return table(
        ['batch', 'mode', 'peak, MiB', 'to Train', 'time, Train = 1'], rows)


def _paper_table() -> str:
    rows = []
    for name, (accuracy, memory, seconds) in TABLE_3.items():
        rows.append([
            name, *(f'{value:.2f}' for value in accuracy), *memory,
            f'{memory[1] / memory[0] - 1:+.1%}',
            f'{seconds[1] / seconds[0]:.3f}'
        ])
    return table([
        'dataset', 'Train, %', 'Tune, %', 'Train, MiB', 'Tune, MiB',
        'memory to Train', 'time, Train = 1'
    ], rows)


def _saved(peak: dict) -> float:
    """The share that MMEngine's rewrite saves."""
    return 1 - peak['MMEngine'] / peak['Train']


def _count_section(found: dict) -> str:
    train, tune = TABLE_3['CUB-200'][1]
    rows = []
    for count in found['counts']:
        peak = count['peak']
        paper = dict(Train=train, MMEngine=tune) if (
            count is found['counts'][0]) else {}
        rows += [[
            _shape(count), mode,
            mib(peak[mode]), f'{peak[mode] / peak["Train"] - 1:+.1%}',
            paper.get(mode, '')
        ] for mode in peak]
    first = found['counts'][0]
    peak = first['peak']
    off = peak['Train'] / MIB / train - 1
    saved, claimed = _saved(peak), 1 - tune / train
    near = abs(saved - claimed) <= .05
    verdict = 'is within 5 points of' if near else 'is not'
    per_image = (peak['Train'] - peak['MMEngine']) / first['batch_size']
    text = f"""
        The count in Train mode is {off:+.1%} to the paper's. MMEngine's
        rewrite, which is the paper's way, saves {saved:.0%} of it, which
        {verdict} what the paper has ({claimed:.0%}). It saves
        {mib(per_image)} MiB an image; the paper's saving would be that of
        {(train - tune) * MIB / per_image:.0f} images."""
    if not near:
        text += _why_not(found, claimed)
    return '\n\n'.join([
        table(['batch', 'mode', 'counted, MiB', 'to Train', 'paper, MiB'],
              rows),
        paragraph(text)
    ])


def _why_not(found: dict, claimed: float) -> str:
    text = ''
    for count in found['counts'][1:]:
        saved = _saved(count['peak'])
        verdict = ('could explain it' if abs(saved - claimed) <= .05 else
                   'would not explain it')
        text += f"""
            Another size {verdict}: at {_shape(count)}, where parameters
            weigh more beside the maps, it saves {saved:.0%}."""
    return text + """
        Kernels' workspaces, which a GPU's allocator logs and which are not
        counted here, may: they are alike in both modes and take away from
        the share. Nothing here shows that they do."""


def answer(found: dict) -> str:
    """Say in a sentence what came out."""
    best = {mode: _best_lr(found, mode) for mode in MODES}
    reached = ', '.join(
        f'{mean_spread(_accuracies(found, mode, lr))} in {mode}'
        for mode, lr in best.items())
    step = next(step for step in found['steps']
                if step['size'] == found['size'])
    peak = step['peak']
    return (f'Accuracy at the best learning rate of each mode: {reached}; the '
            f'peak of a step in Tune is {1 - peak["Tune"] / peak["Train"]:.0%}'
            f' below that in Train, at {_shape(step)}.')


def page(found: dict) -> str:
    """Write the page."""
    script = Path(finetune_digits.__file__).read_text(encoding='utf-8')
    counted = found['counts'][0]
    train, test = found['images']
    parts = [
        '## The script',
        paragraph(f"""
            An ImageNet MobileNetV2 learns scikit-learn's handwritten digits
            (8 x 8 pixels, scaled to {found['size']} x {found['size']}):
            {train} to train on, {test} to test, always the same. It is also
            the shortest example of the Hook in a Runner of your own; the
            lines that concern mmtune are marked.
            `python tools/finetune_digits.py --mode tune` runs it."""),
        f'```python\n{script}```',
        '## Accuracy',
        paragraph(f"""
            Share of test digits recognised after {found['epochs']} epochs at
            batch {found['batch_size']} with AdamW, mean and sample standard
            deviation over {len(found['seeds'])} seeds, which choose the
            weights of the new layer and the order of images. The best
            learning rate is picked on the test digits, so that absolute
            values are optimistic."""),
        _accuracy_section(found),
        '## Memory and time of a step',
        paragraph(f"""
            The most bytes of tensors that a training step creates and holds
            at once, counted on the CPU, and its time: ratios within rounds in
            which the modes take turns, median and quartiles. Blocks whose
            maps have fewer than {convolution.SMALL_MAP:,} elements run as
            stock in Tune mode, while MMEngine's rewrite folds them."""),
        _step_section(found),
        '## Table 3 of the paper',
        paragraph('The figures of the paper, ResNet-50; its GB, as logged, '
                  'are MiB divided by 1000:'),
        _paper_table(),
        paragraph(f"""
            The memory of such a training can be counted without a GPU, on
            tensors that have a size and no content. The setting here is
            mmpretrain's for CUB-200: {counted['batch_size']} images (its 8 x
            8, all on one device) of {counted['size']} x {counted['size']}
            pixels, float32, SGD with momentum, everything counted from
            parameters to feature maps. That the paper's is the same is a
            guess, and the accuracy speaks against it: mmpretrain gives
            {MMPRETRAIN_CUB}% for its config of CUB-200, which starts from
            ImageNet-21k weights, where the paper has
            {TABLE_3['CUB-200'][0][0]}% in the same mode."""),
        _count_section(found),
        '## Not run here',
        paragraph("""
            Training on CUB-200, Aircraft and Cars, for which this project had
            neither the data nor a GPU. The configs are there, for mmpretrain
            1.2 with mmtune and openmim beside it; where they look for the
            data [their README](../../../configs/README.md#classification)
            says. The commands for 8 GPUs:"""),
        '```bash\n' + '\n'.join(
            f'mim train mmpretrain configs/resnet/resnet50_8xb8{mode}_{data}'
            '.py \\\n    --gpus 8 --launcher pytorch'
            for data in ('cub', 'aircraft', 'cars')
            for mode in ('', '-eval', '-tune')) + '\n```',
        paragraph("""
            Without a suffix it is Train mode, which the paper compares with,
            `-eval` holds the BatchNorms, and `-tune` is that in Tune
            mode."""),
    ]
    return '\n\n'.join(parts) + '\n'


def plot(found: dict, path: Path) -> None:
    """Plot accuracy by learning rate, and memory beside the paper's."""
    figure = Figure(figsize=(8, 3.6), layout='constrained')
    points, bars = figure.subplots(1, 2)
    places = {lr: place for place, lr in enumerate(found['lrs'])}
    for shift, mode in zip((-.2, 0, .2), MODES):
        runs = [run for run in found['runs'] if run['mode'] == mode]
        points.plot([places[run['lr']] + shift for run in runs],
                    [run['accuracy'] for run in runs],
                    'o',
                    alpha=.7,
                    label=mode)
    points.set_xticks(list(places.values()), [f'{lr:g}' for lr in places])
    points.set(
        xlabel='learning rate', ylabel='accuracy', title='Digits, a dot a run')
    points.legend()
    peak = found['counts'][0]['peak']
    container = bars.bar(list(peak), [n / MIB for n in peak.values()])
    bars.bar_label(container, fmt='%.0f')
    for value, mode in zip(TABLE_3['CUB-200'][1], ('Train', 'MMEngine')):
        bars.plot(mode, value, 'k_', markersize=30)
    bars.plot([], [], 'k_', label="the paper's")
    bars.set(
        ylabel='MiB',
        title=f'ResNet-50, {_shape(found["counts"][0])}, counted')
    bars.set_ylim(top=1.25 * peak['Train'] / MIB)
    bars.legend()
    figure.savefig(path, dpi=120)
