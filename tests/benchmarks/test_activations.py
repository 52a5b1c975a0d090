"""tests/benchmarks/activations.py at a tiny size: bytes, never times."""
import json

import activations
import pytest

ROOT = activations.ROOT
SWISH = 'CSPDarknet-S (Swish)'


@pytest.mark.filterwarnings('ignore')
def test_tune_keeps_least():
    """Of networks and detectors whose maps are small, as of large ones."""
    found = activations.measure(
        (64, 64), 1, networks=[SWISH], detectors=['YOLOX-tiny'])
    network, = found['networks']
    assert set(network['ran']) == {'one map'}
    for row in (network, found['chain']):
        kept = row['kept']
        assert kept['Tune'] < kept['Deploy'] < kept['Eval']
        assert kept['Tune'] < kept[activations.PAPERS_TUNE] < kept['Eval']
        low, middle, high = row['time']
        assert low <= middle <= high
    stock, tuned = activations.TRAINING_MODES
    assert network['kept'][tuned] < .65 * network['kept'][stock]
    detector, = found['detectors']
    # The peak of maps so small is in the weights.
    assert (detector['steps'][tuned]['kept']
            < .65 * detector['steps'][stock]['kept'])
    resident = {step['resident'] for step in detector['steps'].values()}
    assert len(resident) == 1 and 0 < detector['gradients'] < resident.pop()


def test_figures_of_the_docs_are_of_the_same_networks():
    figures = json.loads((ROOT / 'docs/en/activations.json').read_text())
    found = figures['found']
    assert [row['name'] for row in found['networks']] == list(
        activations.NETWORKS)
    assert [row['name'] for row in found['detectors']] == list(
        activations.DETECTORS)
    for row in found['networks']:
        assert set(row['kept']) == {
            *activations.MODES, *activations.TRAINING_MODES
        }
        # What does not run there runs for nobody.
        assert set(row['ran']) == {'one map'}
    assert figures['aims'] == activations.aims()
    assert figures['command'].split()[1] == 'tests/benchmarks/activations.py'
