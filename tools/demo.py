"""Fine-tune a pretrained detector in Eval and in Tune mode and compare.

Fetches what is missing (aerial images of trees, ImageNet weights), trains
RetinaNet with MobileNetV2 once a mode from the same seed, and writes to
``work_dirs/demo`` a table, a plot of losses and memory, and pictures of what
the detector found. Finished runs are reused; delete the folder to repeat.
"""
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import mmcv
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint, set_random_seed
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from mmtune import turn_on
from mmtune.analysis import peak_bytes, saved_bytes
from mmtune.engine.checkpoint import allow_mmengine_checkpoints

TOOLS = Path(__file__).resolve().parent
CONFIGS = TOOLS.parent / 'configs/trees'
MODES = {
    'Eval': CONFIGS / 'retinanet_mobilenet-v2_fpn_250i_trees.py',
    'Tune': CONFIGS / 'retinanet_mobilenet-v2_fpn_tune-250i_trees.py'
}
# Relative to the folder the demo is started in, as are the configs' paths.
WORK_DIR = Path('work_dirs/demo')
WEIGHTS = Path('checkpoints/mobilenet_v2_imagenet.pth')

MIB = 1 << 20
# Detections less sure than this are not drawn.
MIN_SCORE = 0.3


def run_tool(name: str, *arguments: str) -> None:
    """Run a script of this folder, showing what it prints.

    Args:
        name (str): Its path in this folder.
        *arguments (str): Its command line.

    Raises:
        SystemExit: If the script fails.
    """
    command = [sys.executable, str(TOOLS / name), *arguments]
    if subprocess.run(command).returncode != 0:
        sys.exit(f'{name} failed; its message is above.')


def is_finished(run_dir: Path, config: Config) -> bool:
    """Tell whether a run of this very config was completed.

    Args:
        run_dir (Path): Its work dir.
        config (Config): What should have been run.

    Returns:
        bool: Whether its results can be used.
    """
    record = run_dir / 'run.json'
    return (record.is_file()
            and json.loads(record.read_text())['config'] == config.pretty_text
            and final_checkpoint(run_dir, config).is_file())


def final_checkpoint(run_dir: Path, config: Config) -> Path:
    """Name the checkpoint that a run ends with.

    Args:
        run_dir (Path): Its work dir.
        config (Config): Its config.

    Returns:
        Path: Where that checkpoint is or will be.
    """
    return run_dir / f'iter_{config.train_cfg.max_iters}.pth'


def train(mode: str, path: Path, run_dir: Path) -> None:
    """Train from scratch with ``tools/train.py``, in a process of its own.

    Args:
        mode (str): What to call the run.
        path (Path): Its config.
        run_dir (Path): Its work dir; what an interrupted run left there is
            removed.

    Raises:
        SystemExit: If training fails; the end of its output is shown.
    """
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [
        sys.executable, '-u',
        str(TOOLS / 'train.py'),
        str(path), '--work-dir',
        str(run_dir)
    ]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace')
    try:
        output = follow(mode, process.stdout)
        # Popen's own wait() would not tell how much memory was used.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        process.kill()
    if process.returncode != 0:
        sys.exit(f'{output}\nTraining in {mode} mode failed with status '
                 f'{process.returncode}; the end of its output is above.')
    record = dict(
        config=Config.fromfile(path).pretty_text,
        seconds=time.monotonic() - start,
        # In KiB, but on macOS in bytes.
        peak_rss=usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024))
    (run_dir / 'run.json').write_text(json.dumps(record))


def follow(mode: str, lines) -> str:
    """Turn the output of a training run into a progress bar.

    Args:
        mode (str): What to call the run.
        lines (Iterable[str]): What the run prints, as it comes.

    Returns:
        str: The end of the output, to show if the run has failed.
    """
    last = deque(maxlen=40)
    with Progress() as progress:
        task = progress.add_task(f'{mode}: starting', total=None)
        for line in lines:
            last.append(line)
            found = re.search(
                r'Iter\(train\) \[ *(\d+)/(\d+)\].* loss: ([\d.]+)', line)
            if not found:
                continue
            done, total = int(found[1]), int(found[2])
            text = f'{mode}: loss {float(found[3]):.2f}'
            progress.update(
                task, completed=done, total=total, description=text)
            # A bar is drawn on terminals alone.
            if not progress.console.is_terminal and done % 20 == 0:
                progress.console.print(f'{text}, {done}/{total}')
    return ''.join(last)


def read_scalars(run_dir: Path) -> dict:
    """Read what a run has logged.

    Args:
        run_dir (Path): Its work dir.

    Returns:
        dict: ``losses``, one an iteration; ``seconds``, the time each took;
            ``mAP`` and ``AP50`` of the last validation.
    """
    path, = run_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    iterations = [line for line in lines if 'loss' in line]
    # Where nothing is detected CocoMetric reports nothing, which is 0.
    metrics = [line for line in lines if 'coco/bbox_mAP' in line] or [{}]
    return dict(
        losses=[line['loss'] for line in iterations],
        seconds=[line['time'] for line in iterations],
        mAP=metrics[-1].get('coco/bbox_mAP', 0.0),
        AP50=metrics[-1].get('coco/bbox_mAP_50', 0.0))


class TrainingStep:
    """One training step of a config's model on one batch, to measure.

    Args:
        config (Config): As ``tools/train.py`` would run it.
        batch (dict): A batch of its train dataloader.
    """

    def __init__(self, config: Config, batch: dict) -> None:
        self.batch = batch
        self.model = MODELS.build(config.model).to(get_device()).train()
        load_checkpoint(
            self.model.backbone,
            config.model.backbone.init_cfg.checkpoint,
            map_location='cpu')
        self.optim_wrapper = build_optim_wrapper(self.model,
                                                 config.optim_wrapper)
        if config.get('efficient_conv_bn_eval'):
            turn_on(self.model, **config.efficient_conv_bn_eval)
        # The first step also creates the optimizer's state.
        self.run()

    def run(self) -> float:
        """Take the step.

        Returns:
            float: The seconds it took.
        """
        start = time.perf_counter()
        self.model.train_step(self.batch, self.optim_wrapper)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def bytes_kept(self) -> int:
        """Count what its forward keeps for backward.

        Returns:
            int: In bytes, without parameters and buffers.
        """
        data = self.model.data_preprocessor(self.batch, training=True)
        with saved_bytes(self.model) as saved:
            # What is kept lives as long as the losses do.
            _losses = self.model(**data, mode='loss')
            return saved.total

    def peak_bytes(self) -> int:
        """Count the tensors that the step creates.

        Returns:
            int: The most of them alive at once, in bytes.
        """
        with peak_bytes() as memory:
            self.run()
        return memory.peak


def measure(configs: dict, rounds: int = 10) -> dict:
    """Measure memory and time of a training step in each mode.

    The modes take turns, so that whatever else the machine does slows down
    all of them alike.

    Args:
        configs (dict): The config of each mode.
        rounds (int): How many steps to time in each mode.

    Returns:
        dict: For each mode ``bytes_kept`` and ``peak_bytes``, and the
            median ``seconds`` of a step.
    """
    init_default_scope('mmdet')
    set_random_seed(0)
    loader = next(iter(configs.values())).train_dataloader.to_dict()
    loader.update(num_workers=0, persistent_workers=False)
    batch = next(iter(Runner.build_dataloader(loader, seed=0)))
    steps = {
        mode: TrainingStep(config, batch)
        for mode, config in configs.items()
    }
    seconds = {mode: [] for mode in steps}
    for _ in track(range(rounds), 'Measure'):
        for mode, step in steps.items():
            seconds[mode].append(step.run())
    return {
        mode: dict(
            bytes_kept=step.bytes_kept(),
            peak_bytes=step.peak_bytes(),
            seconds=statistics.median(seconds[mode]))
        for mode, step in steps.items()
    }


def loss_differences(losses: list, others: list) -> dict:
    """Compare two loss curves.

    Args:
        losses (list): A loss an iteration.
        others (list): The same of another run.

    Returns:
        dict: The largest absolute difference in the ``first`` iteration,
            in the ``first_10``, and in ``all``.
    """
    differences = [abs(a - b) for a, b in zip(losses, others)]
    return dict(
        first=differences[0],
        first_10=max(differences[:10]),
        all=max(differences))


def make_table(summary: dict) -> Table:
    """Lay out the comparison.

    Args:
        summary (dict): What :func:`main` writes as ``table.json``.

    Returns:
        Table: To print with rich.
    """
    difference = summary['loss_difference']
    table = Table(
        caption='Largest difference of the losses: '
        f'{difference["first"]:.1e} in the first iteration, '
        f'{difference["first_10"]:.1e} in the first 10, '
        f'{difference["all"]:.1e} in all')
    table.add_column('mode')
    for title in ('mAP', 'AP50', 'kept for\nbackward', 'peak of\na step',
                  'peak of\nprocess', 'time of\na step'):
        table.add_column(title, justify='right')
    modes = summary['modes']
    for mode, row in modes.items():
        table.add_row(mode, f'{row["mAP"]:.3f}', f'{row["AP50"]:.3f}',
                      f'{row["bytes_kept"] / MIB:.1f} MiB',
                      f'{row["peak_bytes"] / MIB:.1f} MiB',
                      f'{row["peak_rss"] / MIB:.0f} MiB',
                      f'{row["seconds"]:.3f} s')
    tune, stock = modes['Tune'], modes['Eval']
    table.add_section()
    table.add_row(
        'change',
        *(f'{tune[key] - stock[key]:+.3f}' for key in ('mAP', 'AP50')),
        *(f'{tune[key] / stock[key] - 1:+.1%}'
          for key in ('bytes_kept', 'peak_bytes', 'peak_rss', 'seconds')))
    return table


def plot_comparison(losses: dict, modes: dict, path: Path) -> None:
    """Plot loss curves and memory.

    Args:
        losses (dict): Of each mode the loss of each iteration.
        modes (dict): Of each mode ``bytes_kept`` and ``peak_bytes``.
        path (Path): The picture to write.
    """
    figure = Figure(figsize=(11, 4), layout='constrained')
    curves, bars = figure.subplots(1, 2)
    for (mode, values), style in zip(losses.items(), ('-', '--')):
        curves.plot(range(1, len(values) + 1), values, style, label=mode)
    curves.set(xlabel='iteration', ylabel='loss', title='Training loss')
    curves.legend()
    keys = ('bytes_kept', 'peak_bytes')
    width = 0.8 / len(modes)
    for index, (mode, row) in enumerate(modes.items()):
        container = bars.bar([place + index * width for place in range(2)],
                             [row[key] / MIB for key in keys],
                             width,
                             label=mode)
        bars.bar_label(container, fmt='%.0f')
    bars.set(ylabel='MiB', title='Memory of a training step')
    bars.set_xticks([place + width * (len(modes) - 1) / 2
                     for place in range(2)],
                    labels=['kept for backward', 'peak'])
    bars.legend()
    figure.savefig(path, dpi=120)


def draw_boxes(axes, boxes, **style) -> None:
    """Draw boxes into a picture.

    Args:
        axes (matplotlib.axes.Axes): Where to draw.
        boxes (Tensor): Shape (N, 4), left, top, right and bottom edge.
        **style: Properties of :class:`matplotlib.patches.Rectangle`.
    """
    for left, top, right, bottom in boxes.tolist():
        axes.add_patch(
            Rectangle((left, top),
                      right - left,
                      bottom - top,
                      fill=False,
                      linewidth=1.5,
                      **style))


def draw_sample(sample, path: Path) -> None:
    """Draw one validation image with its annotations and detections.

    Args:
        sample (DetDataSample): What the detector returned for it.
        path (Path): The picture to write.
    """
    image = mmcv.imread(sample.img_path, channel_order='rgb')
    height, width = image.shape[:2]
    figure = Figure(
        figsize=(width / 40, height / 80 + 0.5), layout='constrained')
    truth, found = figure.subplots(1, 2)
    for axes in (truth, found):
        axes.imshow(image)
        axes.axis('off')
    draw_boxes(truth, sample.gt_instances.bboxes, edgecolor='yellow')
    draw_boxes(
        truth,
        sample.ignored_instances.bboxes,
        edgecolor='yellow',
        linestyle=':')
    truth.set_title('annotated (dotted: cut, not evaluated)', fontsize=9)
    detections = sample.pred_instances
    detections = detections[detections.scores >= MIN_SCORE]
    draw_boxes(found, detections.bboxes, edgecolor='cyan')
    found.set_title(f'found, score at least {MIN_SCORE}', fontsize=9)
    figure.savefig(path, dpi=120)


def draw_detections(config: Config, checkpoint: Path, folder: Path) -> None:
    """Run a checkpoint on the validation images and draw the result.

    Args:
        config (Config): Its config.
        checkpoint (Path): The checkpoint; it is loaded into a stock model.
        folder (Path): For the pictures, one an image.
    """
    init_default_scope('mmdet')
    allow_mmengine_checkpoints()
    model = MODELS.build(config.model).to(get_device()).eval()
    load_checkpoint(model, str(checkpoint), map_location='cpu', strict=True)
    loader = config.val_dataloader.to_dict()
    loader.update(num_workers=0, persistent_workers=False)
    folder.mkdir(parents=True, exist_ok=True)
    for batch in track(Runner.build_dataloader(loader), 'Draw'):
        for sample in model.test_step(batch):
            name = Path(sample.img_path).name
            draw_sample(sample.cpu(), folder / name)


def compare(configs: dict) -> dict:
    """Bring together what the finished runs and a measurement say.

    Args:
        configs (dict): The config of each mode.

    Returns:
        dict: ``modes``, a row of figures for each, and ``loss_difference``.
    """
    measured = measure(configs)
    runs = {mode: read_scalars(WORK_DIR / mode.lower()) for mode in configs}
    modes = {}
    for mode, run in runs.items():
        record = json.loads((WORK_DIR / mode.lower() / 'run.json').read_text())
        modes[mode] = dict(
            mAP=run['mAP'],
            AP50=run['AP50'],
            **measured[mode],
            peak_rss=record['peak_rss'],
            run_seconds=record['seconds'],
            logged_seconds=statistics.median(run['seconds']))
    losses = {mode: run['losses'] for mode, run in runs.items()}
    plot_comparison(losses, modes, WORK_DIR / 'comparison.png')
    draw_detections(configs['Tune'],
                    final_checkpoint(WORK_DIR / 'tune', configs['Tune']),
                    WORK_DIR / 'detections')
    return dict(
        modes=modes,
        loss_difference=loss_differences(losses['Tune'], losses['Eval']))


def main() -> None:
    # Threads that wait for work leave the processor to other processes.
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    # MMEngine tells every parameter's learning rate as a matter of course.
    MMLogger.get_instance('demo', log_level='WARNING')
    run_tool('misc/download_dataset.py', '--dataset-name', 'trees')
    if not WEIGHTS.is_file():
        run_tool('model_converters/mobilenet_v2_to_mmdet.py', '--dst',
                 str(WEIGHTS))

    configs = {mode: Config.fromfile(path) for mode, path in MODES.items()}
    table = WORK_DIR / 'table.json'
    for mode, path in MODES.items():
        run_dir = WORK_DIR / mode.lower()
        if is_finished(run_dir, configs[mode]):
            print(f'{mode}: {run_dir} holds a finished run of this config')
        else:
            table.unlink(missing_ok=True)
            train(mode, path, run_dir)
    if not table.is_file():
        table.write_text(json.dumps(compare(configs), indent=2))
    Console().print(make_table(json.loads(table.read_text())))
    print(f'{WORK_DIR} holds table.json, comparison.png and the '
          'pictures in detections/')


if __name__ == '__main__':
    main()
