"""How well a detector of trees learns in each of the paper's modes."""
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import demo
from matplotlib.figure import Figure
from mmengine.config import Config
from rich.progress import Progress

from mmtune.analysis.machine import describe_commit
from reproductions.material import fetch_trees, fetch_weights
from reproductions.pages import (
    CONFIDENCE,
    difference_text,
    difference_verdict,
    mean_spread,
    paired_difference,
    paragraph,
    table,
)

TITLE = 'Accuracy on the trees'
OF_PAPER = 'Table 4, mAP'
QUESTION = paragraph("""
    The paper fine-tunes detectors in Tune mode to the accuracy that Eval mode
    reaches (Table 4: mAP differs by at most 0.003), calls Deploy unstable to
    train, and Train the only mode for training from scratch. Is that so for a
    real transfer run that two CPU cores finish in minutes?
    """)

# Relative to the folder that this is started in, as are the configs' paths.
WORK_DIR = Path('work_dirs/reproduce/accuracy')

NORM_TRAINS = {'model.backbone.norm_eval': False}
NOT_PRETRAINED = {'model.backbone.init_cfg': None}
# The config of the demo that a mode starts from, and what it changes there.
MODES: dict[str, tuple[str, Mapping[str, Any]]] = {
    'Train': ('Eval', NORM_TRAINS),
    'Eval': ('Eval', {}),
    'Tune': ('Tune', {
        'efficient_conv_bn_eval.activations': False
    }),
    'Deploy': ('Tune', {
        'efficient_conv_bn_eval.mode': 'Deploy'
    }),
    'Train, from scratch': ('Eval', NORM_TRAINS | NOT_PRETRAINED),
    'Eval, from scratch': ('Eval', NOT_PRETRAINED),
}
OTHER_THREADS = 'Eval, two threads'
# Below this mAP, detections are about as good as none.
LEARNS_NOTHING = 0.03
# With what a mode is compared, and what the paper says of it.
CLAIMS = {
    'Tune': ('Eval', 'In the paper mAP differs by at most 0.003, on COCO.'),
    'Deploy': ('Eval', 'The paper calls it unstable to train; '
               '[mechanism.md](mechanism.md) looks for when it is.'),
    'Train': ('Eval', 'The paper counts most configs of detectors that are '
              'fine-tuned as running in Eval.'),
    'Train, from scratch': ('Train', 'This is what the ImageNet weights are '
                            'worth by this recipe.'),
    'Eval, from scratch': ('Train, from scratch', 'The paper calls Train the '
                           'only way from scratch.'),
}


@dataclass(frozen=True)
class Training:
    """One run of ``tools/train.py``.

    Attributes:
        mode (str): What it is called on the page.
        seed (int): Of the run.
        config (Path): Of the run.
        options (Mapping[str, Any]): What is changed in the config.
        threads (int): That torch computes with.
    """

    mode: str
    seed: int
    config: Path
    options: Mapping[str, Any]
    threads: int = 1

    @property
    def name(self) -> str:
        """What messages call it."""
        return f'{self.mode}, seed {self.seed}'

    @property
    def folder(self) -> Path:
        """Its work dir."""
        return WORK_DIR / self.name.lower().replace(', ', '_').replace(
            ' ', '-')

    def load_config(self) -> Config:
        """Make the config that ``tools/train.py`` will run.

        Returns:
            Config: With the options applied.
        """
        config = Config.fromfile(self.config)
        config.merge_from_dict(dict(self.options))
        return config

    def start(self) -> subprocess.Popen:
        """Start training, in a process of its own.

        Returns:
            subprocess.Popen: Its output is text, errors included.
        """
        command = [
            sys.executable, '-u',
            str(demo.TOOLS / 'train.py'),
            str(self.config), '--work-dir',
            str(self.folder), '--cfg-options',
            *(f'{key}={value}' for key, value in self.options.items())
        ]
        return subprocess.Popen(
            command,
            env=os.environ | dict(OMP_NUM_THREADS=str(self.threads)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace')


def list_trainings(modes: Sequence[str],
                   seeds: Sequence[int]) -> list[Training]:
    """List the runs that the page needs.

    Args:
        modes (Sequence[str]): Names from :data:`MODES`, ``'Eval'`` and
            ``'Tune'`` among them.
        seeds (Sequence[int]): For each mode.

    Returns:
        list[Training]: The runs, and one of Eval with another thread count,
        which shows what rounding alone does.

    Raises:
        ValueError: If a mode is unknown, or Eval or Tune is missing.
    """
    unknown = set(modes) - set(MODES)
    if unknown or not {'Eval', 'Tune'} <= set(modes):
        raise ValueError('`modes` must hold Eval, Tune and any of '
                         f'{", ".join(MODES)}, but got {list(modes)!r}')
    trainings = [
        Training(mode, seed, demo.MODES[MODES[mode][0]],
                 MODES[mode][1] | {'randomness.seed': seed})
        for seed in seeds for mode in modes
    ]
    first = {'randomness.seed': seeds[0]}
    return trainings + [
        Training(
            OTHER_THREADS, seeds[0], demo.MODES['Eval'], first, threads=2)
    ]


class Trainer:
    """Trains several at a time, and shows how far they are.

    Args:
        trainings (Sequence[Training]): What to train.
    """

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.progress = Progress()
        # Not in the threads: MMEngine's reader of configs is not made for it.
        self.jobs = [(t, t.load_config()) for t in trainings]
        total = sum(config.train_cfg.max_iters for _, config in self.jobs)
        self.task = self.progress.add_task('Train', total=total)
        self.commit = describe_commit(demo.TOOLS)
        self.processes: set[subprocess.Popen] = set()
        self.stopped = threading.Event()

    def run(self) -> None:
        """Train all, as many at a time as there are processors.

        Raises:
            RuntimeError: If one fails. The others are stopped, and what they
                have not finished is lost.
        """
        with self.progress, ThreadPoolExecutor(os.cpu_count()) as pool:
            futures = [pool.submit(self.train, *job) for job in self.jobs]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.processes):
                    process.kill()
                raise

    def train(self, training: Training, config: Config) -> None:
        """Train one, unless this very code has completed it.

        Args:
            training (Training): What to train.
            config (Config): Its config.

        Raises:
            RuntimeError: If it fails.
        """
        if self.is_finished(training, config):
            self.progress.advance(self.task, config.train_cfg.max_iters)
            return
        shutil.rmtree(training.folder, ignore_errors=True)
        process = training.start()
        self.processes.add(process)
        if self.stopped.is_set():
            process.kill()
        output = []
        for line in process.stdout:
            output.append(line)
            if re.search(r'Iter\(train\) \[', line):
                self.progress.advance(self.task)
        if process.wait() != 0:
            end = ''.join(output[-40:])
            raise RuntimeError(f'training of {training.name} failed with '
                               f'status {process.returncode}:\n{end}')
        # Written last: a run without it was interrupted.
        (training.folder / 'run.json').write_text(
            json.dumps(dict(config=config.pretty_text, commit=self.commit)))
        self.progress.console.print(f'{training.name}: finished')

    def is_finished(self, training: Training, config: Config) -> bool:
        """Tell whether a run need not be repeated.

        Args:
            training (Training): What to train.
            config (Config): Its config.

        Returns:
            bool: Whether it was completed, at the same commit.
        """
        if not demo.is_finished(training.folder, config):
            return False
        record = json.loads((training.folder / 'run.json').read_text())
        # Nobody knows what is in a changed tree.
        known = self.commit and not self.commit.endswith('-dirty')
        return bool(known) and record.get('commit') == self.commit


def run(modes: Sequence[str] = tuple(MODES),
        seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """Train in each mode from each seed; this commit's runs are reused.

    Args:
        modes (Sequence[str]): Names from :data:`MODES`, ``'Eval'`` and
            ``'Tune'`` among them.
        seeds (Sequence[int]): For each mode.

    Returns:
        dict[str, Any]: ``iterations`` of a run; ``runs``, with ``mode``,
        ``seed``, ``mAP``, ``AP50`` and the ``losses`` of all iterations,
        None where one is not finite.

    Raises:
        ValueError: See :func:`list_trainings`.
        RuntimeError: If a run fails.
    """
    trainings = list_trainings(modes, seeds)
    fetch_trees()
    fetch_weights()
    Trainer(trainings).run()
    return dict(
        iterations=trainings[0].load_config().train_cfg.max_iters,
        runs=[
            dict(mode=training.mode, seed=training.seed, **read(training))
            for training in trainings
        ])


def read(training: Training) -> dict[str, Any]:
    """Read what a finished run has logged.

    Args:
        training (Training): The run.

    Returns:
        dict[str, Any]: ``mAP``, ``AP50`` and ``losses``.
    """
    scalars = demo.read_scalars(training.folder)
    return dict(
        mAP=scalars['mAP'],
        AP50=scalars['AP50'],
        losses=[
            loss if math.isfinite(loss) else None
            for loss in scalars['losses']
        ])


def answer(found: dict[str, Any]) -> str:
    """Say in a sentence what came out."""
    by_mode = group(found['runs'])
    reached = ', '.join(
        f'{mean_spread([run["mAP"] for run in by_mode[mode]])} in {mode}'
        for mode in ('Eval', 'Tune', 'Deploy', 'Train') if mode in by_mode)
    return f'mAP over {len(by_mode["Eval"])} seeds: {reached}.'


def page(found: dict[str, Any]) -> str:
    """Describe what came out."""
    by_mode = group(found['runs'])
    seeds = len(by_mode['Eval'])
    missing = ''.join(f'"{mode}", which the command runs by now. '
                      for mode in MODES if mode not in by_mode)
    parts = [
        paragraph(f"""
        RetinaNet with MobileNetV2 on the
        [images of trees](../../../configs/trees/README.md),
        {found['iterations']} iterations of batches of two, {seeds}
        seed{'s' * (seeds > 1)} a mode. The modes differ in the backbone alone,
        whose BatchNorms are all there are; the neck and the head have
        GroupNorm. A seed stands for the same initial head and the same
        batches in every mode. "From scratch" leaves the ImageNet weights out
        and changes nothing else, not even that the backbone learns at a tenth
        of the learning rate. What becomes of Eval from scratch, where the
        BatchNorms never normalize, is on the page [scratch](scratch.md), too.
        """),
        accuracy_table(by_mode),
        paragraph(f"""
        Mean and sample standard deviation over the seeds. The loss is the
        mean of the last tenth of the iterations. Differences are means over
        the seeds; in brackets their {CONFIDENCE:.0%} confidence interval
        (paired t-test), which is wide with few seeds.
        """), *map(paragraph, verdicts(by_mode)), '## Loss curves',
        difference_table(found['runs']),
        paragraph("""
        The largest absolute difference of the losses. Tune and Eval compute
        the same in another order, as do one thread and two; another seed is
        another head and other batches.
        """),
        paragraph(rounding_verdict(found['runs'])), '## Not run here',
        paragraph(f"""
        {missing}COCO, on which the paper's Table 4 rests: its rows are in
        [table4.md](table4.md). Other learning rates for other modes: all
        modes have the settings that were chosen for Eval and Tune
        ([mechanism.md](mechanism.md) sweeps the learning rate). The
        validation tile is small, and not quite unseen, as the README of the
        configs says: take the absolute accuracy as optimistic.
        """)
    ]
    return '\n\n'.join(parts)


def group(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Sort runs by their modes.

    Returns:
        dict[str, list[dict[str, Any]]]: Without the run that has another
        thread count.
    """
    modes = dict.fromkeys(run['mode'] for run in runs)
    return {
        mode: [run for run in runs if run['mode'] == mode]
        for mode in modes if mode != OTHER_THREADS
    }


def final_loss(losses: Sequence[float | None]) -> float | None:
    """Average the last tenth of a loss curve.

    Args:
        losses (Sequence[float | None]): One an iteration.

    Returns:
        float | None: The mean; None where one of them is not finite.
    """
    last = [
        loss for loss in losses[-math.ceil(len(losses) / 10):]
        if loss is not None
    ]
    whole = len(last) == math.ceil(len(losses) / 10)
    return statistics.mean(last) if whole else None


def accuracy_table(by_mode: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Lay out what each mode reaches."""
    rows = []
    for mode, runs in by_mode.items():
        losses = [final_loss(run['losses']) for run in runs]
        finite = [loss for loss in losses if loss is not None]
        loss = mean_spread(finite) if len(finite) == len(
            losses) else f'not finite in {len(losses) - len(finite)} runs'
        against = difference_text(*compare(by_mode, mode, 'Eval'))
        rows.append([
            mode,
            mean_spread([run['mAP'] for run in runs]),
            mean_spread([run['AP50'] for run in runs]), loss,
            '' if mode == 'Eval' else against
        ])
    return table(['mode', 'mAP', 'AP50', 'loss', 'mAP against Eval'], rows)


def compare(by_mode: Mapping[str, Sequence[dict[str, Any]]], mode: str,
            other: str) -> tuple[float, tuple[float, float] | None]:
    """Compare the mAP of two modes, seed by seed.

    Args:
        by_mode (Mapping[str, Sequence[dict[str, Any]]]): From
            :func:`group`.
        mode (str): One of them.
        other (str): What it is compared with.

    Returns:
        tuple[float, tuple[float, float] | None]: See
        :func:`reproductions.pages.paired_difference`.
    """
    return paired_difference(*([run['mAP'] for run in by_mode[name]]
                               for name in (mode, other)))


def verdicts(by_mode: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Say what the accuracies mean for the paper's claims.

    Args:
        by_mode (Mapping[str, Sequence[dict[str, Any]]]): From
            :func:`group`.

    Returns:
        list[str]: A paragraph for each pair of modes that was run.
    """
    texts = []
    for mode, (other, claim) in CLAIMS.items():
        if not {mode, other} <= by_mode.keys():
            continue
        mean, interval = compare(by_mode, mode, other)
        text = (f'**{mode}** against {other}: '
                f'{difference_text(mean, interval)} mAP, '
                f'{difference_verdict(interval)}. {claim}')
        reached = [statistics.mean(run['mAP'] for run in by_mode[name])
                   for name in (mode, other)]
        if max(reached) < LEARNS_NOTHING:
            text += (
                f' Neither learns to detect in these iterations (mAP '
                f'{reached[0]:.3f} and {reached[1]:.3f}), so that this does '
                'not test it; [scratch.md](scratch.md) does, on digits.')
        texts.append(text)
    return texts


def losses_of(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list]:
    """Look up loss curves.

    Returns:
        dict[tuple[str, int], list]: By mode and seed.
    """
    return {(run['mode'], run['seed']): run['losses'] for run in runs}


def loss_differences(
        runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Compare loss curves that rounding tells apart, and those of seeds.

    Returns:
        dict[str, dict[str, float]]: For each pair what
        :func:`demo.loss_differences` finds; not for runs in which a loss is
        not finite.
    """
    losses = losses_of(runs)
    seeds = [seed for mode, seed in losses if mode == 'Eval']
    pairs = {
        f'Tune, Eval: seed {seed}': (('Tune', seed), ('Eval', seed))
        for seed in seeds
    }
    pairs[f'Eval, one thread and two: seed {seeds[0]}'] = (
        ('Eval', seeds[0]), (OTHER_THREADS, seeds[0]))
    for one, two in combinations(seeds, 2):
        pairs[f'Eval: seeds {one}, {two}'] = ('Eval', one), ('Eval', two)
    return {
        name: demo.loss_differences(losses[a], losses[b])
        for name, (a, b) in pairs.items()
        if None not in losses[a] + losses[b]
    }


def difference_table(runs: Sequence[dict[str, Any]]) -> str:
    """Lay out how far loss curves lie apart."""
    return table(
        ['runs', 'first iteration', 'first ten', 'all'],
        [[name, *(f'{row[key]:.1e}' for key in ('first', 'first_10', 'all'))]
         for name, row in loss_differences(runs).items()])


def rounding_verdict(runs: Sequence[dict[str, Any]]) -> str:
    """Say whether Tune leaves Eval as rounding lets Eval leave itself."""
    found = loss_differences(runs)
    tune = [row['all'] for name, row in found.items() if 'Tune' in name]
    threads = [row['all'] for name, row in found.items() if 'thread' in name]
    if not tune or not threads:
        return 'Losses that are not finite cannot be compared.'
    ratio = statistics.median(tune) / threads[0] if threads[0] else math.inf
    if ratio < 1 / 3:
        size = 'less far apart than'
    elif ratio <= 3:
        size = 'about as far apart as'
    else:
        size = 'farther apart than'
    maps = {(run['mode'], run['seed']): run['mAP'] for run in runs}
    seed = next(seed for mode, seed in maps if mode == OTHER_THREADS)
    alone = maps[OTHER_THREADS, seed] - maps['Eval', seed]
    by_mode = group(runs)
    spreads = {
        mode: max(values) - min(values)
        for mode, values in ((mode, [run['mAP'] for run in by_mode[mode]])
                             for mode in by_mode)
    }
    by_spread = ', '.join(f'{spread:.3f} in {mode}'
                          for mode, spread in spreads.items())
    return (f'Over the run, Tune and Eval come {size} Eval and itself with '
            f'another thread count ({ratio:.2g} times, by the median of the '
            'seeds). The thread count alone changes mAP by '
            f'{alone:+.3f}, the seed by up to {by_spread}: no single run can '
            'rank two modes closer than that.')


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot losses, their differences, and accuracies."""
    figure = Figure(figsize=(8, 5.5), layout='constrained')
    axes = figure.subplot_mosaic('lm;dm')
    losses = losses_of(found['runs'])
    seed = found['runs'][0]['seed']
    nan_losses = {
        key: [math.nan if loss is None else loss for loss in curve]
        for key, curve in losses.items()
    }
    steps = range(1, found['iterations'] + 1)
    for mode, style in (('Eval', '-'), ('Tune', '--')):
        axes['l'].plot(
            steps, nan_losses[mode, seed], style, linewidth=1, label=mode)
    axes['l'].set(ylabel='loss', title=f'Training loss, seed {seed}')
    axes['l'].legend()
    for mode in ('Tune', OTHER_THREADS):
        apart = [
            abs(a - b)
            for a, b in zip(nan_losses[mode, seed], nan_losses['Eval', seed])
        ]
        axes['d'].semilogy(steps, apart, linewidth=1, label=mode)
    axes['d'].set(xlabel='iteration', title='Difference to Eval')
    axes['d'].legend()
    by_mode = group(found['runs'])
    for place, runs in enumerate(by_mode.values()):
        values = [run['mAP'] for run in runs]
        axes['m'].plot(values, [place] * len(values), 'o', alpha=0.6)
        axes['m'].plot(statistics.mean(values), place, 'k|', markersize=16)
    axes['m'].set_yticks(range(len(by_mode)), by_mode)
    axes['m'].invert_yaxis()
    axes['m'].set(xlabel='mAP', xlim=(0, None), title='A dot a seed, | mean')
    figure.savefig(path, dpi=120)
