"""How well a detector of trees learns in each of the paper's modes."""
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import demo
import launch
import torch
from matplotlib.figure import Figure
from mmengine.config import Config

from reproductions.material import fetch_trees, fetch_weights, in_processes
from reproductions.page import (
    Difference,
    Page,
    by,
    cell,
    drawing,
    mean_spread,
    table,
)

NORM_TRAINS = {'model.backbone.norm_eval': False}
NOT_PRETRAINED = {'model.backbone.init_cfg': None}
OTHER_THREADS = 'Eval, two threads'
# The config of the demo that a mode starts from, and what it changes there.
MODES: dict[str, tuple[str, Mapping[str, Any]]] = {
    'Train': ('Eval', NORM_TRAINS),
    'Eval': ('Eval', {}),
    'Tune': ('Tune', {'efficient_conv_bn_eval.activations': False}),
    'Deploy': ('Tune', {'efficient_conv_bn_eval.mode': 'Deploy'}),
    'Train, from scratch': ('Eval', NORM_TRAINS | NOT_PRETRAINED),
    'Eval, from scratch': ('Eval', NOT_PRETRAINED),
}
# Below this mAP, detections are about as good as none.
LEARNS_NOTHING = 0.03
# With what each mode is compared.
PAIRS = (('Tune', 'Eval'), ('Deploy', 'Eval'), ('Train', 'Eval'),
         ('Train, from scratch', 'Train'),
         ('Eval, from scratch', 'Train, from scratch'))


def load_config(mode: str, seed: int) -> Config:
    """Make the config of a run.

    The seed is that of the head, of batches and of how images are flipped.
    """
    base, changes = MODES.get(mode, MODES['Eval'])
    config = Config.fromfile(demo.MODES[base])
    config.merge_from_dict({
        **changes, 'randomness.seed': seed, 'log_level': 'WARNING'
    })
    return config


def train(mode: str, seed: int) -> dict[str, Any]:
    """Train as ``tools/train.py`` does, and read what it logs."""
    torch.set_num_threads(2 if mode == OTHER_THREADS else 1)
    config = load_config(mode, seed)
    with tempfile.TemporaryDirectory() as folder:
        config.work_dir = folder
        # A process has one visualizer of a name, which has one folder.
        config.visualizer.name = folder
        launch.build_runner(config).train()
        scalars = demo.read_scalars(Path(folder))
    losses = [loss if math.isfinite(loss) else None
              for loss in scalars['losses']]
    return dict(mode=mode, seed=seed, mAP=scalars['mAP'],
                AP50=scalars['AP50'], losses=losses)


def run(modes: Sequence[str] = tuple(MODES),
        seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """Train in each mode from each seed.

    One more run of Eval, with another thread count, shows what rounding
    alone does.

    Args:
        modes (Sequence[str]): Names from :data:`MODES`, ``'Eval'`` and
            ``'Tune'`` among them.
        seeds (Sequence[int]): For each mode.

    Returns:
        dict[str, Any]: ``iterations`` of a run; ``runs``, with ``mode``,
        ``seed``, ``mAP``, ``AP50`` and the ``losses`` of all iterations,
        None where one is not finite.
    """
    plan = [(mode, seed) for seed in seeds for mode in modes]
    plan.append((OTHER_THREADS, seeds[0]))
    fetch_trees()
    fetch_weights()
    return dict(
        iterations=load_config(*plan[0]).train_cfg.max_iters,
        runs=in_processes(train, plan, 'Train'))


Runs = Sequence[dict[str, Any]]


def group(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """Sort runs by modes, without the one that has another thread count."""
    return by('mode', [run for run in runs if run['mode'] != OTHER_THREADS])


def final_loss(losses: Sequence[float | None]) -> float | None:
    """Average the last tenth of a loss curve; None where one is not finite."""
    last = losses[-math.ceil(len(losses) / 10):]
    return None if None in last else statistics.mean(last)


def loss_text(runs: Runs) -> str:
    """Write the final losses of a mode."""
    losses = [final_loss(run['losses']) for run in runs]
    if None in losses:
        return f'not finite in {losses.count(None)} runs'
    return mean_spread(losses)


def compare(by_mode: Mapping[str, Runs], mode: str, other: str) -> Difference:
    """Compare the mAP of two modes, seed by seed."""
    return Difference.of(*([run['mAP'] for run in by_mode[name]]
                           for name in (mode, other)))


def loss_differences(runs: Runs) -> dict[str, dict[str, float]]:
    """Compare loss curves that rounding tells apart, and those of seeds.

    By :func:`demo.loss_differences`; not where a loss is not finite.
    """
    losses = {(run['mode'], run['seed']): run['losses'] for run in runs}
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


def rounding_ratio(runs: Runs) -> float:
    """Compare how far Tune and thread counts bring runs apart.

    Returns:
        float: Tune's distance from Eval, the median over seeds, by that of
        Eval from itself; not a number where losses are not finite.
    """
    found = loss_differences(runs)
    tune = [row['all'] for name, row in found.items() if 'Tune' in name]
    threads = [row['all'] for name, row in found.items() if 'thread' in name]
    if not tune or not threads:
        return math.nan
    return statistics.median(tune) / threads[0] if threads[0] else math.inf


def figures(found: dict[str, Any]) -> dict[str, object]:
    """Write what the page shows."""
    runs = found['runs']
    by_mode = group(runs)
    maps = {mode: [run['mAP'] for run in part]
            for mode, part in by_mode.items()}
    threads = next(run for run in runs if run['mode'] == OTHER_THREADS)
    pairs = {pair: compare(by_mode, *pair) for pair in PAIRS
             if {*pair} <= by_mode.keys()}
    return {
        'seeds': len(by_mode['Eval']),
        'iterations': found['iterations'],
        'reached': ', '.join(
            f'{mean_spread(maps[mode])} in {mode}'
            for mode in ('Eval', 'Tune', 'Deploy', 'Train') if mode in maps),
        'modes': table(by_mode, {
            'mode': str,
            'mAP': lambda mode: mean_spread(maps[mode]),
            'AP50': lambda mode: mean_spread(
                [run['AP50'] for run in by_mode[mode]]),
            'loss': lambda mode: loss_text(by_mode[mode]),
            'mAP against Eval': lambda mode: '' if mode == 'Eval' else
            compare(by_mode, mode, 'Eval')
        }),
        'pairs': table(pairs, {
            'mode': cell('', 0),
            'against': cell('', 1),
            'difference of mAP': pairs.get,
            'more than chance explains': lambda pair:
            'yes' if pairs[pair].is_certain else 'not known'
        }),
        'losses': table(loss_differences(runs).items(), {
            'runs': cell('', 0),
            'first iteration': cell('.1e', 1, 'first'),
            'first ten': cell('.1e', 1, 'first_10'),
            'all': cell('.1e', 1, 'all')
        }),
        'rounding': f'{rounding_ratio(runs):.2g}',
        # Of the first seed, as is the run with other threads.
        'threads': f'{threads["mAP"] - maps["Eval"][0]:+.3f}',
        'spreads': ', '.join(f'{max(values) - min(values):.3f} in {mode}'
                             for mode, values in maps.items())
    }


def claims(found: dict[str, Any]) -> dict[str, bool]:
    """Tell what the page says, and whether it is so."""
    runs = found['runs']
    by_mode = group(runs)
    if by_mode.keys() != MODES.keys():
        return {'all modes were run': False}

    def is_less(mode: str, other: str) -> bool:
        difference = compare(by_mode, mode, other)
        return difference.is_certain and difference.mean < 0

    return {
        'all losses are finite':
        not any(None in run['losses'] for run in runs),
        'these runs cannot tell Tune, nor Deploy, from Eval':
        not any(compare(by_mode, mode, 'Eval').is_certain
                for mode in ('Tune', 'Deploy')),
        'Train reaches less than Eval': is_less('Train', 'Eval'),
        'Train from scratch reaches less than Train':
        is_less('Train, from scratch', 'Train'),
        'neither mode learns to detect from scratch':
        all(statistics.mean(run['mAP'] for run in by_mode[mode])
            < LEARNS_NOTHING for mode in by_mode if 'scratch' in mode),
        'Tune leaves Eval about as thread counts bring it apart from itself':
        1 / 3 <= rounding_ratio(runs) <= 3
    }


@drawing(5.5)
def plot(found: dict[str, Any], figure: Figure) -> None:
    """Draw losses, their differences, and accuracies."""
    axes = figure.subplot_mosaic('lm;dm')
    seed = found['runs'][0]['seed']
    losses = {
        run['mode']: [math.nan if loss is None else loss
                      for loss in run['losses']]
        for run in found['runs'] if run['seed'] == seed
    }
    steps = range(1, found['iterations'] + 1)
    for mode, style in (('Eval', '-'), ('Tune', '--')):
        axes['l'].plot(steps, losses[mode], style, linewidth=1, label=mode)
    axes['l'].set(ylabel='loss', title=f'Training loss, seed {seed}')
    axes['l'].legend()
    for mode in ('Tune', OTHER_THREADS):
        apart = [abs(a - b) for a, b in zip(losses[mode], losses['Eval'])]
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


PAGE = Page(run, figures, claims, plot)
