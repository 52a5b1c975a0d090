import copy
import json

import finetune_digits
import mmcv
import pytest
import torch
from reproductions import scratch

from mmtune.behaviours import convolution
from tests.tools.synthetic import doubted, filled, in_turn


@pytest.fixture(scope='module')
def found():
    """What a run finds, with few small images."""
    with pytest.MonkeyPatch.context() as patch:
        # conftest.py does so for each test, but not for this fixture.
        patch.setattr(convolution, 'SMALL_MAP', 0)
        patch.setattr(convolution, 'SMALL_SHARE', 0)
        patch.setattr(scratch, 'in_processes', in_turn)
        stock = finetune_digits.load_data
        for module in (scratch, finetune_digits):
            patch.setattr(
                module, 'load_data', lambda size: [
                    torch.utils.data.TensorDataset(*part[:40])
                    for part in stock(size)
                ])
        found = scratch.run(
            lrs=(0.01, 1e9),
            begins=(0, 1, None),
            controls=(1, ),
            seeds=(0, 1),
            epochs=2,
            size=8,
            batch_size=16,
            rounds=2)
    return json.loads(json.dumps(found, allow_nan=False))


def runs_of(found, **wanted):
    runs = [
        run for run in found['runs']
        if all(run[key] == value for key, value in wanted.items())
    ]
    assert runs
    return runs


def with_accuracy(found, accuracies, lr=0.01):
    """The same, each `begin` with another final accuracy."""
    found = copy.deepcopy(found)
    for run in runs_of(found, lr=lr):
        run['accuracy'][-1] = accuracies[run['begin']]
    return found


def verdict(found, lr='0.01'):
    """The row of a learning rate."""
    row, = (line for line in scratch.verdicts(found).splitlines()
            if line.startswith(f'| {lr} |'))
    return row


def test_runs_of_a_seed_are_alike_until_begin(found):
    for seed in (0, 1):
        runs = [run for run in runs_of(found, lr=0.01, seed=seed)
                if run['begin'] != 0]
        assert len(runs) == 3
        assert len({run['loss'][0] for run in runs}) == 1
        assert len({run['accuracy'][0] for run in runs}) == 1
        assert len({run['loss'][1] for run in runs}) > 1


def test_tune_goes_on_as_the_control_does(found):
    tune, stock = (runs_of(found, lr=0.01, begin=1, mode=mode)
                   for mode in ('Tune', 'Eval'))
    for ours, theirs in zip(tune, stock):
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-4)


def test_frozen_from_the_start_is_no_normalization(found, tmp_path):
    """The loss of a first step, computed with the BatchNorms taken out."""
    run, = runs_of(found, lr=0.01, begin=0, seed=0)
    assert len(run['loss']) == len(run['accuracy']) == 2
    model = scratch.SmallResNet().train()
    bare = copy.deepcopy(model)
    for module in list(bare.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(module, name, torch.nn.Identity())
    scratch.turn_on(model, norm_eval=True)
    images = torch.randn(2, 3, 8, 8)
    # The variance of a new BatchNorm is 1, its eps 1e-5.
    torch.testing.assert_close(
        model(images, None), bare(images, None), rtol=1e-3, atol=1e-4)


def test_what_is_no_number_is_none(found):
    assert any(
        None in run['loss'] for run in runs_of(found, lr=1e9))
    assert 'not a number' in scratch.results(found, 1e9)


def test_a_step_of_tune_holds_less(found):
    peak = found['step']['peak']
    assert peak['Tune'] < .9 * peak['Eval']
    assert {len(times) for times in found['step']['seconds'].values()} == {2}


@pytest.mark.parametrize('accuracies, text', [
    ({0: .9, 1: .9, None: .9}, '| 0, 1 | none |'),
    ({0: .1, 1: .9, None: .9}, '| 1 | 0 |'),
    ({0: .9, 1: .1, None: .9}, '| 0 | 1 |'),
    ({0: .9, 1: .88, None: .9}, '| 0 | 1 |'),
])
def test_page_judges_when_to_freeze(found, accuracies, text):
    assert text in verdict(with_accuracy(found, accuracies))


def test_page_judges_the_control(found):
    same = with_accuracy(found, {0: .9, 1: .9, None: .9})
    assert verdict(same).endswith('| 0 of 2 | 2 of 2 | 0.000 |')
    failing = with_accuracy(found, {0: .9, 1: .1, None: .9})
    assert verdict(failing).endswith('| 2 of 2 | 2 of 2 | 0.000 |')
    runs_of(same, lr=0.01, begin=1, mode='Eval')[1]['accuracy'][-1] = .3
    assert verdict(same).endswith('| 1 of 2 | 1 of 2 | 0.600 |')
    assert any('controls fail or learn as Tune does' in claim
               for claim in doubted('scratch', same))


def test_one_failing_seed_is_harm(found):
    found = with_accuracy(found, {0: .9, 1: .9, None: .9})
    runs = runs_of(found, lr=0.01, begin=1, mode='Tune')
    for run in runs:
        run['accuracy'][0] = .8
    assert '| 0, 1 | none | none |' in verdict(found)
    runs[1]['accuracy'][-1] = .1
    assert ('| 0 | 1 | `begin=1`: 80% or more before, 1 of 2 fail after |'
            in verdict(found))


@pytest.mark.parametrize('seconds, text', [
    ([.8, 1.], 'unclear'),
    ([.8, .8], '+10.0% |'),
    ([1.2, 1.2], '-10.0% |'),
])
def test_time_is_spared_where_it_is_beyond_its_spread(found, seconds, text):
    found = copy.deepcopy(found)
    found['step']['seconds'] = dict(
        Train=[1., .8] if text == 'unclear' else [1., 1.],
        Eval=[1., 1.], Tune=seconds)
    row, = (line for line in scratch.results(found, 0.01).splitlines()
            if line.startswith('| 1 | 0.0050'))
    assert text in row


def test_page_counts_what_is_frozen_in_mid_run(found):
    found = dict(with_accuracy(found, {0: .9, 1: .9, None: .9}), lrs=[0.01])
    assert 'in 1 of 1 settings (begin=1 at a learning rate of 0.01)' in (
        filled('scratch', found))


def test_networks_that_learn_without_normalization_are_told(found):
    found = with_accuracy(found, {0: .9, 1: .9, None: .9})
    assert 'frozen from the start, no network learns' in doubted(
        'scratch', found)


def test_plot(found, tmp_path):
    scratch.plot(found, tmp_path / 'plot.png')
    image = mmcv.imread(str(tmp_path / 'plot.png'))
    assert image.shape[1] == 960 and image.std() > 10
