"""The page on the trees: what is run, read and said, and a short run."""
import json
import math

import demo
import mmcv
import pytest
import torch
from reproductions import accuracy

from tests.tools.synthetic import doubted, fill, filled, in_turn, shorten


def made_up(maps=None, tune_apart=0.1, threads_apart=0.1, seeds=(0, 1, 2)):
    """What might have come out; `maps` are those of a mode's seeds."""
    maps = {mode: [0.1, 0.12, 0.11] for mode in accuracy.MODES} | (maps or {})
    apart = {'Tune': tune_apart, accuracy.OTHER_THREADS: threads_apart}

    def one(mode, seed, mean_ap):
        losses = [2. + seed] + [1. + apart.get(mode, 0)] * 19
        return dict(mode=mode, seed=seed, mAP=mean_ap, AP50=3 * mean_ap,
                    losses=losses)

    runs = [one(mode, seed, maps[mode][i])
            for i, seed in enumerate(seeds) for mode in accuracy.MODES]
    return dict(
        iterations=20,
        runs=[*runs, one(accuracy.OTHER_THREADS, seeds[0], 0.105)])


def test_each_mode_is_what_its_name_says():
    for mode in (*accuracy.MODES, accuracy.OTHER_THREADS):
        config = accuracy.load_config(mode, 5)
        backbone = config.model.backbone
        assert backbone.norm_eval != mode.startswith('Train')
        assert (backbone.init_cfg is None) == ('scratch' in mode)
        key = config.get('efficient_conv_bn_eval')
        assert (key.mode if key else None) == (
            mode if mode in ('Tune', 'Deploy') else None)
        if mode == 'Tune':
            assert key.activations is False
        assert config.randomness.seed == 5


@pytest.mark.parametrize('losses, expected', [
    ([9.] * 18 + [1., 3.], 2.),
    ([9., 5.], 5.),
    ([None] * 18 + [1., 3.], 2.),
    ([9.] * 19 + [None], None),
])
def test_final_loss(losses, expected):
    assert accuracy.final_loss(losses) == expected


def test_a_mode_that_was_not_run_is_noticed():
    found = made_up()
    assert 'all modes were run' not in doubted('accuracy', found)
    found['runs'] = [run for run in found['runs']
                     if run['mode'] != 'Eval, from scratch']
    assert doubted('accuracy', found) == ['all modes were run']


def test_table():
    text = filled('accuracy', made_up())
    assert '| Tune | 0.110 ± 0.010 | 0.330 ± 0.030 |' in text
    assert '| Eval | 0.110 ± 0.010 | 0.330 ± 0.030 | 1.000 ± 0.000 | |' in (
        text)


def test_paired_interval():
    """Worked by hand: mean -3, standard error 1 / sqrt(3), t(2) = 4.3027."""
    by_mode = accuracy.group(
        made_up(dict(Tune=[1, 2, 3], Eval=[5, 5, 5]))['runs'])
    found = accuracy.compare(by_mode, 'Tune', 'Eval')
    assert found.mean == -3
    reach = 4.302653 / math.sqrt(3)
    assert found.interval == pytest.approx((-3 - reach, -3 + reach), rel=1e-6)


@pytest.mark.parametrize('tune, says', [
    ([0.11, 0.13, 0.12], '+0.010 (+0.010 to +0.010) | yes |'),
    ([0.11, 0.12, 0.13], '+0.010 (-0.015 to +0.035) | not known |'),
    ([0.31, 0.32, 0.33], '+0.210 (+0.185 to +0.235) | yes |'),
    ([0.1, 0.12, 0.11], '+0.000 | not known |'),
])
def test_what_the_page_says_of_accuracies(tune, says):
    found = made_up(dict(Tune=tune))
    assert f'| Tune | Eval | {says}' in filled('accuracy', found)
    assert ('yes' in says) == (
        'these runs cannot tell Tune, nor Deploy, from Eval' in doubted(
            'accuracy', found))


def test_modes_that_learn_from_scratch_are_noticed():
    claim = 'neither mode learns to detect from scratch'
    assert claim in doubted('accuracy', made_up())
    assert claim not in doubted('accuracy', made_up({
        mode: [0.001, 0.002, 0.001] for mode in accuracy.MODES
        if 'scratch' in mode}))


def test_one_seed_tells_nothing():
    text = filled('accuracy', made_up(seeds=(3, )))
    assert '| yes |' not in text and text.count('| not known |') == 5


@pytest.mark.parametrize('tune, threads, alike', [
    (0.1, 0.1, True), (0.1, 0.001, False), (0.001, 0.1, False)
])
def test_what_the_page_says_of_rounding(tune, threads, alike):
    found = made_up(tune_apart=tune, threads_apart=threads)
    assert f'({tune / threads:.2g} times, by' in filled('accuracy', found)
    assert alike == (not any('as thread counts' in claim
                             for claim in doubted('accuracy', found)))


def test_a_run_that_diverges_is_shown(tmp_path):
    found = made_up()
    for run in found['runs']:
        if run['mode'] in ('Deploy', accuracy.OTHER_THREADS):
            run['losses'][-1] = None
    text = filled('accuracy', found)
    assert 'not finite in 3 runs' in text and '(nan times' in text
    assert 'all losses are finite' in doubted('accuracy', found)
    accuracy.plot(found, tmp_path / 'plot.png')


def test_plot(tmp_path):
    accuracy.plot(made_up(), tmp_path / 'plot.png')
    accuracy.plot(made_up(dict(Tune=[.3, .3, .3])), tmp_path / 'other.png')
    picture = mmcv.imread(tmp_path / 'plot.png')
    assert picture.std() > 10
    assert (picture != mmcv.imread(tmp_path / 'other.png')).any()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder where data and weights are there, and training is short."""
    fill(tmp_path, monkeypatch, crops=2, size=64)
    shorten(demo.MODES, tmp_path, monkeypatch, iterations=2)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_run(place, monkeypatch):
    monkeypatch.setattr(accuracy, 'in_processes', in_turn)
    modes = ('Eval', 'Tune')
    found = accuracy.run(modes, seeds=(0, ))
    found = json.loads(json.dumps(found, allow_nan=False))
    assert [run['mode'] for run in found['runs']] == [
        *modes, accuracy.OTHER_THREADS
    ]
    assert all(len(run['losses']) == 2 for run in found['runs'])
    first = [run['losses'][0] for run in found['runs']]
    assert first == pytest.approx([first[0]] * 3, rel=1e-4)
    assert 'over 1 seeds' in filled('accuracy', found)
