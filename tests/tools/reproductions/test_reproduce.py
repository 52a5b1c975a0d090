"""The driver, and that the committed pages say what their figures say."""
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import mmcv
import pytest
import reproduce
import torch
from reproductions.page import Page

from tests.tools.synthetic import doubted


# The pages tell the limit that users have.
@pytest.mark.small_maps
@pytest.mark.parametrize('name', reproduce.NAMES)
def test_committed_pages_are_filled_from_their_figures(name, tmp_path):
    record, page = reproduce.read_record(name), reproduce.load(name)
    text = reproduce.file_of(name, '.md').read_text()
    assert text == page.write(text, record)
    # Markdown takes a comment that begins a line for a block of its own.
    assert [line for line in text.splitlines()
            if re.match(r'(- )?<!--[\w-]', line)] == []
    page.plot(record['found'], tmp_path / 'plot.png')
    expected = mmcv.imread(str(tmp_path / 'plot.png')).astype(int)
    committed = mmcv.imread(str(reproduce.file_of(name, '.png')))
    assert committed.shape == expected.shape
    # Of 255 levels; machines may smooth edges differently.
    assert abs(committed - expected).mean() < 0.1


@pytest.mark.parametrize('name', reproduce.NAMES)
def test_committed_figures_bear_out_the_prose(name):
    assert doubted(name, reproduce.read_record(name)['found']) == []


def test_committed_index_lists_them():
    index = (reproduce.DOCS / 'reproduction.md').read_text()
    assert index == reproduce.write_index()
    assert all(f'(reproduction/{name}.md)' in index
               for name in reproduce.NAMES)


# ----------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------


def test_what_is_written_is_read_in_few_lines(tmp_path):
    rows = [dict(mode='Tune', losses=[i / 3] * 50) for i in range(4)]
    record = dict(command='run', found={'rows': rows, 'events': {14: 'jump'}})
    reproduce.write_record(tmp_path / 'page.json', record)
    text = (tmp_path / 'page.json').read_text()
    assert max(text.splitlines(), key=len).count(',') == 49
    assert text.count('\n') == 24
    found = json.loads(text)['found']
    assert found['events'] == {'14': 'jump'}
    for row, written in zip(rows, found['rows']):
        assert written['mode'] == row['mode']
        assert written['losses'] == pytest.approx(row['losses'], rel=1e-8)


def test_float32_survives_rounding(tmp_path):
    values = torch.rand(1000)
    reproduce.write_record(tmp_path / 'page.json', dict(
        values=values.tolist(), count=12345678901))
    found = json.loads((tmp_path / 'page.json').read_text())
    assert torch.equal(torch.tensor(found['values']), values)
    assert found['count'] == 12345678901


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match='not JSON compliant'):
        reproduce.write_record(tmp_path / 'page.json', dict(found=[value]))


# ----------------------------------------------------------------------------
# The driver
# ----------------------------------------------------------------------------


@pytest.fixture
def pages(monkeypatch, tmp_path):
    """Three pages in the place of the real ones, the last made from one."""

    def make(name, value):
        (tmp_path / f'reproduction/{name.lower()}.md').write_text(
            f'# {name}\n\n**It is <!--value--><!--/-->.**\n\n'
            '<!-- doubts -->\n<!-- end of doubts -->\n\n'
            '<!-- origin -->\n<!-- end of origin -->\n')
        return Page(
            run=lambda: dict(value=value),
            figures=lambda found: dict(value=found['value']),
            claims=lambda found: {'it is odd': found['value'] % 2 == 1},
            plot=lambda found, path: path.write_bytes(b'png'))

    (tmp_path / 'reproduction').mkdir()
    (tmp_path / 'reproduction.md').write_text(
        '<!-- pages -->\n<!-- end of pages -->\n')
    modules = dict(one=make('One', 1), two=make('Two', 2),
                   more=make('More', 0))
    monkeypatch.setattr(reproduce, 'NAMES',
                        dict.fromkeys(modules, 'Table 9'))
    monkeypatch.setattr(reproduce, 'SOURCES', dict(more='one'))
    monkeypatch.setattr(reproduce, 'DOCS', tmp_path)
    monkeypatch.setattr(reproduce, 'load', modules.get)
    return modules


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['reproduce.py', *map(str, arguments)])
    reproduce.main()


def test_one_alone(pages, monkeypatch, tmp_path):
    start(monkeypatch, 'two')
    record = json.loads((tmp_path / 'reproduction/two.json').read_text())
    assert record['found'] == dict(value=2)
    assert record['command'] == 'python tools/reproduce.py two'
    page = (tmp_path / 'reproduction/two.md').read_text()
    assert '# Two' in page and '**It is <!--value-->2<!--/-->.**' in page
    assert '- it is odd' in page
    assert '`python tools/reproduce.py two`, 0 s on ' in page
    assert (tmp_path / 'reproduction/two.png').read_bytes() == b'png'
    index = (tmp_path / 'reproduction.md').read_text()
    assert '[Two](reproduction/two.md) | Table 9 | It is 2. |' in index
    assert 'One' not in index


@pytest.mark.parametrize('name', ['one', 'more'])
def test_two_pages_of_one_measurement(pages, monkeypatch, tmp_path, name):
    start(monkeypatch, name)
    folder = tmp_path / 'reproduction'
    assert not (folder / 'more.json').exists()
    for page in ('one', 'more'):
        text = (folder / f'{page}.md').read_text()
        assert 'It is <!--value-->1<!--/-->' in text
        assert '`python tools/reproduce.py one`' in text


def test_all_in_processes_of_their_own(pages, monkeypatch, tmp_path):
    started = []

    def run(command):
        started.append(command)
        name = command[2]
        reproduce.measure(name)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(reproduce.subprocess, 'run', run)
    monkeypatch.setattr(reproduce, 'describe_commit', lambda folder: 'abc')
    start(monkeypatch)
    assert [command[2] for command in started] == ['one', 'two']
    index = (tmp_path / 'reproduction.md').read_text()
    assert all(name in index for name in ('One', 'Two', 'More'))
    assert 'at commit abc.' in index


def test_what_fails_is_named(pages, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce.subprocess, 'run',
                        lambda command: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match='one, two failed'):
        start(monkeypatch)
    assert 'One' not in (tmp_path / 'reproduction.md').read_text()


def test_render_runs_nothing(pages, monkeypatch, tmp_path):
    start(monkeypatch, 'one')
    monkeypatch.setattr(reproduce, 'measure', None)
    record = tmp_path / 'reproduction/one.json'
    record.write_text(record.read_text().replace('"value": 1', '"value": 3'))
    start(monkeypatch, '--render', 'one')
    assert 'It is <!--value-->3' in (
        tmp_path / 'reproduction/one.md').read_text()


def test_an_unknown_name():
    result = subprocess.run(
        [sys.executable, reproduce.__file__, 'table5'],
        capture_output=True, text=True)
    assert result.returncode == 2
    assert 'NAME must be one of table4' in result.stderr
    assert "but got 'table5'" in result.stderr
