"""The configs of the transfer run on trees, on data made here."""
from itertools import islice
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.fileio import dump
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, set_random_seed

from mmtune import turn_on

CONFIGS = Path(__file__).parents[2] / 'configs/trees'
TUNE_CONFIGS = sorted(CONFIGS.glob('*_tune-*_trees.py'))


def eval_twin(tune_config):
    return tune_config.with_name(tune_config.name.replace('tune-', ''))


@pytest.fixture(scope='module')
def trees(tmp_path_factory):
    """A dataset of two images a subset, with a bright square for a tree."""
    folder = tmp_path_factory.mktemp('trees')
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        images, annotations = [], []
        for image_id in (1, 2):
            pixels = rng.integers(0, 80, (128, 128, 3), dtype=np.uint8)
            # The second box is cut by the border and does not count.
            for x, width, ignored in ((40, 32, 0), (112, 16, 1)):
                pixels[50:82, x:x + width] += 120
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=image_id,
                        category_id=1,
                        bbox=[x, 50, width, 32],
                        area=width * 32,
                        iscrowd=ignored))
            mmcv.imwrite(pixels, str(folder / split / f'{image_id}.png'))
            images.append(
                dict(
                    id=image_id,
                    file_name=f'{image_id}.png',
                    width=128,
                    height=128))
        dump(
            dict(
                images=images,
                annotations=annotations,
                categories=[dict(id=1, name='tree')]),
            folder / f'annotations/{split}.json')
    return folder


def load_config(path, trees):
    config = Config.fromfile(path)
    config.model.backbone.init_cfg = None
    for name in ('train_dataloader', 'val_dataloader'):
        loader = config[name]
        loader.dataset.data_root = f'{trees}/'
        loader.num_workers = 0
        loader.persistent_workers = False
    return config


def build(config):
    init_default_scope('mmdet')
    set_random_seed(0)
    return MODELS.build(config.model)


def gradients(model, batch):
    """Loss of a step on a batch, and the gradients of all parameters."""
    data = model.data_preprocessor(batch, training=True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    return loss, torch.cat([
        parameter.grad.flatten() for parameter in model.parameters()
        if parameter.grad is not None
    ])


def test_there_is_a_tune_config():
    assert TUNE_CONFIGS


@pytest.mark.parametrize('path', TUNE_CONFIGS, ids=lambda path: path.stem)
def test_only_tune_mode_keys_differ_from_the_eval_twin(path):
    tune = Config.fromfile(path).to_dict()
    assert tune.pop('efficient_conv_bn_eval')['mode'] == 'Tune'
    hook = tune['default_hooks'].pop('tune_mode')
    assert hook == dict(type='mmtune.TuneModeHook')
    assert tune == Config.fromfile(eval_twin(path)).to_dict()


@pytest.mark.parametrize('path', TUNE_CONFIGS, ids=lambda path: path.stem)
def test_first_step_agrees_with_the_eval_twin(path, trees):
    config = load_config(path, trees)
    init_default_scope('mmdet')
    batch = next(iter(Runner.build_dataloader(config.train_dataloader,
                                              seed=0)))
    stock = build(load_config(eval_twin(path), trees)).train()
    tuned = build(config).train()
    report = turn_on(tuned, **config.efficient_conv_bn_eval)
    assert len(report.rewritten) == 52 and not report.left_out
    expected_loss, expected = gradients(stock, batch)
    loss, actual = gradients(tuned, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    # In float32 a value next to a kink of ReLU6 may fall to either side.
    assert (actual - expected).norm() < 1e-3 * expected.norm()


def test_batches_are_what_the_annotations_say(trees):
    """A flip moves boxes as it moves pixels, and cut trees stay apart."""
    config = load_config(TUNE_CONFIGS[0], trees)
    init_default_scope('mmdet')
    loader = Runner.build_dataloader(config.train_dataloader, seed=0)
    flips = set()
    # The loader itself never ends.
    for batch in islice(loader, 16):
        for image, sample in zip(batch['inputs'], batch['data_samples']):
            flips.add(sample.flip_direction)
            for instances in (sample.gt_instances, sample.ignored_instances):
                (x1, y1, x2, y2), = instances.bboxes.tensor.int().tolist()
                assert image[:, y1:y2, x1:x2].min() >= 120
            left, _, right, _ = sample.gt_instances.bboxes.tensor[0]
            assert right - left == 32
    assert flips == {None, 'horizontal', 'vertical', 'diagonal'}


def test_predictions_are_in_pixels_of_the_file(trees):
    config = load_config(TUNE_CONFIGS[0], trees)
    model = build(config).eval()
    for batch in Runner.build_dataloader(config.val_dataloader):
        sample, = model.test_step(batch)
        assert sample.ori_shape == sample.img_shape == (128, 128)
        assert sample.scale_factor == (1.0, 1.0)
        assert len(sample.gt_instances) == len(sample.ignored_instances) == 1
