import pytest
import torch
from mmengine.registry import MODELS

from mmtune.api import latest_runs
from mmtune.behaviours.activation import activation_runs
from tests import toy
from tests.toy import build_runner, losses

TOY = dict(type='ToyClassifier')


def build(**arguments):
    return MODELS.build(
        dict(type='mmtune.TuneModeModel', architecture=TOY, **arguments))


@pytest.mark.parametrize('arguments, blocks', [
    ({}, ['backbone.1', 'backbone.4', 'neck.1']),
    (dict(modules=['backbone']), ['backbone.1', 'backbone.4']),
    (dict(modules='neck', norm_eval=True), ['neck.1']),
    (dict(mode='eval'), []),
])
def test_builds_the_architecture_in_a_mode(arguments, blocks):
    model, stock = build(**arguments), toy.ToyClassifier()
    assert list(latest_runs(model)) == blocks
    assert isinstance(model, toy.ToyClassifier)
    assert list(model.state_dict()) == list(stock.state_dict())
    model.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(model.state_dict(), strict=True)
    assert model.backbone[0].weight.shape == (8, 3, 3, 3)


@pytest.mark.parametrize('arguments, is_on', [
    ({}, True), (dict(activations=False), False), (dict(mode='Eval'), False)])
def test_activations(arguments, is_on):
    model = MODELS.build(
        dict(type='mmtune.TuneModeModel', architecture=dict(TOY, act='SiLU'),
             **arguments))
    assert list(activation_runs(model)) == ['backbone.2'] * is_on


def test_steps_equal_those_of_the_architecture():
    batch = dict(inputs=torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 1]))
    model, stock = build(), toy.ToyClassifier()
    for step in ('val_step', 'test_step'):
        results = [getattr(m.eval(), step)(batch) for m in (model, stock)]
        assert torch.equal(*results)


def test_whole_run_equals_stock(tmp_path):
    runs = []
    for name, model in (('stock', TOY),
                        ('tuned', dict(type='mmtune.TuneModeModel',
                                       architecture=TOY))):
        runner = build_runner(tmp_path / name, validate=True, model=model)
        runner.train()
        runs.append(runner)
    torch.testing.assert_close(
        losses(runs[1]), losses(runs[0]), rtol=1e-5, atol=1e-5)
    state = torch.load(tmp_path / 'tuned' / 'epoch_2.pth')['state_dict']
    toy.ToyClassifier().load_state_dict(state, strict=True)


def test_takes_the_data_preprocessor_of_a_runner(tmp_path):
    runner = build_runner(
        tmp_path,
        model=dict(type='mmtune.TuneModeModel', architecture=TOY),
        data_preprocessor=dict(type='ImgDataPreprocessor'))
    preprocessor = runner.model.data_preprocessor
    assert type(preprocessor).__name__ == 'ImgDataPreprocessor'
    assert 'data_preprocessor' not in TOY


@pytest.mark.parametrize('arguments, error, message', [
    (dict(modules=['bakbone']), ValueError, "no submodule 'bakbone'"),
    (dict(mode='Deploy'), ValueError, "cannot have mode 'Deploy'"),
    (dict(mode='fold'), ValueError, "but got 'fold'"),
    (dict(module=['backbone']), TypeError, 'module'),
])
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        build(**arguments)
