"""Measure what activations that keep one feature map spare.

What forwards of four backbones and of a chain of blocks keep for backward,
the time of a step, and the peak of a step of two detectors. Bytes are counted,
times are taken in rounds, each mode once a round::

    python tests/benchmarks/activations.py --json docs/en/activations.json

``python docs/render.py`` then writes the tables of docs/en/activations.md.
"""
import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger
from torch import nn

from mmtune import turn_on
from mmtune.analysis import saved_bytes
from mmtune.analysis.machine import describe_commit, describe_machine
from mmtune.analysis.modes import (
    PAPERS_TUNE,
    put_in_mode,
    randomize_new_norms,
)
from mmtune.analysis.sources import build_model, load_config
from mmtune.analysis.steps import Step
from mmtune.analysis.timing import interleaved_seconds, quartiles
from mmtune.analysis.workloads import detection_workload, image_workload
from mmtune.behaviours.activation import activation_runs

ROOT = Path(__file__).resolve().parents[2]
# Columns of the table; 'Train' is stock, with BatchNorms in train mode.
MODES = ('Eval', 'Deploy', PAPERS_TUNE, 'Tune')
TRAINING_MODES = ('Train', 'Tune, BN trains')


class Network(NamedTuple):
    """A backbone, and the most that it should keep.

    Attributes:
        config (dict): Of the backbone.
        of_eval (float): Aim: Tune's share of what Eval keeps.
        of_train (float): Aim: the same of Train, BatchNorms in train mode.
        of_deploy (float, optional): Aim: the same of Deploy.
    """

    config: dict[str, Any]
    of_eval: float
    of_train: float
    of_deploy: float | None = None


NETWORKS = {
    'MobileNetV2 (ReLU6)': Network(
        dict(type='MobileNetV2', out_indices=(2, 4, 6)), .38, .71, .60),
    'CSPDarknet-S (Swish)': Network(
        dict(type='CSPDarknet', deepen_factor=.33, widen_factor=.5), .40, .60,
        .60),
    'CSPNeXt-S (SiLU, channel attention)': Network(
        dict(
            type='CSPNeXt', deepen_factor=.33, widen_factor=.5,
            channel_attention=True, norm_cfg=dict(type='BN'),
            act_cfg=dict(type='SiLU', inplace=True)), .49, .76),
    'EfficientNet-B3 (Swish, squeeze and excitation)': Network(
        dict(
            type='EfficientNet', arch='b3', drop_path_rate=0.,
            out_indices=(3, 4, 5), norm_cfg=dict(type='BN')), .49, .72),
}
# The most that a step with these may take of one with stock activations.
SLOWEST = 1.03


class Detector(NamedTuple):
    """A detector whose BatchNorms train, and the least to spare.

    Attributes:
        config (str): Of the detector.
        saved (float): Aim: the share of a step's peak that falls away.
    """

    config: str
    saved: float


DETECTORS = {
    'RTMDet-tiny': Detector(
        'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', .15),
    'YOLOX-tiny': Detector('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', .25),
}


def backbone(config: dict[str, Any]) -> nn.Module:
    """Build a backbone with random weights and statistics that matter."""
    register_all_modules()
    torch.manual_seed(0)
    model = MODELS.build(config)
    randomize_new_norms(model)
    return model


def chain(blocks: int = 8, channels: int = 64) -> nn.Module:
    """Chain blocks of a convolution, a BatchNorm and a SiLU."""
    torch.manual_seed(0)
    model = nn.Sequential(*[
        nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels), nn.SiLU()) for _ in range(blocks)
    ])
    randomize_new_norms(model)
    return model


def in_mode(stock: nn.Module, mode: str) -> nn.Module:
    """Put a copy of a stock model into a mode.

    Args:
        stock (nn.Module): The model.
        mode (str): One of :data:`MODES` or :data:`TRAINING_MODES`.

    Returns:
        nn.Module: The copy.
    """
    model = copy.deepcopy(stock)
    if mode in TRAINING_MODES:
        put_in_mode(model, 'Train')
        if mode != 'Train':
            turn_on(model)
    else:
        put_in_mode(model, mode)
    return model


def kept(model: nn.Module, x: torch.Tensor) -> int:
    """Count the bytes that a forward keeps for backward."""
    with saved_bytes(model) as saved:
        # What is kept lives as long as the outputs do.
        _outputs = model(x)
        return saved.total


def time_ratio(stock: nn.Module, step_of: Callable[[nn.Module], Callable],
               rounds: int) -> tuple[float, float, float]:
    """Time Tune mode against Tune mode with stock activations.

    Args:
        stock (nn.Module): The model.
        step_of (Callable): Makes a step of a model.
        rounds (int): How often to time each.

    Returns:
        tuple[float, float, float]: Quartiles of the ratio.
    """
    steps = {mode: step_of(in_mode(stock, mode))
             for mode in (PAPERS_TUNE, 'Tune')}
    return quartiles(
        seconds['Tune'] / seconds[PAPERS_TUNE]
        for seconds in interleaved_seconds(steps, rounds, at_least=.2))


def measure_network(name: str, image: tuple[int, int], rounds: int) -> dict:
    """Measure a backbone.

    Args:
        name (str): Of :data:`NETWORKS`.
        image (tuple[int, int]): Height and width, in pixels.
        rounds (int): How often to time a step.

    Returns:
        dict: Bytes ``kept`` by mode, quartiles of the ``time`` of a step as a
        share of that with stock activations, and how the activations
        ``ran``.
    """
    stock = backbone(NETWORKS[name].config)
    x = torch.randn(1, 3, *image)
    tuned = in_mode(stock, 'Tune')
    tuned(x)
    ran = list(activation_runs(tuned).values())
    return dict(
        name=name,
        ran={how: ran.count(how) for how in dict.fromkeys(ran)},
        kept={
            mode: kept(in_mode(stock, mode), x)
            for mode in (*MODES, *TRAINING_MODES)
        },
        time=time_ratio(
            stock, lambda model: Step(model, image_workload(image, 2)).run,
            rounds))


def measure_chain(rounds: int, side: int = 64, channels: int = 64) -> dict:
    """Measure a chain of blocks, as :func:`measure_network` does."""
    stock = chain(channels=channels)
    x = torch.randn(2, channels, side, side)

    def step_of(model: nn.Module) -> Callable[[], None]:
        return lambda: model(x).square().mean().backward()

    return dict(
        kept={mode: kept(in_mode(stock, mode), x) for mode in MODES},
        time=time_ratio(stock, step_of, rounds))


def measure_detector(name: str, image: tuple[int, int]) -> dict:
    """Count the bytes of a step of a detector as its config trains it.

    Args:
        name (str): Of :data:`DETECTORS`.
        image (tuple[int, int]): Height and width, in pixels.

    Returns:
        dict: By mode (``'Train'`` is stock), what
        :class:`mmtune.analysis.steps.StepMemory` says; and the bytes of the
        ``gradients``, which are in the peak.
    """
    # MMEngine tells how every parameter was initialized.
    MMLogger.get_instance('activations', log_level='ERROR')
    config = load_config(DETECTORS[name].config)
    torch.manual_seed(0)
    stock = build_model(config)
    workload = detection_workload(config, stock, image, 2)
    steps = {}
    for mode in TRAINING_MODES:
        model = in_mode(stock, mode)
        steps[mode] = asdict(Step(model, workload).memory())
    gradients = sum(p.nbytes for p in stock.parameters() if p.requires_grad)
    return dict(name=name, gradients=gradients, steps=steps)


def measure(image: tuple[int, int], rounds: int,
            networks: Sequence[str] = tuple(NETWORKS),
            detectors: Sequence[str] = tuple(DETECTORS)) -> dict:
    """Measure all.

    Args:
        image (tuple[int, int]): Height and width, in pixels.
        rounds (int): How often to time each mode.
        networks (Sequence[str]): Of :data:`NETWORKS`. Defaults to all.
        detectors (Sequence[str]): Of :data:`DETECTORS`. Defaults to all.

    Returns:
        dict: Plain data: ``networks``, ``chain`` and ``detectors``.
    """
    return dict(
        image=image,
        rounds=rounds,
        networks=[measure_network(name, image, rounds) for name in networks],
        chain=measure_chain(rounds),
        detectors=[measure_detector(name, image) for name in detectors])


def aims() -> dict:
    """Say what should be reached, for the page.

    Returns:
        dict: The most of each ratio by network, the least saved by detector,
        and the ``slowest`` ratio of times.
    """
    return dict(
        networks={
            name: dict(
                of_eval=network.of_eval,
                of_deploy=network.of_deploy,
                of_train=network.of_train)
            for name, network in NETWORKS.items()
        },
        detectors={name: d.saved for name, d in DETECTORS.items()},
        slowest=SLOWEST)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--json', type=Path, required=True, metavar='FILE')
    parser.add_argument('--image', type=int, nargs=2, default=(320, 320),
                        metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--rounds', type=int, default=15)
    args = parser.parse_args(arguments)
    found = measure(tuple(args.image), args.rounds)
    described = dict(
        command='python tests/benchmarks/activations.py --json '
        'docs/en/activations.json',
        **describe_machine(),
        threads=torch.get_num_threads(),
        commit=describe_commit(ROOT),
        aims=aims(),
        found=found)
    args.json.write_text(json.dumps(described, indent=1) + '\n')


if __name__ == '__main__':
    main()
