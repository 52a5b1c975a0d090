import copy
import itertools
import json
from pathlib import Path

import mmcv
import pytest
import torch
from mmengine.fileio import load
from reproductions import classification, material

from mmtune.analysis.modes import MODES
from tests.tools.synthetic import doubted, filled, in_turn

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope='module')
def found():
    """What a run finds, with few small images."""
    with pytest.MonkeyPatch.context() as patch:
        stock = classification.finetune_digits.load_data
        patch.setattr(
            classification.finetune_digits, 'load_data',
            lambda size: [
                torch.utils.data.TensorDataset(*part[:16])
                for part in stock(size)
            ])
        patch.setattr(classification, 'in_processes', in_turn)
        for module in (classification, material):
            patch.setattr(module, 'fetch_weights', lambda: None)
        found = classification.run(
            seeds=(0, 1),
            lrs=(1e-4, 1e-3),
            epochs=1,
            size=32,
            batch_size=8,
            step_sizes=(32, ),
            rounds=2,
            batches=((64, 448), (8, 224)))
    return json.loads(json.dumps(found, allow_nan=False))


def with_accuracy(found, accuracies):
    """The same, with a constant accuracy for some modes and rates."""
    found = copy.deepcopy(found)
    for run in found['runs']:
        for (mode, lr), accuracy in accuracies.items():
            if (run['mode'], run['lr']) == (mode, lr):
                run['accuracy'] = accuracy
    return found


def test_each_mode_is_run_with_each_seed_and_rate(found):
    runs = [(run['mode'], run['lr'], run['seed']) for run in found['runs']]
    expected = itertools.product(('Train', 'Eval', 'Tune'), (1e-4, 1e-3),
                                 (0, 1))
    assert sorted(runs) == sorted(expected)
    assert all(0 <= run['accuracy'] <= 1 for run in found['runs'])


def test_a_step_of_tune_holds_less(found):
    step, = found['steps']
    peak = step['peak']
    assert peak['Tune'] < .9 * peak['Eval']
    assert peak['Eval'] == pytest.approx(peak['Train'], rel=.01)
    assert {len(seconds) for seconds in step['seconds'].values()} == {2}


@pytest.mark.parametrize('mode', MODES)
def test_count_without_content_is_that_of_the_cpu(mode):
    counted = classification.count_training(mode, 2, 64)
    assert counted == pytest.approx(
        classification.count_training(mode, 2, 64, device='cpu'), rel=.01)


def test_count_grows_by_the_feature_maps_alone():
    """Parameters, gradients and momentum do not depend on the batch."""
    small, large, larger = (
        classification.count_training('Train', batch, 224)
        for batch in (16, 32, 64))
    assert larger - large == pytest.approx(2 * (large - small), rel=.01)
    model = classification.ResNet50Classifier(200)
    weights = sum(p.nbytes for p in model.parameters())
    # At the peak, few gradients are there yet.
    assert 2 * weights < 2 * small - large < 3 * weights


def test_page_quotes_the_script(found):
    values = classification.figures(found)
    script = (ROOT / 'tools/finetune_digits.py').read_text()
    assert values['script'] == f'```python\n{script}```'
    text = filled('classification', found)
    commands = text.split('## Not run here')[1]
    for config in (ROOT / 'configs/resnet').glob('*.py'):
        assert str(config.relative_to(ROOT)) in commands


def test_page_compares_the_best_rate_of_each_mode(found):
    accuracies = {
        ('Train', 1e-4): .5, ('Eval', 1e-4): .9, ('Tune', 1e-4): .9,
        ('Train', 1e-3): .9, ('Eval', 1e-3): .1, ('Tune', 1e-3): .1}
    found = with_accuracy(found, accuracies)
    text = filled('classification', found)
    assert 'Tune less Train at its own (0.001): +0.000. These' in text
    same = 'these runs cannot tell Tune from Eval, nor from Train'
    assert same not in doubted('classification', found)
    runs = [run for run in found['runs'] if run['mode'] == 'Tune']
    for run in runs:
        run['accuracy'] -= (.2, .201)[run['seed']]
    text = filled('classification', found)
    # t(1) = 12.706, the standard error is 0.0005.
    assert 'less Eval at its own (0.0001): -0.201 (-0.207 to -0.194).' in text
    assert same in doubted('classification', found)


@pytest.mark.parametrize('lrs, holds', [
    ((1e-5, 1e-4, 1e-3), True), ((1e-4, 1e-3), False)
])
def test_best_rates_at_the_edge_are_noticed(lrs, holds):
    best = {'Train': max(lrs), 'Eval': 1e-4, 'Tune': 1e-4}
    found = dict(lrs=lrs, counts=[], runs=[
        dict(mode=mode, lr=lr, seed=0, accuracy=float(lr == rate))
        for mode, rate in best.items() for lr in lrs])
    assert holds == (not any('at the edge' in claim for claim in doubted(
        'classification', found)))


def test_page_says_where_fixed_statistics_fail(found):
    failed = with_accuracy(found, {('Train', 1e-3): .9, ('Eval', 1e-3): .1,
                                   ('Tune', 1e-3): .1})
    text = filled('classification', failed)
    assert 'Train mode learns while Eval and Tune do not: 0.001.' in text
    learned = with_accuracy(failed, {('Tune', 1e-3): .9, ('Eval', 1e-3): .9})
    assert 'at some learning rate Train alone learns' in doubted(
        'classification', learned)


@pytest.mark.parametrize('share, other, holds', [
    (.62, .62, False), (.5, .5, True), (.5, .62, False)
])
def test_page_judges_the_memory_saved(found, share, other, holds):
    found = copy.deepcopy(found)
    for count, kept in zip(found['counts'], (share, other)):
        count['peak']['MMEngine'] = kept * count['peak']['Train']
    text = filled('classification', found)
    assert f'saves {1 - share:.0%} of it' in text
    assert f'{1 - other:.0%} at 8 x 3 x 224 x 224' in text
    assert holds == (not any('at any size' in claim for claim in doubted(
        'classification', found)))


def test_single_seed_is_not_judged(found):
    found = copy.deepcopy(found)
    found['runs'] = [run for run in found['runs'] if run['seed'] == 0]
    assert not any('cannot tell' in claim for claim in doubted(
        'classification', found))


def test_plot(found, tmp_path):
    classification.plot(found, tmp_path / 'plot.png')
    image = mmcv.imread(str(tmp_path / 'plot.png'))
    assert image.shape[1] == 960 and image.std() > 10


def test_figures_of_the_paper_are_those_of_the_metafile(found):
    models = {
        model['Name']: model
        for model in load(ROOT / 'configs/resnet/metafile.yml')['Models']
    }
    for data, key in (('CUB-200', 'cub'), ('Aircraft', 'aircraft'),
                      ('Cars', 'cars')):
        train, tune = (models[f'resnet50_8xb8{mode}_{key}']
                       for mode in ('', '-tune'))
        accuracies = [model['Results'][0]['Metrics']['Top 1 Accuracy']
                      for model in (train, tune)]
        memory, seconds = (
            [model['Metadata'][figure] for model in (train, tune)]
            for figure in ('Training Memory (GB)', 'Seconds per Iteration'))
        assert ('| {} | {:.2f} | {:.2f} | {:.0f} | {:.0f} | {:+.1%} | {:.3f} |'
                .format(data, *accuracies, *(1000 * gb for gb in memory),
                        memory[1] / memory[0] - 1, seconds[1] / seconds[0])
                ) in filled('classification', found)
        if key == 'cub':
            assert [*classification.PAPER.values()] == pytest.approx(
                [1000 * gb for gb in memory])
