"""The configs of the paper's Table 4, and the metafiles that list them."""
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.runner import set_random_seed
from torch import nn

import mmtune

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
TUNE_CONFIGS = sorted(CONFIGS.glob('*/*tune-1x_coco.py'))
METAFILES = sorted({path.with_name('metafile.yml') for path in TUNE_CONFIGS})
MODELS_LISTED = [
    model for path in METAFILES for model in load(path)['Models']
]

# Of the 11 rows of Table 4: detector, backbone, images a GPU, precision.
TABLE_4 = [
    ('FasterRCNN', 'ResNet', 50, 2, 'FP32'),
    ('MaskRCNN', 'ResNet', 50, 2, 'FP32'),
    ('MaskRCNN', 'ResNet', 101, 16, 'FP16'),
    ('RetinaNet', 'ResNet', 50, 2, 'FP32'),
    ('FasterRCNN', 'ResNet', 101, 2, 'FP32'),
    ('FasterRCNN', 'ResNet', 101, 2, 'FP16'),
    ('FasterRCNN', 'ResNet', 101, 8, 'FP16'),
    ('FasterRCNN', 'ResNet', 101, 16, 'FP16'),
    ('FasterRCNN', 'ResNeXt', 101, 2, 'FP32'),
    ('FasterRCNN', 'RegNet', None, 2, 'FP32'),
    ('FasterRCNN', 'HRNet', None, 2, 'FP32'),
]


def eval_twin(tune_config):
    return tune_config.with_name(tune_config.name.replace('tune-', ''))


def without_tune_mode(config):
    config = config.to_dict()
    del config['efficient_conv_bn_eval']
    del config['default_hooks']['tune_mode']
    return config


def row_of(config):
    """The row of Table 4 that a config belongs to."""
    amp = config.optim_wrapper.type == 'AmpOptimWrapper'
    backbone = config.model.backbone
    return (config.model.type, backbone.type, backbone.get('depth'),
            config.train_dataloader.batch_size, 'FP16' if amp else 'FP32')


def build_detector(config):
    """Build a detector as if pretrained, its backbone in float64.

    Two float32 results that differ in rounding alone can send proposals
    through NMS in another order and so give another loss. The heads, whose
    operations know float32 only, are therefore given features that agree to
    the last bit.
    """
    register_all_modules()
    set_random_seed(0)
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.1)
    model.backbone.double()
    model.backbone.register_forward_pre_hook(
        lambda backbone, images: tuple(image.double() for image in images))
    model.backbone.register_forward_hook(
        lambda backbone, images, features: tuple(
            feature.float() for feature in features))
    return model.train()


def backward(model):
    """Losses of a step on fixed data; the gradients stay in the model."""
    model.zero_grad()
    set_random_seed(0)
    data = demo_mm_inputs(
        image_shapes=(3, 96, 128),
        num_items=[3, 5],
        num_classes=80,
        with_mask=True)
    data = model.data_preprocessor(data, training=True)
    total, losses = model.parse_losses(model(**data, mode='loss'))
    total.backward()
    return losses


def backbone_gradients(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.backbone.named_parameters()
        if parameter.grad is not None
    }


def test_each_row_of_the_paper_has_a_config():
    rows = Counter(row_of(Config.fromfile(path)) for path in TUNE_CONFIGS)
    assert rows == Counter(TABLE_4)


@pytest.mark.parametrize('path', TUNE_CONFIGS, ids=lambda path: path.stem)
def test_only_tune_mode_keys_differ_from_the_eval_twin(path):
    tune = Config.fromfile(path)
    twin = Config.fromfile(eval_twin(path))
    assert tune.default_hooks.tune_mode.type == 'mmtune.TuneModeHook'
    assert without_tune_mode(tune) == twin.to_dict()


def distinct_models():
    """Models once each; the deepest backbones are left to the whole run."""
    seen = []
    for path in TUNE_CONFIGS:
        model = Config.fromfile(path).model
        deep = model.backbone.get('depth') == 101 or (
            model.backbone.type == 'HRNet')
        marks = [pytest.mark.exhaustive] if deep or model in seen else []
        seen.append(model)
        yield pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize('path', distinct_models())
def test_a_step_in_tune_mode_equals_the_eval_twins(path):
    model = build_detector(Config.fromfile(eval_twin(path)))
    norms = [
        module for module in model.backbone.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    assert not any(norm.training for norm in norms)
    expected_losses = backward(model)
    expected = backbone_gradients(model)

    config = Config.fromfile(path)
    report = mmtune.turn_on(model, **config.efficient_conv_bn_eval)
    losses = backward(model)
    gradients = backbone_gradients(model)

    assert [row.mode for row in report.rows] == ['Tune'] * len(norms)
    assert all(loss.isfinite() for loss in losses.values())
    torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=1e-9)

    # AmpOptimWrapper refuses to be built without a GPU.
    optim_wrapper = build_optim_wrapper(
        model, dict(config.optim_wrapper, type=OptimWrapper))
    before = {name: value.clone() for name, value in model.named_parameters()}
    optim_wrapper.step()
    moved = {
        name
        for name, value in model.backbone.named_parameters()
        if not torch.equal(value, before[f'backbone.{name}'])
    }
    assert moved == gradients.keys()


@pytest.mark.parametrize('model', MODELS_LISTED, ids=lambda m: m['Name'])
def test_metafile_entry_describes_its_config(model):
    config = Config.fromfile(ROOT / model['Config'])
    metadata = model['Metadata']
    assert model['Name'] == Path(model['Config']).stem
    assert row_of(config)[-2:] == (metadata['Batch Size'],
                                   metadata['Precision'])


def test_metafiles_list_every_config_beside_them():
    listed = [ROOT / model['Config'] for model in MODELS_LISTED]
    beside = [path for meta in METAFILES for path in meta.parent.glob('*.py')]
    assert sorted(listed) == sorted(beside)


def test_model_index_imports_every_metafile():
    imported = load(ROOT / 'model-index.yml')['Import']
    present = CONFIGS.glob('*/metafile.yml')
    assert sorted(ROOT / path for path in imported) == sorted(present)


def test_metafiles_define_the_collections_they_use():
    collections = {
        collection['Name']
        for path in METAFILES for collection in load(path).get(
            'Collections', [])
    }
    assert {model['In Collection'] for model in MODELS_LISTED} == collections


@pytest.mark.parametrize('path', TUNE_CONFIGS, ids=lambda path: path.stem)
def test_percentages_follow_from_the_memory_figures(path):
    metadata = {model['Name']: model['Metadata'] for model in MODELS_LISTED}
    tune = metadata[path.stem]
    memory = metadata[eval_twin(path).stem]['Training Memory (GB)']
    saved = 100 * (1 - tune['Training Memory (GB)'] / memory)
    # The paper computed its percentages before it rounded its memory.
    assert saved == pytest.approx(tune['Memory Saved (%)'], abs=0.02)
