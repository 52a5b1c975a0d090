"""Models from configs, callables and checkpoints."""
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper
from torch import nn

from mmtune import turn_on
from mmtune.analysis.sources import (
    build_model,
    call_for_model,
    load_config,
    load_fitting,
    optimizer_options,
    read_state_dict,
    trains_with_amp,
    tune_options,
)
from tests import toy
from tests.oracle import randomize

PRETRAINED = dict(type='Pretrained', checkpoint='/nowhere/weights.pth')
CONSTANT = dict(type='Constant', layer='Conv2d', val=7.)
RESNET = dict(type='mmdet.ResNet', depth=18, init_cfg=PRETRAINED)


def resnet_config(**keys):
    return Config(dict(default_scope='mmdet', model=RESNET, **keys))


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(f'default_scope = "mmdet"\nmodel = {RESNET!r}\n')
    return str(path)


def test_a_config_is_read(config_file):
    config = load_config(config_file)
    assert config.model.depth == 18


def test_a_config_of_a_package_is_read():
    path = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
    assert load_config(path).model.type == 'RetinaNet'


@pytest.mark.parametrize('path', [
    'nowhere/config.py', 'mmdet::nowhere/config.py'
])
def test_a_config_that_is_not_there(path):
    with pytest.raises(FileNotFoundError, match='nowhere/config.py'):
        load_config(path)


def test_a_config_without_a_model(tmp_path):
    path = tmp_path / 'lr.py'
    path.write_text('lr = 1\n')
    with pytest.raises(ValueError, match='no `model`, but has lr; pass'):
        load_config(str(path))


def test_a_model_is_built_without_its_weights():
    config = resnet_config()
    model = build_model(config)
    assert model.training
    assert model.init_cfg != PRETRAINED
    # The config is not changed.
    assert config.model.init_cfg == PRETRAINED


def test_a_model_gets_the_preprocessor_beside_it():
    preprocessor = dict(
        type='ImgDataPreprocessor', mean=[7.] * 3, std=[2.] * 3)
    config = Config(
        dict(
            default_scope='mmengine',
            model=dict(type='ToyClassifier'),
            data_preprocessor=preprocessor))
    assert build_model(config).data_preprocessor.mean.flatten()[0] == 7


def test_weights_deep_in_a_config_are_not_loaded():
    retinanet = load_config(
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py').model
    distilled = dict(
        type='KnowledgeDistillationSingleStageDetector',
        teacher_config=dict(model=retinanet.to_dict()),
        # Read by the constructor itself.
        teacher_ckpt='/nowhere/teacher.pth',
        **{key: retinanet[key] for key in ('backbone', 'neck', 'bbox_head')},
        train_cfg=retinanet.train_cfg,
        test_cfg=retinanet.test_cfg)
    config = Config(dict(default_scope='mmdet', model=distilled))
    assert build_model(config).teacher_model is not None


def test_weights_are_loaded_where_asked_for(tmp_path):
    stock = randomize(build_model(resnet_config()))
    torch.save(stock.state_dict(), tmp_path / 'weights.pth')
    config = resnet_config()
    config.model.init_cfg.checkpoint = str(tmp_path / 'weights.pth')
    model = build_model(config, pretrained=True)
    torch.testing.assert_close(model.state_dict(), stock.state_dict())


def test_weights_that_are_not_there():
    with pytest.raises(OSError, match='nowhere/weights.pth.*; pass a'):
        build_model(resnet_config(), pretrained=True)


@pytest.mark.parametrize('keys, expected', [
    (dict(), dict()),
    (dict(efficient_conv_bn_eval='backbone'), dict(modules='backbone')),
    (dict(efficient_conv_bn_eval=['a', 'b']), dict(modules=['a', 'b'])),
    (dict(efficient_conv_bn_eval=dict(norm_eval=True, mode='Eval')),
     dict(norm_eval=True)),
    (dict(efficient_conv_bn_eval='a',
          default_hooks=dict(
              tune_mode=dict(type='mmtune.TuneModeHook', modules=['b']),
              timer=None)),
     dict(modules=['b'], mode='Tune')),
    (dict(efficient_conv_bn_eval='a',
          custom_hooks=[dict(type='EMAHook', modules='c')]),
     dict(modules='a')),
    (dict(custom_hooks=[dict(type='TuneModeHook', norm_eval=True)]),
     dict(norm_eval=True, mode='Tune')),
    (dict(efficient_conv_bn_eval=dict(modules='a', mode='Deploy'),
          custom_hooks=[dict(type='TuneModeHook', modules=None, begin=3)]),
     dict(modules='a', mode='Deploy', begin=3)),
    (dict(model=dict(type='mmtune.TuneModeModel', architecture=dict(),
                     modules='a')),
     dict(modules='a', mode='Tune')),
    (dict(model=dict(type='ResNet'),
          model_wrapper_cfg=dict(
              type='mmtune.TuneModeDistributedDataParallel', mode='Eval',
              broadcast_buffers=False)),
     dict(mode='Eval')),
])  # yapf: disable
def test_what_a_config_tunes(keys, expected):
    assert tune_options(Config(keys)) == expected


def test_an_option_that_there_is_not():
    config = Config(dict(efficient_conv_bn_eval=dict(module='a')))
    with pytest.raises(ValueError, match='takes modules.*but got module'):
        tune_options(config)


@pytest.mark.parametrize('wrapper, amp', [
    (None, False), (dict(type='OptimWrapper'), False),
    (dict(type='AmpOptimWrapper', dtype='float16'), True),
    (dict(type=AmpOptimWrapper), True),
])
def test_whether_a_config_trains_with_amp(wrapper, amp):
    assert trains_with_amp(Config(dict(optim_wrapper=wrapper))) == amp


def test_what_a_config_trains_with():
    optimizer = dict(type='SGD', lr=.1)
    config = Config(dict(optim_wrapper=dict(optimizer=optimizer)))
    assert optimizer_options(config) == optimizer
    assert optimizer_options(Config(dict())) == {}


def test_a_model_from_a_callable():
    model = call_for_model('tests.toy:conv_bns')
    assert isinstance(model, nn.Sequential) and model.training


@pytest.mark.parametrize('path, error, message', [
    ('tests.toy', ValueError, "named module:callable.*but got 'tests.toy'"),
    (':conv_bns', ValueError, 'named module:callable'),
    ('tests.toy:', ValueError, 'named module:callable'),
    ('tests.toy:conv', ValueError, "'tests.toy' has no callable 'conv'"),
    ('tests.toy:TUNE', ValueError, "has no callable 'TUNE'"),
    ('tests.nothing:conv', ImportError, 'tests.nothing'),
    ('tests.toy:loader', ValueError, 'torch.nn.Module, but returned dict'),
    ('torch.nn:Conv2d', ValueError, 'must take no arguments, but raised'),
])
def test_callables_that_give_no_model(path, error, message):
    with pytest.raises(error, match=message):
        call_for_model(path)


TENSORS = {'0.weight': torch.ones(2), '0.bias': torch.zeros(2)}


@pytest.mark.parametrize('saved', [
    TENSORS,
    dict(state_dict=TENSORS, meta=dict(epoch=1)),
    dict(model=TENSORS, epoch=1),
    dict(state_dict={f'module.{k}': v for k, v in TENSORS.items()}),
    dict(state_dict=dict(TENSORS, count=3)),
])
def test_checkpoints_of_all_kinds(saved, tmp_path):
    torch.save(saved, tmp_path / 'weights.pth')
    found = read_state_dict(tmp_path / 'weights.pth')
    assert found.keys() == TENSORS.keys()
    torch.testing.assert_close(found, TENSORS)


@pytest.mark.parametrize('saved', [
    dict(meta=dict(epoch=1)), [torch.ones(2)], dict(model='ResNet')
])
def test_checkpoints_without_tensors(saved, tmp_path):
    torch.save(saved, tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match='weights.pth holds no tensors'):
        read_state_dict(tmp_path / 'weights.pth')


def test_a_checkpoint_of_deploy_mode(tmp_path):
    saved = dict(state_dict=TENSORS, meta=dict(mmtune_mode='Deploy'))
    torch.save(saved, tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match="mode 'Deploy'.*from before"):
        read_state_dict(tmp_path / 'weights.pth')


@pytest.mark.parametrize('path', ['nowhere.pth', 'https://host/a.pth'])
def test_a_checkpoint_that_is_not_there(path):
    with pytest.raises(FileNotFoundError, match=f'{path}.*local file'):
        read_state_dict(path)


def test_pickled_code_is_not_run(tmp_path):
    torch.save(dict(state_dict=print), tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match='cannot be read as a checkpoint'):
        read_state_dict(tmp_path / 'weights.pth')


def test_a_checkpoint_is_read_without_mmengine(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / 'weights.pth')
    monkeypatch.setitem(sys.modules, 'mmtune.engine.checkpoint', None)
    assert read_state_dict(tmp_path / 'weights.pth').keys() == TENSORS.keys()


def test_what_fits_is_loaded():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = model[0].weight.detach().clone()
    state_dict = {
        '0.weight': torch.ones(5, 3),
        '0.bias': torch.full((2, ), 7.),
        '1.running_var': torch.full((2, ), 9.),
        'head.weight': torch.ones(1)
    }
    assert load_fitting(model, state_dict) == 2
    assert model[0].bias.tolist() == [7, 7]
    assert model[1].running_var.tolist() == [9, 9]
    assert torch.equal(model[0].weight, before)


def test_a_checkpoint_of_another_model():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(
            ValueError, match="such as 'fc.bias', the model such as '0.w"):
        load_fitting(model, {'fc.bias': torch.ones(2)})


def test_a_config_of_a_tuned_model_is_built():
    config = Config(
        dict(model=dict(type='mmtune.TuneModeModel', architecture=RESNET)))
    model = build_model(config)
    assert all(type(m) is type(m) for m in model.modules())
    assert len(turn_on(model).rewritten) == 20


def test_a_callable_that_gives_a_tuned_model(monkeypatch):
    monkeypatch.setattr(toy, 'tuned', lambda: tuned(toy.conv_bns()),
                        raising=False)
    model = call_for_model('tests.toy:tuned')
    assert all(type(m) is type(m) for m in model.modules())


def tuned(model):
    turn_on(model, norm_eval=True)
    return model


@pytest.mark.parametrize('settings, message', [
    (dict(type='ResNot'), 'cannot be built here.*ResNot'),
    (dict(type='mmdet.ResNet', deep=18), "cannot be built here.*'deep'"),
])
def test_models_that_cannot_be_built(settings, message):
    with pytest.raises(ValueError, match=message):
        build_model(Config(dict(default_scope='mmdet', model=settings)))


@pytest.mark.parametrize('init_cfg', [
    CONSTANT, [PRETRAINED, CONSTANT], [CONSTANT]
])
def test_initializations_other_than_by_weights_stay(init_cfg):
    config = resnet_config()
    config.model.init_cfg = init_cfg
    assert (build_model(config).conv1.weight == 7).all()
