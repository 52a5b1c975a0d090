"""Weights and images that several pages start from, and how they measure."""
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
from demo import WEIGHTS, run_tool
from finetune_digits import Classifier, load_data
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.progress import track
from torch import Tensor, nn

from mmtune.analysis import peak_bytes
from mmtune.analysis.modes import (
    PAPERS_TUNE,
    put_in_mode,
    randomize_new_norms,
)
from mmtune.analysis.sources import build_model, load_config
from mmtune.analysis.timing import interleaved_seconds
from mmtune.behaviours import convolution
from mmtune.report import Report
from reproductions.page import Item


def fetch_weights() -> str:
    """Fetch the ImageNet weights of MobileNetV2 where they are missing."""
    if not WEIGHTS.is_file():
        run_tool('model_converters/mobilenet_v2_to_mmdet.py', '--dst',
                 str(WEIGHTS))
    return str(WEIGHTS)


def fetch_trees() -> None:
    """Fetch the images of trees where they are missing."""
    run_tool('misc/download_dataset.py', '--dataset-name', 'trees')


def pretrained_classifier() -> nn.Module:
    """Build a classifier of digits, the same in every call.

    MobileNetV2 with ImageNet weights, and a linear layer that has learned
    nothing yet.
    """
    torch.manual_seed(0)
    model = Classifier(fetch_weights())
    model.init_weights()
    return model


def random_model(path: str, part: str | None = None
                 ) -> tuple[Config, nn.Module]:
    """Build the model of a config, with random weights and statistics.

    Or a ``part`` of it, such as its backbone, with nothing frozen.
    """
    register_all_modules(init_default_scope=False)
    # Some warn of how newer configs name arguments.
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        config = load_config(path)
        if part:
            config.model = config.model[part]
            config.pop('data_preprocessor', None)
            # By default none is.
            config.model.pop('frozen_stages', None)
        torch.manual_seed(0)
        model = build_model(config)
    randomize_new_norms(model)
    return config, model


def total(step: dict) -> int:
    """Give all bytes of a step, from those of a ``StepMemory``."""
    return step['peak'] + step['resident']


class Residual(nn.Module):
    """A basic block of a ResNet; strides in the first convolution.

    The shortcut is a convolution where the block strides, or ``projects``.
    """

    def __init__(self, inputs: int, outputs: int, stride: int,
                 projects: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if projects or stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def small_resnet(channels: int, projects: bool = False) -> nn.Sequential:
    """Build a ResNet for small images, up to its last map of 64 channels.

    Its blocks project where they stride, and with ``projects`` the first too.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        Residual(16, 16, 1, projects), Residual(16, 32, 2),
        Residual(32, 64, 2))


def digits(size: int, count: int, split: str = 'train') -> tuple[Tensor, ...]:
    """Give images of handwritten digits as ImageNet has them, and labels.

    Of the split ``'train'`` or ``'test'``; shape (count, 3, size, size).
    """
    data = load_data(size)[('train', 'test').index(split)]
    return data[:count]


def put_in_paper_mode(model: nn.Module,
                      mode: str,
                      modules: Sequence[str] | None = None) -> Report | None:
    """Put a model into a mode as the paper has it, with stock activations.

    See :func:`mmtune.analysis.modes.put_in_mode`.
    """
    return put_in_mode(model, PAPERS_TUNE if mode == 'Tune' else mode, modules)


def put_in_folding_mode(model: nn.Module, mode: str) -> None:
    """The same of a whole model; Tune folds however small a map is."""
    with mock.patch.multiple(convolution, SMALL_MAP=0, SMALL_SHARE=0):
        put_in_paper_mode(model, mode)


def in_processes(function: Callable[..., Item],
                 tasks: Iterable[Sequence[object]], what: str) -> list[Item]:
    """Call a function in as many processes as there are cores.

    Each computes with one thread, which wastes less than several threads
    that wait for each other. Not for what is timed.

    Args:
        function (Callable): Of a module.
        tasks (Iterable[Sequence[object]]): Arguments for each call.
        what (str): What is being done, for the progress.
    """
    workers = ProcessPoolExecutor(
        os.cpu_count(),
        # A forked process hangs in torch where its parent had threads.
        multiprocessing.get_context('spawn'),
        _begin_process)
    try:
        futures = [workers.submit(function, *task) for task in tasks]
        return [future.result() for future in track(futures, what)]
    finally:
        # Where one raises, what has not begun never does.
        workers.shutdown(cancel_futures=True)


def _begin_process() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', 'pkg_resources is deprecated')
    MMLogger.get_instance('reproduce', log_level='WARNING')


def measure_in_turns(steps: Mapping[str, Callable[[], object]],
                     rounds: int) -> dict[str, dict]:
    """Time the steps of several modes in turns, then count their memory.

    Returns:
        dict[str, dict]: By mode the ``peak`` in bytes, and the ``seconds``
        of each round.
    """
    # Takes also the first step of each, which creates an optimizer's state.
    timed = list(interleaved_seconds(steps, rounds))
    peak = {}
    for mode, step in steps.items():
        with peak_bytes() as memory:
            step()
        peak[mode] = memory.peak
    return dict(
        peak=peak,
        seconds={mode: [round_[mode] for round_ in timed] for mode in steps})
