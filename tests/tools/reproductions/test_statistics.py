"""The page on unstable statistics, with few steps and small images."""
import copy
import json

import mmcv
import pytest
import torch
from reproductions import statistics
from reproductions import statistics_runs as runs
from torch import nn

from tests.tools.synthetic import doubted, fill, filled


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        fill(tmp_path_factory.mktemp('statistics'), monkeypatch)
        # test_material.py runs it.
        monkeypatch.setattr(runs, 'fetch_trees', lambda: None)
        found = statistics.run(interval=1, size=32, batch_size=2)
    return json.loads(json.dumps(found, allow_nan=False))


@pytest.mark.slow
def test_tune_follows_at_every_step(found):
    assert found['steps'] == 8
    curves = found['runs']['float64']
    for run in ('Tune', 'Tune, same point'):
        assert len(curves[run]['difference']) == 8
        assert max(curves[run]['difference']) < 1e-10
    assert max(curves['Tune']['loss_difference']) < 1e-10
    # Deploy does not.
    assert curves['Deploy']['loss'][0] == pytest.approx(
        curves['Eval']['loss'][0])
    assert curves['Deploy']['loss_difference'][4] > 1e-3


@pytest.mark.slow
def test_how_blocks_ran(found):
    blocks = found['blocks']
    assert blocks == 30
    assert found['ran'] == [dict(fused=blocks)] * 2 + [{
        'train mode': blocks
    }] + [dict(fused=blocks)] * 5


@pytest.mark.slow
def test_page(found):
    assert '| a variance of 0 |' in filled('statistics', found)
    own = {'from the same point float64 agrees to what is promised',
           'without ReLU6 no error in float32 is large'}
    assert not own & {*doubted('statistics', found)}
    changed = copy.deepcopy(found)
    changed['smooth']['Tune'][0] = 1e-3
    changed['runs']['float64']['Tune, same point']['error'][3] = 1e-3
    changed['runs']['float64']['Tune']['loss_difference'][3] = 1.
    assert {*own, 'Tune stays as near to Eval as Eval does to itself'
            } <= {*doubted('statistics', changed)}


@pytest.mark.slow
def test_plot(found, tmp_path):
    statistics.plot(found, tmp_path / 'statistics.png')
    assert mmcv.imread(tmp_path / 'statistics.png').std() > 10


class Net(nn.Module):
    """As the classifier of digits is called."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, images, labels):
        return self.bn(images)


def test_reestimated_statistics_are_those_of_the_images():
    model = Net().eval()
    images = torch.randn(4, 6, 3, 5, 5) * 3 + 1
    runs.reestimate(model, images)
    var, mean = torch.var_mean(images, (1, 3, 4))
    torch.testing.assert_close(model.bn.running_mean, mean.mean(0))
    torch.testing.assert_close(model.bn.running_var, var.mean(0))
    assert not model.bn.training and model.bn.momentum == 0.1


def test_worst():
    stock = {
        'a.conv.weight': torch.tensor([3., 4.]),
        'a.bn.bias': torch.zeros(2),
        'head.weight': torch.tensor([1e3])
    }
    assert runs.worst(stock, stock) == 0
    gradients = dict(stock, **{'a.bn.bias': torch.tensor([.5, 0.])})
    assert runs.worst(gradients, stock) == pytest.approx(.1)
