"""The JSON files of the pages."""
import json
import math

import pytest
import torch
from reproductions import records


def test_what_is_written_is_read_in_few_lines(tmp_path):
    rows = [dict(mode='Tune', losses=[i / 3] * 50) for i in range(4)]
    record = dict(command='run', found={'rows': rows, 'events': {14: 'jump'}})
    records.write(tmp_path / 'new/page.json', record)
    text = (tmp_path / 'new/page.json').read_text()
    assert max(text.splitlines(), key=len).count(',') == 49
    assert text.count('\n') == 24
    found = json.loads(text)['found']
    assert found['events'] == {'14': 'jump'}
    for row, written in zip(rows, found['rows']):
        assert written['mode'] == row['mode']
        assert written['losses'] == pytest.approx(row['losses'], rel=1e-8)


def test_float32_survives_rounding():
    values = torch.rand(1000)
    found = records.rounded(dict(values=values.tolist(), count=12345678901))
    assert torch.equal(torch.tensor(found['values']), values)
    assert found['count'] == 12345678901


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match='not JSON compliant'):
        records.write(tmp_path / 'page.json', dict(found=[value]))
