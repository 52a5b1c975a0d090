"""tests/benchmarks/cost.py at tiny sizes: bytes and structure, never times."""
import dataclasses
import json
import math
import re
from functools import partial

import cost
import pytest
import torch
from rich.progress import Progress
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

IMAGE = (64, 64)
# What `BENCHMARKS` measures at full size.
TINY = {
    'kept': partial(
        cost.kept, backbones=['ResNet-50', 'MobileNetV2'], images=[IMAGE]),
    'kept-for-input': partial(
        cost.kept_for_input,
        backbones=['ResNet-50', 'MobileNetV2'],
        image=IMAGE),
    'compiled': partial(
        cost.compiled, backbones=['ResNet-18'], dtypes=[torch.float32],
        image=IMAGE),
    'operators': cost.operators,
    'peak': partial(cost.peak, backbones=['MobileNetV2'], image=IMAGE),
    'step': partial(cost.step, image=IMAGE),
    'frozen': partial(cost.frozen, image=IMAGE),
    'validation': partial(cost.validation, images=[IMAGE]),
    'small': partial(cost.small, count=2),
    'sweep': partial(
        cost.sweep, channels=[8], kernels=[3], sides=[4, 256], count=2),
}
DOCS = cost.ROOT / 'docs/en'


@pytest.fixture(autouse=True)
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run():
    with Progress(disable=True) as progress:
        yield cost.Run('cpu', 2, progress)


def tensors_of_fold(name):
    """Bytes of the two statistics that a fold keeps, which Deploy has not."""
    norms = [
        m for m in cost.backbone(name, 'cpu').modules()
        if isinstance(m, _BatchNorm)
    ]
    return sum(2 * 4 * norm.num_features for norm in norms)


def rows_by_backbone(rows):
    return {row.case['backbone']: row.rounds[0] for row in rows}


def test_every_benchmark_is_tested():
    assert TINY.keys() == cost.BENCHMARKS.keys()


def test_keeps_what_deploy_keeps(run):
    for name, kept in rows_by_backbone(TINY['kept'](run)).items():
        assert kept['Tune'] <= kept['Deploy'] + tensors_of_fold(name), name
        assert kept['Tune'] < min(kept['MMEngine'], kept['Eval']), name


def test_keeps_less_where_only_the_input_learns(run):
    rows = rows_by_backbone(TINY['kept-for-input'](run))
    for name, kept in rows.items():
        # At full size maps make good for the statistics of the fold.
        assert kept['Tune'] - tensors_of_fold(name) < kept['Deploy'], name
        assert kept['Tune'] < min(kept['MMEngine'], kept['Eval']), name


def test_gradients_created_in_the_step_count(run):
    created, there = TINY['peak'](run)
    for mode in cost.MODES:
        assert created.rounds[0][mode] > there.rounds[0][mode], mode
    for peaks in (created.rounds[0], there.rounds[0]):
        assert peaks['Tune'] < peaks['Eval']


@pytest.mark.parametrize('name', ['step', 'frozen', 'validation'])
def test_times_a_resnet(run, name):
    row, = TINY[name](run)
    assert row.case == {'input': '2 x 3 x 64 x 64'}
    check_times(name, row)


@pytest.mark.parametrize('name, cases', [('small', 1), ('sweep', 1)])
def test_times_a_chain(run, name, cases):
    rows = list(TINY[name](run))
    # The map of 256 x 256 is over the limit.
    assert len(rows) == cases
    for row in rows:
        assert row.case['map'] == '4 x 4'
        check_times(name, row)


def check_times(name, row):
    assert len(row.rounds) == 2 and not row.failed
    for seconds in row.rounds:
        assert all(math.isfinite(s) and s > 0 for s in seconds.values())
    ratios = {str(ratio) for ratio in cost.BENCHMARKS[name].ratios}
    record = cost.record_of(row, cost.BENCHMARKS[name].ratios)
    assert record['ratios'].keys() == ratios


def test_compiled_tune_keeps_what_compiled_deploy_keeps(run):
    row, = TINY['compiled'](run)
    assert row.case == dict(backbone='ResNet-18', dtype='float32')
    kept, = row.rounds
    assert kept['Tune, compiled'] <= 1.02 * kept['Deploy, compiled']
    assert kept['Tune, compiled'] <= kept['Eval, compiled']
    assert kept['Tune'] < kept['Eval']


def test_counts_operators(run):
    convolution, linear = TINY['operators'](run)
    counts, = convolution.rounds
    # A convolution and its gradients; stock has a batch norm's as well.
    assert counts['Deploy'] < counts['Eval'] == 5
    assert counts['Tune'] <= 11 < counts[cost.PYTHON]
    assert linear.rounds[0]['Tune'] <= 12


@pytest.mark.small_maps
def test_the_python_path_runs_without_the_node():
    stock = cost.blocks(2, channels=8, kernel=1, device='cpu')
    models, _ = cost.variants(stock, ['Tune', cost.PYTHON])
    calls = cost.calls_of(
        models, lambda model: partial(model, torch.ones(2, 8, 4, 4)))
    ran = {}
    for mode, call in calls.items():
        call()
        ran[mode] = set(cost.latest_runs(models[mode]).values())
    # With the native node no map is small.
    with_node = 'fused' if cost.native.node() else 'small'
    assert ran == {'Tune': {with_node}, cost.PYTHON: {'small'}}


def test_all_modes_compute_the_same():
    stock = cost.blocks(3, channels=8, kernel=3, device='cpu').double()
    models, failed = cost.variants(stock)
    assert not failed and tuple(models) == cost.MODES
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    for model in models.values():
        torch.testing.assert_close(model(x), stock(x))


class Untraceable(nn.Sequential):

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_what_mmengine_raises_is_a_result():
    model = Untraceable(cost.blocks(2, channels=2, kernel=1, device='cpu'))
    models, failed = cost.variants(model)
    assert failed == {'MMEngine': 'TraceError'}
    assert list(models) == ['Eval', 'Tune', cost.PYTHON, 'Deploy']


def test_what_mmtune_raises_is_not():
    with pytest.raises(ValueError, match='nothing to put into Tune mode'):
        cost.variants(nn.Identity())


def record(**changes):
    row = cost.Row(
        dict(backbone='ResNet-50'), [
            dict(Eval=2. * 2**20, Tune=1.5 * 2**20, Deploy=2**20),
            dict(Eval=4. * 2**20, Tune=2**20, Deploy=2**20)
        ], dict(MMEngine='TraceError'))
    return dict(
        benchmark='kept', device='CPU', cpu='Some CPU', cores=2, torch='2.x',
        mmtune='0', commit=None, threads=2, rounds=2, command='python cost.py',
        rows=[cost.record_of(row, cost.BENCHMARKS['kept'].ratios)]) | changes


def test_ratios_are_taken_round_by_round():
    row, = record()['rows']
    assert row['values']['Tune'] == (1.125 * 2**20, 1.25 * 2**20,
                                     1.375 * 2**20)
    assert row['ratios'] == {
        'Tune / Eval': (.375, .5, .625),
        'Tune / Deploy': (1.125, 1.25, 1.375)
    }


def test_table():
    assert cost.table_of(record()) == ([
        'backbone', 'Eval', 'MMEngine', 'Tune', 'Deploy', 'Tune / Eval',
        'Tune / MMEngine', 'Tune / Deploy', 'Tune, Python path / Deploy'
    ], [[
        'ResNet-50', '3.0', 'TraceError', '1.2', '1.0', '0.500 (0.375-0.625)',
        '-', '1.250 (1.125-1.375)', '-'
    ]])
    assert cost.verdicts(record()) == [
        'Tune / Deploy <= 1.01 is the aim: met in 0 of 1 rows, 1.250 to '
        '1.250, median 1.250.'
    ]


@pytest.mark.parametrize('demand, value, met', [
    ('<= 1.05', 1.05, True),
    ('<= 1.05', 1.051, False),
    ('< 1', .999, True),
    ('< 1', 1., False),
])
def test_demands(demand, value, met):
    assert cost.Ratio('Tune', 'Eval', demand).is_met(value) is met


def test_page_has_a_section_for_each_device():
    cpu, gpu = record(), record(device='Some GPU')
    page = cost.page([gpu, cpu])
    assert page.index('## Kept for backward (MiB)\n') < page.index(
        '## Kept for backward (MiB) on Some GPU\n')
    assert '- Kept for backward.\n' not in page.partition('## Not run here')[2]
    assert 'on a GPU, which' not in page
    assert 'on a GPU, which' in cost.page([cpu])


def test_docs_are_what_the_results_make():
    records = json.loads((DOCS / 'cost.json').read_text())
    assert (DOCS / 'cost.md').read_text() == cost.page(records)
    assert {r['benchmark'] for r in records} == cost.BENCHMARKS.keys()


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        cost, 'BENCHMARKS', {
            name: dataclasses.replace(
                cost.BENCHMARKS[name], measure=TINY[name])
            for name in ('small', 'sweep')
        })
    results, page = tmp_path / 'new/cost.json', tmp_path / 'cost.md'
    options = ['--rounds', '2', '--json', str(results)]
    cost.main(options)
    cost.main(['small', '--threads', '2', *options])
    assert capsys.readouterr().out.count('Time where maps are small (us)') == 2
    sweep, small = json.loads(results.read_text())
    assert (sweep['benchmark'], sweep['threads']) == ('sweep', 1)
    assert (small['benchmark'], small['threads']) == ('small', 2)
    assert small['rounds'] == 2 and len(small['rows']) == 1
    assert small['command'].startswith(
        'python tests/benchmarks/cost.py small --threads 2 --rounds 2')
    cost.main(['--json', str(results), '--docs', str(page)])
    assert page.read_text() == cost.page([sweep, small])


@pytest.mark.parametrize('arguments, message', [
    (['speed'], "NAME must be one of kept, .*, but got 'speed'"),
    (['--rounds', '0'], "must be a whole number from 1 on, but got '0'"),
    (['--threads', '-1'], "must be a whole number from 1 on, but got '-1'"),
    (['--docs', 'cost.md', '--json', 'missing.json'],
     '--docs needs results in missing.json'),
])
def test_wrong_command_lines(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cost.main(arguments)
    assert re.search(message, capsys.readouterr().err)
