"""tests/benchmarks/combinations.py at a tiny size: bytes, never times."""
import json

import combinations
import pytest

ROOT = combinations.ROOT


@pytest.mark.filterwarnings('ignore:None of the inputs', 'ignore:torch.utils')
def test_tune_keeps_less_with_each_of_them():
    """But for torch.compile, which takes long and has tests of its own."""
    measured = combinations.measure(18, (64, 64), 1, [
        c for c in combinations.COMBINATIONS
        if not c.other.startswith('compile')
    ])
    rows = {(row['mode'], row['other']): row for row in measured}
    assert len(rows) == 6
    for (mode, other), tune in rows.items():
        if mode == 'Tune':
            stock = rows['Eval', other]
            assert tune['kept'] < stock['kept'], other
            assert tune['peak'] < stock['peak'], other
            low, middle, high = tune['time']
            assert low <= middle <= high


def test_figures_of_the_docs_are_of_the_same_combinations():
    found = json.loads((ROOT / 'docs/en/combinations.json').read_text())
    assert [(row['mode'], row['other']) for row in found['found']['rows']] == [
        (c.mode, c.other) for c in combinations.COMBINATIONS
    ]
    assert found['command'].split()[1] == 'tests/benchmarks/combinations.py'
