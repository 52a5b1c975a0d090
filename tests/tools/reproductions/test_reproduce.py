"""The driver, and that the committed pages say what their figures say."""
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mmcv
import pytest
import reproduce
from reproductions.page import Page

from tests.tools.synthetic import doubted

DOCS = Path(__file__).parents[3] / 'docs/en'


# The pages tell the limit that users have.
@pytest.mark.small_maps
@pytest.mark.parametrize('name', reproduce.NAMES)
def test_committed_pages_are_filled_from_their_figures(name, tmp_path):
    folder = DOCS / 'reproduction'
    record = json.loads(
        (folder / f'{reproduce.source(name)}.json').read_text())
    text = (folder / f'{name}.md').read_text()
    assert text == reproduce.write_page(name, record)
    # Markdown takes a comment that begins a line for a block of its own.
    assert [line for line in text.splitlines()
            if re.match(r'(- )?<!--[\w-]', line)] == []
    reproduce.load(name).plot(record['found'], tmp_path / 'plot.png')
    expected = mmcv.imread(str(tmp_path / 'plot.png')).astype(int)
    committed = mmcv.imread(str(folder / f'{name}.png'))
    assert committed.shape == expected.shape
    # Of 255 levels; machines may smooth edges differently.
    assert abs(committed - expected).mean() < 0.1


@pytest.mark.parametrize('name', reproduce.NAMES)
def test_committed_figures_bear_out_the_prose(name):
    found = json.loads((DOCS / 'reproduction' /
                        f'{reproduce.source(name)}.json').read_text())
    assert doubted(name, found['found']) == []


def test_committed_index_lists_them():
    index = (DOCS / 'reproduction.md').read_text()
    assert index == reproduce.write_index(DOCS)
    assert 'Not run here:' not in index


# ----------------------------------------------------------------------------
# The driver
# ----------------------------------------------------------------------------


@pytest.fixture
def pages(monkeypatch, tmp_path):
    """Three pages in the place of the real ones, the last made from one."""

    def make(name, value):
        (tmp_path / f'texts/reproduction/{name.lower()}.md').write_text(
            f'# {name}\n\n**It is <!--value--><!--/-->.**\n\n'
            '<!-- doubts -->\n<!-- end of doubts -->\n\n'
            '<!-- origin -->\n<!-- end of origin -->\n')
        return Page(
            run=lambda: dict(value=value),
            figures=lambda found: dict(value=found['value']),
            claims=lambda found: {'it is odd': found['value'] % 2 == 1},
            plot=lambda found, path: path.write_bytes(b'png'))

    (tmp_path / 'texts/reproduction').mkdir(parents=True)
    (tmp_path / 'texts/reproduction.md').write_text(
        '<!-- pages -->\n<!-- end of pages -->\n')
    modules = dict(one=make('One', 1), two=make('Two', 2),
                   more=make('More', 0))
    monkeypatch.setattr(reproduce, 'NAMES',
                        dict.fromkeys(modules, 'Table 9'))
    monkeypatch.setattr(reproduce, 'SOURCES', dict(more='one'))
    monkeypatch.setattr(reproduce, 'TEXTS', tmp_path / 'texts')
    monkeypatch.setattr(reproduce, 'load', modules.get)
    return modules


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['reproduce.py', *map(str, arguments)])
    reproduce.main()


def test_one_alone(pages, monkeypatch, tmp_path):
    start(monkeypatch, 'two', '--docs', tmp_path)
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
    assert 'Not run here:\n\n- One\n- More' in index


@pytest.mark.parametrize('name', ['one', 'more'])
def test_two_pages_of_one_measurement(pages, monkeypatch, tmp_path, name):
    start(monkeypatch, name, '--docs', tmp_path)
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
        reproduce.measure(name, tmp_path / 'reproduction')
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(reproduce.subprocess, 'run', run)
    monkeypatch.setattr(reproduce, 'describe_commit', lambda folder: 'abc')
    start(monkeypatch, '--docs', tmp_path)
    assert [command[2] for command in started] == ['one', 'two']
    index = (tmp_path / 'reproduction.md').read_text()
    assert all(name in index for name in ('One', 'Two', 'More'))
    assert 'Not run here' not in index
    assert 'at commit abc.' in index


def test_what_fails_is_named(pages, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce.subprocess, 'run',
                        lambda command: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match='one, two failed'):
        start(monkeypatch, '--docs', tmp_path)


def test_render_runs_nothing(pages, monkeypatch, tmp_path):
    start(monkeypatch, 'one', '--docs', tmp_path)
    monkeypatch.setattr(reproduce, 'measure', None)
    (tmp_path / 'reproduction/one.md').unlink()
    start(monkeypatch, '--render', '--docs', tmp_path)
    assert 'It is <!--value-->1' in (
        tmp_path / 'reproduction/one.md').read_text()


def test_an_unknown_name():
    result = subprocess.run(
        [sys.executable, reproduce.__file__, 'table5'],
        capture_output=True, text=True)
    assert result.returncode == 2
    assert 'NAME must be one of table4' in result.stderr
    assert "but got 'table5'" in result.stderr
