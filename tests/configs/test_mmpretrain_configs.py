"""The configs of the paper's Table 3, which extend mmpretrain's.

mmpretrain cannot be installed without torchvision, and is no requirement. Its
config stands here with the keys that the configs rely on.
"""
from pathlib import Path

import pytest
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.config import config as config_module
from mmengine.fileio import dump, load
from mmengine.registry import init_default_scope
from torch import nn

import mmtune

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs/resnet'
METAFILE = load(CONFIGS / 'metafile.yml')
NAMES = ('cub', 'aircraft', 'cars')

# In mmpretrain 1.2: configs/resnet/resnet50_8xb8_cub.py.
BASE = """
default_scope = 'mmpretrain'
default_hooks = dict(logger=dict(type='LoggerHook', interval=20))
data_preprocessor = dict(num_classes=200, to_rgb=True)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet', depth=50, num_stages=4, out_indices=(3, ),
        style='pytorch'),
    head=dict(type='LinearClsHead', num_classes=200, in_channels=2048))
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        type='CUB', data_root='data/CUB_200_2011', split='train',
        pipeline=[dict(type='PackInputs')]))
val_dataloader = dict(
    batch_size=8,
    dataset=dict(
        type='CUB', data_root='data/CUB_200_2011', split='test',
        pipeline=[dict(type='PackInputs')]))
test_dataloader = val_dataloader
"""


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a config of ours by its name."""
    mim = tmp_path / 'mmpretrain/.mim'
    base = mim / 'configs/resnet/resnet50_8xb8_cub.py'
    base.parent.mkdir(parents=True)
    base.write_text(BASE)
    dump(dict(Import=[]), mim / 'model-index.yml')
    monkeypatch.setattr(config_module, 'is_installed',
                        lambda package: package == 'mmpretrain')
    monkeypatch.setattr(config_module, 'get_installed_path',
                        lambda package: str(mim.parent))
    return lambda name: Config.fromfile(CONFIGS / f'{name}.py')


@pytest.mark.parametrize('name, dataset, classes, splits', [
    ('cub', 'CUB', 200, ('train', 'test')),
    ('aircraft', 'FGVCAircraft', 100, ('trainval', 'test')),
    ('cars', 'StanfordCars', 196, ('train', 'test')),
])
def test_dataset_and_head_fit(read, name, dataset, classes, splits):
    config = read(f'resnet50_8xb8_{name}')
    loaders = [config.train_dataloader, config.val_dataloader]
    assert [loader.dataset.split for loader in loaders] == list(splits)
    assert {loader.dataset.type for loader in loaders} == {dataset}
    assert len({loader.dataset.data_root for loader in loaders}) == 1
    # A list in the base is kept, not lost with what is replaced.
    assert all(loader.dataset.pipeline for loader in loaders)
    assert config.test_dataloader == config.val_dataloader
    assert config.model.head.num_classes == classes
    assert config.data_preprocessor.num_classes == classes
    assert config.train_dataloader.batch_size == 8


@pytest.mark.parametrize('name', NAMES)
def test_only_norm_eval_differs_between_train_and_eval(read, name):
    train = read(f'resnet50_8xb8_{name}').to_dict()
    evaluation = read(f'resnet50_8xb8-eval_{name}').to_dict()
    assert evaluation['model']['backbone'].pop('norm_eval') is True
    assert evaluation == train


@pytest.mark.parametrize('name', NAMES)
def test_only_tune_mode_keys_differ_from_the_eval_twin(read, name):
    tune = read(f'resnet50_8xb8-tune_{name}').to_dict()
    hook = tune['default_hooks'].pop('tune_mode')
    assert hook == dict(type='mmtune.TuneModeHook')
    del tune['efficient_conv_bn_eval']
    assert tune == read(f'resnet50_8xb8-eval_{name}').to_dict()


def test_tune_takes_every_block_of_the_backbone(read):
    config = read('resnet50_8xb8-tune_cub')
    # mmdet's ResNet takes the same arguments.
    init_default_scope('mmdet')
    model = nn.Module()
    model.backbone = MODELS.build(config.model.backbone)
    model.train()
    report = mmtune.turn_on(model, **config.efficient_conv_bn_eval)
    norms = [
        module for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    assert not any(norm.training for norm in norms)
    assert [row.mode for row in report.rows] == ['Tune'] * len(norms)


def test_metafile_lists_every_config_beside_it():
    listed = [ROOT / model['Config'] for model in METAFILE['Models']]
    assert sorted(listed) == sorted(CONFIGS.glob('*.py'))
    for model in METAFILE['Models']:
        assert model['Name'] == Path(model['Config']).stem
        assert model['Metadata']['Not Run Here'] is True
    collection, = METAFILE['Collections']
    assert {model['In Collection'] for model in METAFILE['Models']} == {
        collection['Name']
    }


def test_only_figures_of_the_paper_are_listed():
    for model in METAFILE['Models']:
        result, = model['Results']
        has_figures = 'Metrics' in result
        assert has_figures == ('-eval' not in model['Name'])
        assert has_figures == ('Figures From' in model['Metadata'])
