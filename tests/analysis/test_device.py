"""What the check of a device finds, on the device that every machine has."""
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from mmtune.analysis.device import __main__ as command
from mmtune.analysis.device import detectors, exactness
from mmtune.analysis.device.blocks import (
    BLOCK_WAYS,
    Shape,
    count_operators,
    measure_blocks,
    shapes,
)
from mmtune.analysis.device.exactness import (
    BOUND,
    FORWARDS,
    KINDS,
    Check,
    Kind,
    Precision,
    check_kind,
    precisions,
)
from mmtune.analysis.device.page import exactness_section
from mmtune.analysis.device.ways import (
    WAYS,
    has_native,
    how_it_ran,
    put_in_way,
    way_context,
)
from tests.oracle import assert_equal_steps, randomize, step
from tests.toy import conv_bns

DOUBLE, FLOAT = precisions('cpu')[:2]
BFLOAT16 = Precision('autocast bfloat16', torch.float32, torch.bfloat16)


def available(ways):
    return [way for way in ways if has_native() or 'native' not in way]


# --------------------------------------------------------------------------
# Exactness
# --------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_is_exact(kind):
    ways = available(FORWARDS)
    checks = check_kind(kind, DOUBLE, 'cpu', ways, blocks=1)
    assert [check.way for check in checks] == ways
    for check in checks:
        assert check.passed, check
        learned = {'x', '0.weight', '0.bias', '1.weight', '1.bias'}
        learned -= set(KINDS[kind].frozen)
        if 'no bias' in kind:
            learned -= {'0.bias'}
        if 'affine=False' in kind:
            learned -= {'1.weight', '1.bias'}
        assert check.ratios.keys() == {'output', *learned}


@pytest.mark.parametrize('precision', [FLOAT, BFLOAT16],
                         ids=lambda precision: precision.name)
@pytest.mark.parametrize('kind', [
    'Conv2d, 1 x 1, no bias', 'Conv2d, 4 groups', 'Conv2d, channels_last',
    'ConvTranspose2d, 4 groups', 'Linear'
])
def test_kinds_are_as_exact_as_stock(kind, precision):
    checks = check_kind(kind, precision, 'cpu', available(FORWARDS), 3)
    assert checks and all(check.passed for check in checks), checks


def rounded(block, x):
    """A fold of statistics in half precision."""
    conv, norm = block
    mean, var = norm.running_mean.bfloat16(), norm.running_var.bfloat16()
    shape = (-1, 1, 1, 1)
    coeff = norm.weight * (var.to(x.dtype) + norm.eps).rsqrt()
    bias = (conv.bias - mean.to(x.dtype)) * coeff + norm.bias
    return conv._conv_forward(x, conv.weight * coeff.view(shape), bias)


def not_finite(block, x):
    return block(x) * torch.nan


def raising(block, x):
    raise RuntimeError('no kernel image\nis there')


@pytest.mark.parametrize('precision', [DOUBLE, FLOAT],
                         ids=lambda precision: precision.name)
@pytest.mark.parametrize('forward, worst', [
    (rounded, ''), (not_finite, 'nan'), (raising, 'no kernel image')
])
def test_what_is_wrong_fails(forward, worst, precision, monkeypatch):
    monkeypatch.setattr(exactness, 'FORWARDS', dict(other=forward))
    check, = check_kind('Conv2d', precision, 'cpu', ['other'], blocks=2)
    assert not check.passed and worst in str(check.worst)
    assert json.loads(json.dumps(check.plain(), allow_nan=False))
    section = exactness_section([check], 'Not all.')
    assert '1 of 1 checks FAILED. Not all.' in section
    assert '- FAILED: Conv2d; ' in section


def test_one_that_is_not_finite_is_the_worst():
    check = Check('Conv2d', 'float32', 'other', dict(a=1., b=torch.nan, c=9.))
    good = Check('Conv2d', 'float32', 'good', dict(a=1.))
    assert check.worst[0] == 'b' and not check.passed
    assert '| Conv2d | nan FAILED |' in exactness_section([good, check], '')
    assert '| good | 1 |' in exactness_section([good, check], '')


class InFloat(nn.Conv2d):
    """As a layer whose kernel is missing on a device."""

    def forward(self, x):
        if x.dtype == torch.float16:
            raise RuntimeError('not implemented for Half')
        return super().forward(x)


def test_what_stock_cannot_run_is_left_out(monkeypatch):
    monkeypatch.setitem(KINDS, 'own', Kind(lambda: InFloat(4, 64, 3)))
    half = Precision('float16', torch.float16)
    assert check_kind('own', half, 'cpu', ['turned on'], 1) == []


def test_a_gpu_is_asked_for_tf32_as_well():
    on_gpu = [precision.name for precision in precisions('cuda')]
    assert 'TF32' in on_gpu and len(on_gpu) == len(precisions('cpu')) + 1
    before = torch.backends.cudnn.allow_tf32
    with exactness._tf32(not before):
        assert torch.backends.cudnn.allow_tf32 != before
    assert torch.backends.cudnn.allow_tf32 == before


# --------------------------------------------------------------------------
# Costs
# --------------------------------------------------------------------------


@pytest.mark.parametrize('way', WAYS)
def test_each_way_computes_what_eval_does(way):
    if way not in available(WAYS):
        pytest.skip('runs without the native node')
    stock, model = (randomize(conv_bns(torch.float64)) for _ in range(2))
    put_in_way(stock, 'Eval')
    put_in_way(model, way)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = step(stock, x)
    with way_context(way):
        found = step(model, x)
    if way == 'Deploy':  # it learns other parameters
        expected, found = ({key: both[key]
                            for key in ('output 0', 'grad of input 0')}
                           for both in (expected, found))
    assert_equal_steps(expected, found)
    assert how_it_ran(model) == ({'fused': 2} if 'Tune' in way else {})


def test_what_a_block_costs():
    ways = available(BLOCK_WAYS)
    found = measure_blocks(Shape(8, 1, 96, 96), ways, 'cpu', False, rounds=1)
    assert list(found) == ways
    maps = 2 * 8 * 96 * 96 * 4
    for way, row in found.items():
        assert row['seconds'] > 0 and row['ratio'] > 0
        # Eval keeps the output of the convolution as well.
        expected = 2 * maps if way == 'Eval' else maps
        assert expected <= row['kept'] < 1.02 * expected, way
    assert found['Tune, Python']['ran'] == {'fused': 8}


def test_shapes_follow_the_image():
    assert Shape(256, 1, 200, 336) in shapes((800, 1344))
    assert Shape(512, 3, 25, 42) in shapes((800, 1344))
    assert Shape(512, 3, 1, 1) in shapes((4, 5))


def test_operators_are_counted_without_views():
    found = {way: count_operators(way, 'cpu') for way in available(BLOCK_WAYS)}
    # Convolution, empty_like and batch norm; the backward of two.
    assert found['Eval'] == dict(forward=3, backward=2, kernels=None)
    assert found['Deploy']['forward'] == 1
    assert found['Tune, Python']['backward'] > 2


class ToyDetector(nn.Module):
    """Is called as torchvision's are."""

    def __init__(self):
        super().__init__()
        self.backbone = conv_bns(torch.float32)
        self.head = nn.Linear(8, 4)

    def forward(self, images, targets):
        maps = self.backbone(torch.stack(images))
        boxes = torch.cat([target['boxes'] for target in targets])
        labels = torch.cat([target['labels'] for target in targets])
        assert boxes.shape == (14, 4) and labels.shape == (14, )
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        return dict(box=(maps.mean() - boxes.mean()).square(),
                    label=maps.square().mean())


@pytest.fixture
def toy_detectors(monkeypatch):
    monkeypatch.setattr(command, 'DETECTORS', {'toy': None})
    monkeypatch.setattr(detectors, 'DETECTORS',
                        {'toy': lambda shape: ToyDetector()})
    monkeypatch.setattr(command, 'check_torchvision', lambda: None)


def test_what_a_step_of_a_detector_costs(toy_detectors):
    ways = available(WAYS)
    found = detectors.measure_detector('toy', ways, (64, 64), 'cpu', False, 1)
    assert list(found) == ways
    for way, row in found.items():
        assert row['seconds'] > 0 and row['ratio'] > 0
        assert row['loss'] == pytest.approx(found['Eval']['loss'])
        if way == 'Deploy':
            assert row['off_eval'] is None
        else:
            assert row['off_eval'] < 1e-5
        if way != 'Eval':
            assert row['kept'] < found['Eval']['kept']
    assert found['Tune, Python']['ran']


@pytest.mark.parametrize('failing', ['Eval', 'plain operators'])
def test_a_way_that_fails_does_not_end_the_rest(failing, toy_detectors,
                                                monkeypatch, capsys,
                                                tmp_path):
    put = detectors.put_in_way

    def fail(model, way):
        if way == failing:
            raise torch.OutOfMemoryError('out of memory\nby far')
        put(model, way)

    monkeypatch.setattr(detectors, 'put_in_way', fail)
    monkeypatch.setenv('MMTUNE_NATIVE', '')
    path = tmp_path / 'out.json'
    assert command.main(['--device', 'cpu', '--tables', 'detectors', '--shape',
                         '32', '48', '--rounds', '1', '--json',
                         str(path)]) == 0
    printed = capsys.readouterr().out
    assert f'| {failing} | OutOfMemoryError: out of memory |' in printed
    assert '## toy, 2 x 3 x 32 x 48, float32' in printed
    found = json.loads(path.read_text())['detectors']['float32']['toy']
    assert found[failing]['failed'].endswith('out of memory')
    assert found['Deploy']['seconds'] > 0
    assert ('ratio' in found['Deploy']) == (failing != 'Eval')
    assert (found['Tune, Python']['off_eval'] is None) == (failing == 'Eval')


@pytest.mark.parametrize('name', detectors.DETECTORS)
def test_the_detectors_of_torchvision(name):
    pytest.importorskip('torchvision')
    model = detectors.DETECTORS[name]((64, 96))
    put_in_way(model, 'Tune, native')
    work = detectors._workload((64, 96), 'cpu')
    assert work.loss(model, work.images).isfinite()
    assert sum(how_it_ran(model).values()) == 53


# --------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------


@pytest.mark.parametrize('arguments, message', [
    (['--device', 'gpu'], 'invalid choice'),
    (['--tables', 'all'], 'invalid choice'),
    (['--shape', '64'], 'expected 2 arguments'),
    (['--rounds', '0'], "a whole number from 1 on, but got '0'"),
    (['--json', 'none/such.json'], 'make the folder first'),
])
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit):
        command.main(['--device', 'cuda'])
    assert 'finds none; use --device cpu' in capsys.readouterr().err


def test_without_torchvision(monkeypatch, capsys):
    monkeypatch.setattr(detectors.importlib.util, 'find_spec', lambda _: None)
    with pytest.raises(SystemExit):
        command.main(['--device', 'cpu'])
    error = capsys.readouterr().err
    assert 'needs torchvision, which is not installed; pip install' in error


@pytest.mark.parametrize('forward, status', [
    (FORWARDS['Python'], 0), (not_finite, 1)
])
def test_exactness_decides_the_status(forward, status, monkeypatch, capsys,
                                      tmp_path):
    monkeypatch.setattr(command, 'KINDS', ['Conv2d'])
    monkeypatch.setattr(command, 'FORWARDS', dict(own=forward))
    monkeypatch.setattr(exactness, 'FORWARDS', dict(own=forward))
    monkeypatch.setattr(command, 'precisions', lambda device: [DOUBLE])
    monkeypatch.setattr(command, 'has_native', lambda: False)
    monkeypatch.setenv('MMTUNE_NATIVE', '')
    path = tmp_path / 'out.json'
    assert command.main(['--device', 'cpu', '--tables', 'exactness', '--json',
                         str(path)]) == status
    printed = capsys.readouterr().out
    assert printed.startswith('# Tune mode on: CPU\n')
    assert 'no GPU was used' in printed
    assert 'The plans of the native node were NOT checked' in printed
    found = json.loads(path.read_text())
    assert found['device'] == 'CPU' and found['env']['mmtune']
    assert found['command'].endswith(f'--json {path}')
    assert [check['passed'] for check in found['exactness']] == [not status]


def test_it_needs_torch_alone():
    script = """
        import sys
        others = ('mmengine', 'mmcv', 'mmdet', 'torchvision', 'rich', 'numpy')
        sys.modules.update(dict.fromkeys(others))
        from mmtune.analysis.device import __main__ as command
        every = command.precisions
        command.KINDS = ['Conv2d']
        command.precisions = lambda device: every(device)[:1]
        sys.exit(command.main(['--device', 'cpu', '--tables', 'exactness']))
    """
    output = subprocess.run([sys.executable, '-c', textwrap.dedent(script)],
                            env=dict(os.environ, MMTUNE_NATIVE='0'),
                            check=True, capture_output=True, text=True).stdout
    assert f'At most {BOUND} passes' in output
    assert 'checks passed' in output
