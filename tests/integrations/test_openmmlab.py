"""Short runs of OpenMMLab's runners with the hook, against stock ones.

``make train LIB=mmpretrain`` runs those of a library in its environment. The
configs are the ones of docs/en/openmmlab.md, on random images: the library's
own runner, datasets, transforms, losses, optimizers and hooks.
"""
import copy
import importlib
import json
import re
import sys
import uuid
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import mmcv
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pycocotools.mask
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmtune.api import latest_runs
from tests.oracle import randomize
from tests.toy import logged, losses

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'en' / 'openmmlab.md'
RECIPES = {
    library: recipe for recipe, library in re.findall(
        r"^```python\n(_base_ = '(\w+)::.*?)^```$", PAGE.read_text(),
        re.DOTALL | re.MULTILINE)
}
IMAGES = 6
SHAPE = 96, 128  # height and width of an image
BOX = 20, 10, 60, 80  # left, top, width and height
SIDE = 64  # of what the networks are given


@pytest.fixture(params=RECIPES)
def library(request):
    """A library that is there, and registered."""
    name = request.param
    if find_spec(name) is None:
        pytest.skip(f'`make train LIB={name}` has {name}')
    # Both are built for older versions of what they need, and run with newer.
    if find_spec('xtcocotools') is None:
        sys.modules.update({
            'xtcocotools': pycocotools,
            'xtcocotools.coco': pycocotools.coco,
            'xtcocotools.cocoeval': pycocotools.cocoeval,
            'xtcocotools.mask': pycocotools.mask})
    told = '2.0.1' if name == 'mmyolo' else mmcv.__version__
    with mock.patch.object(mmcv, '__version__', told):
        importlib.import_module(f'{name}.utils').register_all_modules()
    return name


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------


def write_data(root):
    """Random images with a class, a map of classes, a box, a pose each."""
    numbers = np.random.default_rng(0)
    names = [f'{index}.png' for index in range(IMAGES)]
    for name in names:
        mmcv.imwrite(numbers.integers(256, size=(*SHAPE, 3), dtype=np.uint8),
                     str(root / 'images' / name))
        mmcv.imwrite(numbers.integers(19, size=SHAPE, dtype=np.uint8),
                     str(root / 'maps' / name))
    (root / 'classes.txt').write_text(
        ''.join(f'{name} {index % 2}\n' for index, name in enumerate(names)))
    left, top, width, height = BOX
    x = numbers.integers(left, left + width, (IMAGES, 17))
    y = numbers.integers(top, top + height, (IMAGES, 17))
    poses = np.stack([x, y, np.full_like(x, 2)], -1).reshape(IMAGES, -1)
    (root / 'coco.json').write_text(json.dumps(dict(
        images=[dict(id=index, file_name=name, height=SHAPE[0],
                     width=SHAPE[1]) for index, name in enumerate(names)],
        annotations=[dict(id=index + 1, image_id=index, category_id=1,
                          bbox=BOX, area=width * height, iscrowd=0,
                          keypoints=pose, num_keypoints=17)
                     for index, pose in enumerate(poses.tolist())],
        categories=[dict(id=1, name='person')])))


def for_mmpretrain(config, root):
    pipeline = config.train_dataloader.dataset.pipeline
    change(pipeline, 'RandomResizedCrop', scale=SIDE)
    config.train_dataloader.dataset = dict(
        type='CustomDataset', data_prefix=str(root / 'images'),
        ann_file=str(root / 'classes.txt'), pipeline=pipeline)


def for_mmseg(config, root):
    dataset = config.train_dataloader.dataset
    dataset.update(
        data_root=str(root), img_suffix='.png', seg_map_suffix='.png',
        data_prefix=dict(img_path='images', seg_map_path='maps'))
    change(dataset.pipeline, 'RandomResize', scale=SHAPE[::-1])
    change(dataset.pipeline, 'RandomCrop', crop_size=(SIDE, SIDE))
    config.model.data_preprocessor.size = SIDE, SIDE
    config.model.pretrained = None


def for_mmpose(config, root):
    pipeline = on_coco(config, root).pipeline
    codec = dict(config.model.head.decoder, input_size=(SIDE, SIDE),
                 heatmap_size=(SIDE // 4, SIDE // 4))
    change(pipeline, 'TopdownAffine', input_size=codec['input_size'])
    change(pipeline, 'GenerateTarget', encoder=codec)
    config.model.backbone.init_cfg = None


def for_mmyolo(config, root):
    pipeline = on_coco(config, root).pipeline
    change(pipeline, 'Mosaic', img_scale=(SIDE, SIDE))
    change(pipeline, 'YOLOv5RandomAffine', border=(-SIDE // 2, -SIDE // 2))
    # Albumentations is not there.
    pipeline[:] = [step for step in pipeline if step.type != 'mmdet.Albu']


def on_coco(config, root):
    dataset = config.train_dataloader.dataset
    dataset.update(data_root=str(root), ann_file='coco.json',
                   data_prefix=dict(img='images'))
    return dataset


def change(pipeline, kind, **options):
    step, = (step for step in pipeline if step.type == kind)
    step.update(options)


DATA = dict(mmpretrain=for_mmpretrain, mmseg=for_mmseg, mmpose=for_mmpose,
            mmyolo=for_mmyolo)


# --------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------


def shortened(recipe, library, root):
    """A recipe's config for two epochs of random images."""
    (root / 'recipe.py').write_text(recipe)
    config = Config.fromfile(root / 'recipe.py')
    DATA[library](config, root)
    config.train_dataloader.update(
        batch_size=2, num_workers=0, persistent_workers=False)
    for part in ('val', 'test'):
        for key in ('cfg', 'dataloader', 'evaluator'):
            config[f'{part}_{key}'] = None
    by_iteration = config.train_cfg.get('type') == 'IterBasedTrainLoop'
    config.train_cfg.update(
        dict(max_iters=IMAGES) if by_iteration else dict(max_epochs=2))
    config.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=not by_iteration,
        filename_tmpl='last.pth')
    # Of fine-tuning.
    config.optim_wrapper.optimizer.lr = 1e-4
    config.custom_hooks = [*config.get('custom_hooks', []),
                           dict(type='RecordHook')]
    config.randomness = dict(seed=0)
    return config


def runner_of(config, work_dir):
    config.work_dir = str(work_dir)
    # Runners of one name are one and the same to MMEngine.
    config.experiment_name = str(uuid.uuid4())
    return Runner.from_cfg(config)


def pretrained(config, root):
    """Write what stands for a pretrained model: statistics that matter."""
    model = runner_of(config, root).model
    model.init_weights()
    path = str(root / 'first.pth')
    torch.save(dict(state_dict=randomize(model).state_dict()), path)
    return path


def train(config, work_dir):
    """Return the runner, and the checkpoint that it wrote."""
    runner = runner_of(config, work_dir)
    runner.train()
    return runner, torch.load(work_dir / 'last.pth', weights_only=False)


def stock(config):
    """The config without what a recipe adds of mmtune."""
    config = copy.deepcopy(config)
    config.default_hooks.pop('tune_mode')
    config.pop('efficient_conv_bn_eval')
    return config


@pytest.mark.parametrize('norm_eval', [True, False])
@pytest.mark.filterwarnings('ignore')
def test_a_run_equals_stock(library, norm_eval, tmp_path):
    write_data(tmp_path)
    config = shortened(RECIPES[library], library, tmp_path)
    assert config.model.backbone.norm_eval
    config.model.backbone.norm_eval = norm_eval
    config.load_from = pretrained(stock(config), tmp_path)
    expected, saved_by_stock = train(stock(config), tmp_path / 'stock')
    runner, saved = train(config, tmp_path / 'tune')
    assert len(losses(runner)) == IMAGES
    assert losses(runner) == pytest.approx(losses(expected), rel=1e-9)
    for key in ('state_dict', 'ema_state_dict'):
        torch.testing.assert_close(
            saved.get(key), saved_by_stock.get(key), rtol=1e-7, atol=1e-9)
    runs = latest_runs(runner.model)
    assert set(runs.values()) == {'fused' if norm_eval else 'train mode'}
    if not norm_eval:
        assert (f'{len(runs)} of {len(runs)} blocks ran as stock since their '
                'BatchNorm is in train mode') in logged(runner)
