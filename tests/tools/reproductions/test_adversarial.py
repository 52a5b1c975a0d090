"""The page on adversarial examples, with small images and few steps."""
import copy
import json

import mmcv
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from reproductions import adversarial
from reproductions import adversarial_runs as runs
from reproductions.adversarial_runs import RADIUS, STEP_SIZE, Attack, Target
from torch import nn

from tests.tools.synthetic import doubted, fill, filled


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        fill(tmp_path_factory.mktemp('adversarial'), monkeypatch)
        # test_material.py runs it.
        monkeypatch.setattr(runs, 'fetch_trees', lambda: None)
        found = adversarial.run(
            steps=2,
            rounds=2,
            digit_size=64,
            digit_batch=2,
            train_digits=20,
            train_batches=1,
            iterations=2,
            detector_batch=1)
    return json.loads(json.dumps(found, allow_nan=False))


@pytest.mark.slow
def test_the_same_perturbation_in_float64(found):
    for target in found['targets'].values():
        assert target['exact']['differing'] == [0, 0]
        assert target['exact']['loss_difference'] < 1e-10
        for row in target['rows'].values():
            assert row['from_eval']['differing'][0] < .02


@pytest.mark.slow
def test_memory(found):
    for target in found['targets'].values():
        rows = target['rows']
        assert set(target['ran']) <= {'fused', 'small'}
        assert target['ran']['fused'] > 0
        for key in ('kept', 'peak'):
            assert rows['Tune'][key] < rows['Eval'][key]


@pytest.mark.slow
def test_page(found):
    assert '| blocks of Tune, by how they ran |' in filled(
        'adversarial', found)
    same = 'in float64 Tune finds the same perturbation as Eval'
    faster = 'a step of Tune takes no more time'
    assert same not in doubted('adversarial', found)
    changed = copy.deepcopy(found)
    target = changed['targets']['detector']
    target['exact']['differing'] = [0, .5]
    target['rows']['Tune']['ratio'] = [1.2, 1.3, 1.4]
    assert {same, faster} <= {*doubted('adversarial', changed)}


@pytest.mark.slow
def test_plot(found, tmp_path):
    adversarial.plot(found, tmp_path / 'adversarial.png')
    assert mmcv.imread(tmp_path / 'adversarial.png').std() > 10


def test_attack_goes_up_and_stays_in_the_ball():
    """On a linear loss it is known where it goes."""
    slope = torch.tensor([1., -2., 0.]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    center = torch.randn(2, 3, 4, 4)
    target = Target(nn.Identity(), center,
                    lambda model, images: (model(images) * slope).sum(), None)
    steps = 12  # more than it takes from one side to the other
    found = runs.attack(target, target.model, torch.float64, steps)
    assert len(found.images) == len(found.losses) == steps + 1
    assert torch.equal(found.gradient, slope.double())
    start = found.images[0] - center
    assert start.abs().max() <= RADIUS and start.std() > RADIUS / 3
    first = found.images[1] - found.images[0]
    assert first.abs().max() <= STEP_SIZE * (1 + 1e-9)
    torch.testing.assert_close(found.images[-1][:, :2] - center[:, :2],
                               RADIUS * slope[:, :2].double().sign())
    assert torch.equal(found.images[-1][:, 2], found.images[0][:, 2])
    assert found.losses == sorted(found.losses)


def test_compare():
    start = torch.zeros(10)
    one = Attack([start, start + STEP_SIZE], [1., 2.], torch.ones(10))
    gradient = torch.tensor([-1e-6, *[2.] * 9])
    images = start + STEP_SIZE * gradient.sign()
    other = Attack([start, images], [1., 2.5], gradient)
    found = runs.compare(one, other)
    assert found['differing'] == [.1]
    assert found['flipped'] == 1
    assert found['median_flipped'] == pytest.approx(5e-7)
    assert found['loss_difference'] == pytest.approx(.2)
    assert runs.compare(one, one)['largest_flipped'] == 0


@pytest.mark.parametrize('scores, expected', [
    ([.9, .9], [True, False]),
    ([.1, .9], [False, False]),
    ([], [False, False]),
])
def test_hit(scores, expected):
    boxes = torch.tensor([[0., 0, 10, 9], [50, 50, 60, 60]])
    sample = DetDataSample(
        gt_instances=InstanceData(
            bboxes=torch.tensor([[0., 0, 10, 10], [20, 20, 30, 30]])),
        pred_instances=InstanceData(
            bboxes=boxes[:len(scores)], scores=torch.tensor(scores)))
    assert runs.hit(sample).tolist() == expected
