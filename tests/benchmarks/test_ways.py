"""tests/benchmarks/ways.py: what a block keeps, but for compiled ways."""
import json

import pytest
import ways

EAGER = [way for way in ways.WAYS
         if not ('compile' in way or 'Inductor' in way)]


@pytest.mark.parametrize('activation, maps', [('ReLU', 2), ('SiLU', 3)])
def test_tune_keeps_one_map(activation, maps):
    found = {way: ways.count(way, activation, 32) for way in EAGER}
    assert found['stock'] == maps
    assert found['Deploy'] == maps - 1
    assert found['`FrozenBatchNorm2d`'] == maps - 1
    assert 1 <= found['Tune'] < 1.01


def test_frozen_norms_compute_what_norms_do():
    stock, frozen = ways.build(1, 'ReLU').double(), ways.frozen(1, 'ReLU')
    x = ways.torch.randn(1, ways.CHANNELS, 5, 5, dtype=ways.torch.double)
    ways.torch.testing.assert_close(stock(x), frozen.double()(x), rtol=1e-5,
                                    atol=1e-5)


def test_figures_of_the_docs_are_of_the_same_ways():
    found = json.loads((ways.ROOT / 'docs/en/ways.json').read_text())
    assert list(found['rows']) == list(ways.WAYS)
