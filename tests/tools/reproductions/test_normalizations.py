"""The page on other normalizations: small maps, every case."""
import copy
import json

import mmcv
import pytest
import torch
from reproductions import normalizations
from torch import nn

from tests.tools.synthetic import doubted, filled


@pytest.fixture(scope='module')
def found():
    found = normalizations.run(size=48)
    return json.loads(json.dumps(found, allow_nan=False))


# What is known of each without measuring.
FOLDED = [
    'BatchNorm, eval', 'SyncBatchNorm, eval', 'FrozenBatchNorm',
    'InstanceNorm with running statistics, eval', 'ConvWS + BatchNorm, eval',
    'ConvAWS + BatchNorm, eval', 'weight_norm + BatchNorm, eval',
    'batch renormalization, eval'
]


def test_what_can_be_folded(found):
    can = [name for name, row in found['rows'].items()
           if normalizations.kind_of(row).startswith('a scale')]
    assert sorted(can) == sorted(FOLDED)
    across = [name for name, row in found['rows'].items()
              if 'across' in normalizations.kind_of(row)]
    assert across == ['whitening, eval']


def test_what_is_folded_and_that_nothing_is_wrong(found):
    rows = found['rows']
    assert [name for name in rows if rows[name]['ran'] == 'fused'] == [
        name for name in rows if name in FOLDED
    ]
    assert all(row['error'] < 1e-12 for row in rows.values())


def test_bytes_kept(found):
    """A map, two maps, as the theory says."""
    map_size = 2 * 32 * 48 * 48 * 4
    for name, maps in {
            'BatchNorm, eval': (2, 1),
            'BatchNorm, train': (2, 2),
            'GroupNorm': (2, 2),
            'FrozenBatchNorm': (1, 1)
    }.items():
        kept = found['rows'][name]['kept']
        # Statistics and the like come on top.
        for mode, count in zip(('Eval', 'Tune'), maps):
            assert kept[mode] / map_size == pytest.approx(count, abs=.01)


@pytest.mark.parametrize('norm, per_channel, affine', [
    (nn.Identity(), True, True),
    (nn.Softplus(), False, False),
    (nn.BatchNorm2d(32).eval(), True, True),
    (nn.BatchNorm2d(32), False, False),
    (nn.ChannelShuffle(4), False, True),
])
def test_departures(norm, per_channel, affine):
    before = copy.deepcopy(norm.state_dict())
    found = normalizations.departures(norm)
    assert (found['per_channel'] < 1e-9) == per_channel
    assert (found['affine'] < 1e-9) == affine
    assert all(torch.equal(value, before[key])
               for key, value in norm.state_dict().items())


def test_batch_renormalization():
    """Is BatchNorm where the running statistics are those of the batch."""
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    norm = normalizations.BatchRenorm2d(3).double()
    expected = nn.BatchNorm2d(3).double()(x)
    norm.running_var, norm.running_mean = torch.var_mean(
        x, (0, 2, 3), correction=0)
    torch.testing.assert_close(norm(x), expected)
    assert not torch.allclose(
        normalizations.BatchRenorm2d(3).double()(2 * x + 7),
        nn.BatchNorm2d(3).double()(2 * x + 7))


def test_page(found):
    text = filled('normalizations', found)
    assert '8 of 17 cases are a scale and a shift' in text
    assert doubted('normalizations', found) == []


def test_page_says_what_is_wrong(found):
    changed = copy.deepcopy(found)
    changed['rows']['BatchNorm, eval']['error'] = .1
    changed['rows']['GroupNorm']['ran'] = 'fused'
    wrong = doubted('normalizations', changed)
    assert 'mmtune folds nothing else' in wrong
    assert 'all results are those of stock' in wrong
    text = filled('normalizations', changed)
    assert 'These do not show that:** - mmtune folds nothing else' in text


def test_plot(found, tmp_path):
    normalizations.plot(found, tmp_path / 'normalizations.png')
    assert mmcv.imread(tmp_path / 'normalizations.png').std() > 10
