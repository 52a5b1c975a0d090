"""The page on numerical precision, with few and short trainings."""
import json

import mmcv
import pytest
import torch
from reproductions import precision

from tests.oracle import runs
from tests.tools.synthetic import doubted, filled


@pytest.fixture(scope='module')
def found():
    found = precision.run(
        steps=4, every=2, networks=2, variances=(1., 0.))
    return json.loads(json.dumps(found, allow_nan=False))


def test_every_variance_in_every_precision(found):
    assert [(row['var'], row['precision']) for row in found['rows']] == [
        (var, precision) for var in (1., 0.)
        for precision in ('float32', 'bfloat16', 'float16')
    ]
    assert found['rows'][-1]['rstd'] == pytest.approx(316.228, rel=1e-5)
    assert found['points'] == [0, 2, 4]


def test_errors_are_those_of_the_precision(found):
    """Of the order of the last digit, neither none nor a wrong result."""
    for row in found['rows']:
        eps = torch.finfo(getattr(torch, row['precision'])).eps
        for mode in ('Eval', 'Tune'):
            for block in row['rounding'][mode]:
                for key in ('output', 'x', 'conv.weight', 'norm.weight'):
                    assert eps / 30 < block[key] < 30 * eps
            start, *later = row['drift'][mode]['medians']
            assert start == 0. and len(row['drift'][mode]['last']) == 2
            later += row['drift'][mode]['last']
            assert all(0 < d < 30 * eps for d in later)


@pytest.mark.parametrize('mode, ran', [('Eval', []), ('Tune', ['fused'] * 2)])
def test_what_is_measured_is_the_mode(mode, ran):
    task = precision.Task(2, 0., 0)
    model = task.model(mode, torch.float32)
    model(task.inputs[0].float())
    assert runs(model) == ran


def test_gradients_are_those_of_a_loss():
    """By finite differences, through both blocks."""
    task = precision.Task(2, 1., 0)
    model = task.model('Eval', torch.float64)
    x, grad = task.inputs[0], task.targets[0]
    found = precision.gradients(model, x, grad)
    for block, name in ((0, 'conv.weight'), (1, 'norm.weight')):
        part = model[2 * block].get_parameter(name)
        with torch.no_grad():
            values = []
            for change in (1e-6, -2e-6):
                part.view(-1)[1] += change
                values.append(float((model(x) * grad).sum()))
            part.view(-1)[1] += 1e-6
        slope = (values[0] - values[1]) / 2e-6
        assert found[block][name].view(-1)[1] == pytest.approx(slope, 1e-5)


def test_training_learns():
    task = precision.Task(2, 1., 0)
    states = list(task.train('Tune', 'float64', 200, 100))

    def error(state):
        model = task.model('Eval', torch.float64)
        model.load_state_dict(state)
        with torch.no_grad():
            return (model(task.inputs[0]) - task.targets[0]).norm()

    assert error(states[-1]) < .5 * error(states[0])


def test_page(found):
    assert '| 316.2 | 2 |' in filled('precision', found)


@pytest.mark.parametrize('factor, beyond', [(1., 0), (3., 2)])
def test_doubts_follow_the_figures(found, factor, beyond):
    changed = json.loads(json.dumps(found))
    for row in changed['rows']:
        row['rounding']['Tune'] = [{
            key: factor * value for key, value in block.items()
        } for block in row['rounding']['Eval']]
        row['drift']['Tune'] = {
            key: [factor * value for value in values]
            for key, values in row['drift']['Eval'].items()
        }
    assert sum('above 1.5' in claim
               for claim in doubted('precision', changed)) == beyond


def test_plot(found, tmp_path):
    precision.plot(found, tmp_path / 'precision.png')
    assert mmcv.imread(tmp_path / 'precision.png').std() > 10
