"""Stand-ins for what is fetched, and for what takes processes of its own."""
from pathlib import Path

import numpy as np
import reproduce
import torch
from misc import download_dataset
from mmdet.models import MobileNetV2
from reproductions.page import without_places

from tests.oracle import randomize

ROOT = Path(__file__).parents[2]


def fill(folder, monkeypatch, crops=4, size=128):
    """Go to a folder where data and weights are there."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    trees = folder / 'data/trees'
    width = crops * size
    generator = np.random.default_rng(0)
    image = generator.integers(0, 255, (size, width, 3), dtype=np.uint8)
    # A tree in each crop.
    box = np.array([20, 30, 60, 70]) * size // 128
    boxes = np.array([box + [left, 0, left, 0]
                      for left in range(0, width, size)])
    for split in ('train', 'val'):
        download_dataset.write_crops(
            image, boxes,
            download_dataset.grid_windows(width, size, crops, 1), 1.0, trees,
            split)
    download_dataset.write_checksums(trees)
    (folder / 'checkpoints').mkdir()
    torch.manual_seed(0)
    torch.save(
        dict(state_dict=randomize(MobileNetV2()).state_dict()),
        folder / 'checkpoints/mobilenet_v2_imagenet.pth')


def shorten(modes, folder, monkeypatch, iterations):
    """Have the demo's configs train for a few iterations."""
    for mode, path in modes.items():
        short = folder / path.name
        short.write_text(
            f'_base_ = [{str(path)!r}]\n'
            f'train_cfg = dict(max_iters={iterations}, '
            f'val_interval={iterations})\n'
            'default_hooks = dict(checkpoint=dict('
            f'interval={iterations}))\n')
        monkeypatch.setitem(modes, mode, short)


def in_turn(function, tasks, what):
    """What `in_processes` does, here: processes know of no monkeypatch."""
    return [function(*task) for task in tasks]


def filled(name, found):
    """A page with other figures, as words with single spaces between."""
    record = dict(command='', seconds=0, cpu='', cores=1, device='CPU',
                  torch='', mmtune='', commit='', found=found)
    text = reproduce.file_of(name, '.md').read_text()
    page = reproduce.load(name).write(text, record)
    return ' '.join(without_places(page).split())


def doubted(name, found):
    """What the prose of a page says and other figures do not."""
    claims = reproduce.load(name).claims(found)
    return [claim for claim, holds in claims.items() if not holds]
