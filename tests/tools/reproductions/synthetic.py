"""Stand-ins for what is fetched: a few images of trees, random weights."""
import numpy as np
import torch
from misc import download_dataset
from mmdet.models import MobileNetV2

from tests.oracle import randomize

ROOT = download_dataset.Path(__file__).parents[3]


def fill(folder, monkeypatch):
    """Go to a folder where data and weights are there."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    trees = folder / 'data/trees'
    generator = np.random.default_rng(0)
    image = generator.integers(0, 255, (128, 512, 3), dtype=np.uint8)
    boxes = np.array([[20 + left, 30, 60 + left, 70]
                      for left in range(0, 512, 128)])
    for split in ('train', 'val'):
        download_dataset.write_crops(
            image, boxes, download_dataset.grid_windows(512, 128, 4, 1), 1.0,
            trees, split)
    download_dataset.write_checksums(trees)
    (folder / 'checkpoints').mkdir()
    torch.manual_seed(0)
    torch.save(
        dict(state_dict=randomize(MobileNetV2()).state_dict()),
        folder / 'checkpoints/mobilenet_v2_imagenet.pth')
