"""The page on Deploy's stability, with two learning rates and few steps."""
import copy
import json
import math

import mmcv
import pytest
import torch
from reproductions import limits, mechanism
from reproductions import mechanism_runs as runs

from mmtune.analysis import lr_limit
from tests.oracle import randomize, step
from tests.tools.synthetic import doubted, filled, in_turn


@pytest.fixture(scope='module')
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, 'in_processes', in_turn)
        found = mechanism.run(
            times=(1., 0.1),
            lrs=(0.02, 50.),
            seeds=(0, ),
            steps=12,
            pretrain_steps=20,
            control_lr=0.002,
            alone_lrs=(0.002, 1e4))
    return json.loads(json.dumps(found, allow_nan=False))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = randomize(runs.build_model(5)).double().eval()
    torch.nn.init.normal_(model[-1].weight)
    return model


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 1, 8, 8, generator=generator).double()


def coefficients(model):
    return {
        name: norm.weight / (norm.running_var + norm.eps).sqrt()
        for name, norm in model.named_modules()
        if isinstance(norm, torch.nn.BatchNorm2d)
    }


@pytest.mark.parametrize('times', [0.1, 7.])
def test_scales_are_multiplied_and_the_function_is_not(model, times):
    other = copy.deepcopy(model)
    runs.multiply_scales(other, times)
    torch.testing.assert_close(
        other(images()), model(images()), rtol=1e-12, atol=1e-12)
    expected = coefficients(model)
    assert len(expected) == 9
    for name, coeff in coefficients(other).items():
        torch.testing.assert_close(coeff, times * expected[name])


def test_only_the_gradient_of_weights_is_multiplied(model):
    plain, corrected = (
        step(runs.put(model, mode), images())
        for mode in ('Deploy', runs.CORRECTED))
    squares = {
        name: coeff.square().view(-1, 1, 1, 1)
        for name, coeff in coefficients(model).items()
    }
    multiplied = 0
    for name, gradient in plain.items():
        if name.startswith('grad of') and gradient.dim() == 4 and (
                'input' not in name):
            conv = name.removeprefix('grad of ').removesuffix('.weight')
            # The norms are bn1, bn2, or the next in a Sequential.
            norm = {'0': '1'}.get(conv) or conv.replace('conv', 'bn').replace(
                'shortcut.0', 'shortcut.1')
            gradient = gradient * squares[norm]
            multiplied += 1
        torch.testing.assert_close(corrected[name], gradient)
    assert multiplied == 9


def test_training_and_test_images_are_apart():
    *_, train_labels, tests, test_labels = runs.load_data(
        runs.FINE_TUNED_ON, 0)
    trained = runs.load_data(runs.FINE_TUNED_ON, 0)[0]
    assert len(train_labels) + len(test_labels) == 896
    assert set(train_labels.tolist()) == set(test_labels.tolist()) == set(
        range(5))
    assert trained.shape[1:] == tests.shape[1:] == (1, 8, 8)
    other = runs.load_data(runs.FINE_TUNED_ON, 1)[0]
    assert not torch.equal(trained, other)


def test_training_stops_where_the_loss_is_infinite():
    data = runs.load_data(runs.FINE_TUNED_ON, 0)[:2]
    model = runs.build_model(5)
    losses = runs.train(model, *data, steps=30, lr=1e30, seed=0)
    assert len(losses) < 30
    assert losses[0] == pytest.approx(math.log(5), rel=1e-5)
    assert all(map(math.isfinite, losses[:-1]))
    assert not math.isfinite(losses[-1])


@pytest.mark.parametrize('losses, limit, best', [
    ([1.5, 0.3, None], 0.2, 1),
    ([0.3, None, 0.7], 0.4, 0),
    ([1.6, 0.9, None], None, None),
])
def test_limit(losses, limit, best):
    of = dict(times=1., seed=0)
    row, = mechanism.summarize(dict(
        scales=[of], lrs=[0.1, 0.2, 0.4],
        sweeps=[dict(of, mode='Tune', losses=losses),
                dict(of, seed=1, mode='Tune', losses=[0., 0., 0.])]))
    assert row['limit']['Tune'] == limit
    assert row['best']['Tune'] == best


@pytest.mark.parametrize('losses, others, largest', [
    ([1., 2.], [1.5, 2.25], 0.5),
    ([1., 2.], [1., math.inf], None),
    ([1., 2., 3.], [math.nan], None),
    ([1., math.nan], [1., 2.], None),
])
def test_largest_difference(losses, others, largest):
    assert runs.largest_difference(losses, others) == largest


@pytest.mark.slow
def test_controls(found):
    """What holds in float64 whatever is measured."""
    for row in found['controls']:
        assert row['function'] < 1e-12
        assert row['rescaled'] < 1e-12
        assert row['runs'] == {'fused': 9}
        for gamma in ('fixed', 'learning'):
            assert row[gamma]['Eval'] < 1e-12
        assert row['fixed'][runs.CORRECTED] < 1e-12
        assert row['fixed']['Deploy'] > 1e-4
        assert row['learning'][runs.CORRECTED] > 1e-6


@pytest.mark.slow
def test_sweeps(found):
    assert [(row['times'], row['mode']) for row in found['sweeps']] == [
        (times, mode) for times in (1., 0.1) for mode in runs.MODES
    ]
    for row in found['sweeps']:
        small, large = row['losses']
        assert 0 < small < 5 and (large is None or large > small)
        assert all(0 <= share <= 1 for share in row['accuracies'])
    by_mode = {(row['times'], row['mode']): row['losses'][0]
               for row in found['sweeps']}
    for times in (1., 0.1):
        assert by_mode[times, 'Tune'] == pytest.approx(
            by_mode[times, 'Eval'], rel=1e-2)
    assert by_mode[0.1, 'Deploy'] == pytest.approx(
        by_mode[1., 'Deploy'], rel=1e-2)


@pytest.mark.slow
def test_weights_alone(found):
    """With nothing else learning, Deploy takes the same path at any scale."""
    assert [(row['times'], row['mode'])
            for row in found['alone']['sweeps']] == [
                (times, mode) for times in (1., 0.1)
                for mode in runs.ALONE_MODES
            ]
    by_mode = {(row['times'], row['mode']): row['losses']
               for row in found['alone']['sweeps']}
    assert by_mode[0.1, 'Deploy'][0] == pytest.approx(
        by_mode[1., 'Deploy'][0], rel=1e-2)
    for small, large in by_mode.values():
        assert large is None or large > small


@pytest.mark.parametrize('mode', ['Tune', 'Deploy'])
def test_nothing_but_weights_learns(model, mode):
    runs.learn_weights_alone(model)
    tuned = runs.put(model, mode)
    runs.learn_weights_alone(tuned)
    before = {name: p.clone() for name, p in tuned.named_parameters()}
    data = runs.load_data(runs.FINE_TUNED_ON, 0)[:2]
    runs.train(tuned, data[0].double(), data[1], 1, 0.1, 0)
    changed = {name for name, p in tuned.named_parameters()
               if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters()
                       if p.dim() == 4}


@pytest.mark.slow
def test_scales_are_described(found):
    original, smaller = found['scales']
    for key in ('min', 'median', 'max'):
        assert smaller[key] == pytest.approx(original[key] / 10, rel=1e-4)
    assert smaller['limits'][0] == pytest.approx(
        lr_limit(torch.tensor([smaller['min']]).double(), 1.))
    assert original['upper_limit'] == pytest.approx(
        max(1, original['max']**2))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mechanism', 'limits'])
def test_page_and_plot(found, tmp_path, name):
    assert '| x 0.1 |' in filled(name, found)
    dict(mechanism=mechanism, limits=limits)[name].plot(
        found, tmp_path / 'plot.png')
    assert mmcv.imread(tmp_path / 'plot.png').std() > 10


def made_up(limits, apart=1e-15, alone=(1., 1.)):
    """What might have come out: the limits of Tune and Deploy at x 1.

    `alone` has those where nothing but weights learns.
    """
    lrs = [0.01, 0.1, 1., 10.]

    def losses(limit):
        return [0.1 if lr <= limit else None for lr in lrs]

    others = {mode: apart for mode in ('Eval', runs.CORRECTED)}
    return dict(
        lrs=lrs,
        alone=dict(
            lrs=lrs,
            sweeps=[
                dict(times=1., mode=mode, seed=0, accuracies=[0.9] * 4,
                     losses=losses(limit))
                for mode, limit in zip(runs.ALONE_MODES, alone)
            ]),
        steps=3,
        pretrained=[0.9],
        scales=[
            dict(times=1., seed=0, min=0.5, median=1., max=2.,
                 limits=[0.25, 0.5, 1.], upper_limit=4., best_lr=1.)
        ],
        sweeps=[
            dict(times=1., mode=mode, seed=0, accuracies=[0.9] * 4,
                 losses=losses(limits[mode == 'Deploy']))
            for mode in runs.MODES
        ],
        controls=[
            dict(times=1., seed=0, lr=0.1, function=apart, rescaled=apart,
                 learning=others | dict(Deploy=1.),
                 fixed=others | dict(Deploy=1.), runs=dict(fused=9))
        ])


FIRST = 'Deploy fails first'
BOUND = 'the bound holds'
FAR = 'but it does not tell where Deploy fails'
FOLLOWS = 'with gamma fixed, Deploy follows'
NOTICES = 'Deploy does not notice'
EXACT = "Tune's losses are Eval's"


@pytest.mark.parametrize('reached, apart, wrong', [
    ((1., 0.1), 1e-15, {FIRST, BOUND, FAR}),
    ((0.1, 1.), 1e-15, set()),
    ((0.1, 0.1), 1e-15, {FAR}),
    ((1., 1.), 0.5, {FOLLOWS, NOTICES, EXACT, FAR}),
    ((1., 1.), None, {FOLLOWS, NOTICES, EXACT, FAR}),
])
def test_doubts_follow_from_the_figures(reached, apart, wrong):
    found = made_up(reached, apart)
    if apart is None:
        found['controls'][0]['function'] = 0.
    doubts = [*doubted('mechanism', found), *doubted('limits', found)]
    for phrase in (FIRST, BOUND, FAR, FOLLOWS, NOTICES, EXACT):
        assert any(phrase in doubt for doubt in doubts) == (phrase in wrong)


def test_where_deploy_never_learns():
    found = made_up((0.1, 0.), alone=(1., 0.))
    text = filled('mechanism', found)
    assert 'x 1: none.**' in text and '| nan (nan) |' in text
    assert 'on 0 of 0 checkpoints' in filled('limits', found)
    assert any(BOUND in doubt for doubt in doubted('limits', found))


@pytest.mark.parametrize('at_eval, own, times, undone', [
    (0.9, 0.9, 10, True), (0.5, 0.9, 10, True), (0.5, 0.6, 10, False)
])
def test_what_the_page_says_of_the_best_learning_rates(
        at_eval, own, times, undone):
    found = made_up((1., 1.))
    for row in found['sweeps']:
        if row['mode'] == 'Deploy':
            row.update(losses=[0.05, 0.1, 0.1, None],
                       accuracies=[own, at_eval, at_eval, 0.2])
        else:
            row.update(losses=[0.1, 0.05, 0.1, None])
    assert f'({0.05:.2g}) | {times} |' in filled('mechanism', found)
    assert undone == (not any('undoes' in doubt for doubt in doubted(
        'mechanism', found)))


@pytest.mark.parametrize('alone, between', [
    # The squares of the scales go from 0.25 to 4, limits by factors of 10.
    ((1., 1.), 1), ((0.01, 0.1), 1), ((0.01, 1.), 0), ((10., 0.1), 0),
])
def test_what_the_page_says_where_nothing_but_weights_learns(alone, between):
    found = made_up((1., 1.), alone=alone)
    assert f'on {between} of 1 checkpoints' in filled('limits', found)
    assert bool(between) == (
        'where nothing but weights learns, the scales bound the limit'
        not in doubted('limits', found))
