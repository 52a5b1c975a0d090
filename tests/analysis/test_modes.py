"""Models put into the modes that are compared."""
import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmtune import turn_on
from mmtune.analysis.modes import (
    MODES,
    PAPERS_TUNE,
    put_in_mode,
    randomize_new_norms,
)
from mmtune.api import latest_runs
from mmtune.behaviours.activation import activation_runs
from mmtune.deploy import FoldedNorm
from tests.oracle import randomize
from tests.toy import ToyClassifier, conv_bns

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def in_mode(mode, model=None, modules=None):
    model = model or conv_bns(torch.float32)
    return model, put_in_mode(model, mode, modules)


@pytest.mark.parametrize('mode', MODES)
def test_the_model_trains_but_for_its_norms(mode):
    model, report = in_mode(mode)
    for module in model.modules():
        is_norm = isinstance(module, (_BatchNorm, FoldedNorm))
        if not is_norm:
            assert module.training
        elif not isinstance(module, FoldedNorm):
            assert module.training == (mode == 'Train')
    assert (report is not None) == (mode in ('Tune', PAPERS_TUNE, 'Deploy'))
    if report:
        assert report.mode == mode.split(',')[0]
        assert len(report.rewritten) == 2


@pytest.mark.parametrize('mode', ['MMEngine', PAPERS_TUNE, 'Tune', 'Deploy'])
def test_the_modes_compute_what_eval_does(mode):
    torch.testing.assert_close(in_mode(mode)[0](X), in_mode('Eval')[0](X))


def test_train_does_not():
    found = in_mode('Train')[0](X)
    assert not torch.allclose(found, in_mode('Eval')[0](X), rtol=.1)


def test_tune_runs_folded():
    model, _ = in_mode('Tune')
    model(X)
    assert latest_runs(model) == {'1': 'fused', '4': 'fused'}


@pytest.mark.parametrize('mode', MODES)
def test_activations_keep_one_map_in_tune_alone(mode):
    model, _ = in_mode(mode, ToyClassifier(act='SiLU'), ['backbone'])
    model(X, torch.zeros(2, dtype=torch.long))
    assert activation_runs(model) == (
        {'backbone.2': 'one map'} if mode == 'Tune' else {})


def test_what_mmengine_raises_is_passed_on():
    with pytest.raises(torch.fx.proxy.TraceError):
        in_mode('MMEngine', ToyClassifier())


@pytest.mark.parametrize('mode', ['Train', 'Eval', PAPERS_TUNE, 'Tune',
                                  'Deploy'])
@pytest.mark.parametrize('norm_eval', [True, False])
def test_switches_of_backbones_follow(mode, norm_eval):
    model, _ = in_mode(mode, ToyClassifier(norm_eval))
    assert model.norm_eval == (mode != 'Train')
    model.train()
    assert model.backbone[1].training == (mode == 'Train') or (
        mode == 'Deploy')


@pytest.mark.parametrize('mode', MODES)
def test_some_modules(mode):
    model, report = in_mode(mode, ToyClassifier(False), ['neck'])
    assert model.norm_eval is False
    assert model.backbone[1].training and model.backbone[4].training
    if mode == 'Deploy':
        assert isinstance(model.neck[1], FoldedNorm)
    else:
        assert model.neck[1].training == (mode == 'Train')
    if report:
        assert [row.bn for row in report.rewritten] == ['neck.1']


@pytest.mark.parametrize('mode, modules, error, message', [
    ('Trian', None, ValueError, "one of Train, Eval.*but got 'Trian'"),
    ('tune', None, ValueError, "but got 'tune'"),
    ('Eval', ['nack'], ValueError, 'nack'),
    ('Tune', ['2'], ValueError, 'nothing to put into Tune mode'),
])
def test_what_cannot_be_done(mode, modules, error, message):
    with pytest.raises(error, match=message):
        in_mode(mode, modules=modules)


def norms(model):
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def test_new_norms_are_randomized_always_alike():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    other = copy.deepcopy(model)
    for each in (model, other):
        randomize_new_norms(each)
    torch.testing.assert_close(model.state_dict(), other.state_dict(),
                               rtol=0, atol=0)
    norm = model[1]
    for tensor in (norm.running_mean, norm.running_var, norm.weight,
                   norm.bias):
        assert tensor.unique().numel() == 8
    assert norm.running_var.min() > 0
    assert norm.weight.requires_grad
    before = model.eval()(X)
    turn_on(model, 'Deploy')
    torch.testing.assert_close(model(X), before)


def test_trained_norms_stay():
    model = randomize(nn.Sequential(nn.BatchNorm2d(4)))
    before = copy.deepcopy(model.state_dict())
    randomize_new_norms(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize('norm', [
    nn.BatchNorm2d(4, affine=False),
    nn.BatchNorm2d(4, track_running_stats=False),
    nn.SyncBatchNorm(4),
])
def test_norms_of_other_kinds_are_randomized(norm):
    randomize_new_norms(norm)
    if norm.running_mean is not None:
        assert norm.running_mean.any()
