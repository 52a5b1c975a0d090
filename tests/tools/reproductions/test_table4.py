"""The page on the paper's Table 4, at a size of images that is quick."""
import copy
import functools
import json
from pathlib import Path
from unittest import mock

import mmcv
import pytest
from mmengine import fileio
from mmengine.config import Config
from reproductions import table4, table4_steps

from mmtune.behaviours import convolution
from tests.tools.synthetic import doubted, filled, in_turn

MIB = 2**20
SMALL = 'retinanet_r50_fpn_tune-1x_coco'


@pytest.fixture(scope='module', autouse=True)
def in_root():
    """Configs are read from where the driver is started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[3])
        patch.setattr(table4_steps, 'in_processes', in_turn)
        yield


@pytest.fixture(scope='module')
def measured():
    # Every level of the FPN has several pixels.
    with mock.patch.multiple(convolution, SMALL_MAP=0, SMALL_SHARE=0):
        found = table4.run(shape=(128, 160), batches=(2, ), names=[SMALL])
    return json.loads(json.dumps(found, allow_nan=False))


def row(name='a', batch=2, precision='FP32', gb=(2., 1.), steps=None,
        weights=10 * MIB, **more):
    """A row with totals in MiB by batch, in the order of the modes."""
    return dict(
        name=name,
        config=f'configs/x/{name}_tune-1x_coco.py',
        eval=f'configs/x/{name}_1x_coco.py',
        model=more.get('model', name),
        batch=batch,
        precision=precision,
        gb=list(gb),
        ap=[30.25, 31.5],
        weights=weights,
        steps={
            str(number): {
                mode: dict(
                    kept=0, peak=total * MIB - 7 * MIB, resident=7 * MIB)
                for mode, total in zip(table4.MODES, totals)
            }
            for number, totals in (steps or {2: (4000, 3000, 2900)}).items()
        })


def half_rows(fixed, slope=100):
    """A model at three batches; the paper saves 100 MiB an image less 40."""
    steps = {
        batch: (2000 + 500 * batch,
                2000 + (500 - slope) * batch - fixed, 1000)
        for batch in (1, 2, 3)
    }
    return [
        row(f'r{batch}', batch, 'FP16', (9., 9. - (.1 * batch - .04)), steps,
            model='r')
        for batch in (2, 8, 16)
    ]


def found_of(rows, suspected=()):
    return dict(
        shape=[800, 1344],
        batches=[1, 2, 3],
        rows=list(rows),
        suspected=list(suspected),
        kept_per_weight=dict(
            FP32=dict(Eval=0., MMEngine=4., Tune=0.),
            FP16=dict(Eval=2., MMEngine=2., Tune=0.)),
        autocast=dict(relu='bfloat16', norm='float32'))


def test_rows_are_those_of_the_configs():
    """The metafiles beside them say what the configs do."""
    rows = table4_steps.read_rows()
    assert len({row['name'] for row in rows}) == 11
    for entry in rows:
        config = Config.fromfile(entry['config'])
        assert config.train_dataloader.batch_size == entry['batch']
        half = config.optim_wrapper.type == 'AmpOptimWrapper'
        assert half == (entry['precision'] == 'FP16')
        twin = Config.fromfile(entry['eval'])
        assert twin.model == config.model
        assert 'efficient_conv_bn_eval' not in twin
    assert sorted((row['batch'], row['precision']) for row in rows) == sorted(
        [(2, 'FP32')] * 7 + [(2, 'FP16'), (8, 'FP16')] + [(16, 'FP16')] * 2)


def test_paper_figures_agree_with_each_other():
    """The share that the paper prints is that of the two figures read."""
    shares = {
        model['Name']: model['Metadata'].get('Memory Saved (%)')
        for path in Path('configs').glob('*/metafile.yml')
        for model in fileio.load(path)['Models']
    }
    for entry in table4_steps.read_rows():
        before, after = entry['gb']
        assert 100 * (before - after) / before == pytest.approx(
            shares[entry['name']], abs=.03)


@pytest.mark.slow
def test_what_is_saved_is_what_is_folded(measured):
    """Eval keeps one more map a block; MMEngine keeps a folded weight."""
    entry, = measured['rows']
    assert entry['steps'].keys() == {'2'}
    steps = entry['steps']['2']
    # The output of each convolution of the stages that learn.
    maps = 0
    height, width = 128 // 4, 160 // 4
    for planes, blocks in ((128, 4), (256, 6), (512, 3)):
        small = height * width // 4
        # The first 3 x 3 of a stage strides, the 1 x 1 before does not.
        maps += planes * height * width + planes * small + 8 * planes * small
        maps += (blocks - 1) * 6 * planes * small
        height, width = height // 2, width // 2
    saved = steps['Eval']['kept'] - steps['Tune']['kept']
    # Coefficients are vectors.
    assert saved == pytest.approx(4 * 2 * maps, rel=.02)
    folded = steps['MMEngine']['kept'] - steps['Tune']['kept']
    assert folded == pytest.approx(4 * entry['weights'], rel=.01)


@pytest.mark.slow
def test_the_row_in_question_is_run_as_both_models():
    found = table4.run((64, 96), (1, ), names=[table4.SUSPECT])
    entry, = found['rows']
    suspected, = found['suspected']
    assert entry['steps']['1'].keys() == {*table4.MODES}
    assert suspected['steps']['1'].keys() == {*table4_steps.PAPER}
    assert suspected['eval'] == table4_steps.SUSPECTED
    assert 2.3e7 < suspected['weights'] < 2.4e7
    assert 4.2e7 < entry['weights'] < 4.3e7


def test_models_that_differ_are_kept_apart(monkeypatch):
    """A row and its precision decide what is run, and how often."""
    ran = []

    def measure(*step):
        ran.append(step[:-1])
        return len(ran)

    monkeypatch.setattr(table4_steps, 'measure', measure)
    monkeypatch.setattr(table4_steps, 'count_weights', lambda row: 1)
    load = functools.cache(table4_steps.load_config)
    monkeypatch.setattr(table4_steps, 'load_config', load)
    found = table4.run()
    assert len(set(ran)) == len(ran) == 7 * 3 + 9 + 9 + 6
    for entry in found['rows'] + found['suspected']:
        assert [*entry['steps']] == (
            ['2'] if entry['batch'] == 2 else ['1', '2', '3'])
        for batch, steps in entry['steps'].items():
            for mode, number in steps.items():
                path, *asked = ran[number - 1]
                assert asked == [entry['precision'], int(batch), mode]
                assert load(path).model == load(entry['eval']).model


def test_kept_per_weight():
    found = table4_steps.kept_per_weight()
    expected = dict(
        FP32=dict(Eval=0, MMEngine=4, Tune=0),
        FP16=dict(Eval=2, MMEngine=2, Tune=0))
    for precision, modes in expected.items():
        assert found[precision] == pytest.approx(modes, abs=.01)


def test_autocast_gives_halves_where_stated():
    dtypes = table4_steps.autocast_dtypes()
    assert dtypes['convolution'] == dtypes['batch_norm'] == 'bfloat16'
    assert dtypes['cross_entropy'] == 'float32'


def test_savings_are_in_the_units_of_the_log():
    entry = row(gb=(3.857, 3.003), steps={2: (4000, 3146, 3000)})
    assert table4.paper_saving(entry) == pytest.approx(854 * MIB)
    assert table4.saving(entry, 'MMEngine') == (854 * MIB, None)
    assert table4.ratio(entry) == pytest.approx(1)
    assert table4.eval_total(entry) == 4000 * MIB
    assert table4.saved_text(entry, 'Tune') == '1000 (25.0%)'


def test_savings_are_read_from_a_line():
    steps = {1: (100, 90, 80), 2: (200, 180, 160), 3: (300, 270, 246)}
    entry = row(batch=16, gb=(.4, .24), steps=steps)
    saved, error = table4.saving(entry, 'MMEngine')
    assert (saved, error) == pytest.approx((160 * MIB, 0))
    # By hand: 20, 40, 54 give 17 an image and 4 on the line; 20 and 40, the
    # farthest pair, give 320 where the line gives 276.
    saved, error = table4.saving(entry, 'Tune')
    assert saved == pytest.approx(276 * MIB)
    assert error == pytest.approx(44 * MIB)
    assert table4.eval_total(entry) == pytest.approx(1600 * MIB)


@pytest.mark.parametrize('eval_total, times, less', [
    (1900, '1.05', 'none'), (2100, '0.95', 'a')
])
def test_what_eval_takes_is_compared(eval_total, times, less):
    entry = row(steps={2: (eval_total, 1000, 900)})
    found = table4.figures(found_of([entry]))
    assert (found['totals'], found['less']) == (times, less)


@pytest.mark.parametrize('mmtune, more', [(3100, False), (2900, True)])
def test_mmtune_need_not_save_more(mmtune, more):
    found = found_of([row(steps={2: (4000, 3000, mmtune)})])
    assert more == (not any('in all rows' in claim and 'mmtune' in claim
                            for claim in doubted('table4', found)))


def test_page_has_the_command_of_every_config():
    page = Path('docs/en/reproduction/table4.md').read_text()
    for entry in table4_steps.read_rows():
        scaling = '' if entry['batch'] == 2 else ' --auto-scale-lr'
        for config, ap in zip((entry['eval'], entry['config']), entry['ap']):
            assert (f'| `bash tools/dist_train.sh {config} 8{scaling}` | '
                    f'{ap:.2f} | not run here |') in page


@pytest.mark.parametrize('saves, close', [(1000, 'yes'), (1049, 'yes'),
                                          (1051, 'no'), (949, 'no')])
def test_verdict_of_a_row(saves, close):
    entry = row(steps={2: (4000, 4000 - saves, 2000)})
    assert f' | {close} | 2000' in table4.rows_table([entry])
    count = int(close == 'yes')
    assert f'{count} of 1 rows in FP32' in table4.verdict([entry])


@pytest.mark.parametrize('fixed, slope, gap, wrong', [
    (0, 100, '4.00', []),
    (-40, 100, '0.00', ['rest differs']),
    (0, 120, '4.00', ['feature maps follow']),
])
def test_page_splits_what_halves_save(fixed, slope, gap, wrong):
    found = found_of(half_rows(fixed, slope))
    text = filled('table4', found)
    assert f'The rest differs by {gap} bytes' in text
    assert '| paper | 100.0 | -40.0 | -4.00 |' in text
    assert f'| {slope}.0 | {fixed}.0 |' in text
    doubts = doubted('table4', found)
    for part in ('rest differs', 'feature maps follow'):
        assert any(part in doubt for doubt in doubts) == (part in wrong)


@pytest.mark.parametrize('totals, fits', [
    ((2000, 1000), True), ((1000, 2000), False)
])
def test_page_judges_the_row_in_question(totals, fits):
    both = [
        row(table4.SUSPECT, steps={2: (total, total // 2, 0)},
            gb=(1., .5)) for total in totals
    ]
    both[1]['model'] = 'other'
    found = found_of(both[:1], both[1:])
    assert table4.figures(found)['suspects'].count('\n') == 3
    assert fits == (not any('row in question' in claim
                            for claim in doubted('table4', found)))


def test_plot(tmp_path):
    found = found_of([row(), *half_rows(0)])
    unchanged = copy.deepcopy(found)
    table4.plot(found, tmp_path / 'a.png')
    assert found == unchanged
    assert mmcv.imread(tmp_path / 'a.png').shape[1] == 960
