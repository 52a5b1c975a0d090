"""The driver, and that the committed pages say what their figures say."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mmcv
import pytest
import reproduce

DOCS = Path(__file__).parents[3] / 'docs/en'


# The pages tell the limit that users have.
@pytest.mark.small_maps
@pytest.mark.parametrize('name', reproduce.NAMES)
def test_committed_pages_are_written_from_their_figures(name, tmp_path):
    folder = DOCS / 'reproduction'
    record = json.loads((folder / f'{name}.json').read_text())
    page = reproduce.write_page(name, reproduce.load(name), record)
    assert (folder / f'{name}.md').read_text() == page
    reproduce.load(name).plot(record['found'], tmp_path / 'plot.png')
    expected = mmcv.imread(str(tmp_path / 'plot.png')).astype(int)
    committed = mmcv.imread(str(folder / f'{name}.png'))
    assert committed.shape == expected.shape
    # Of 255 levels; machines may smooth edges differently.
    assert abs(committed - expected).mean() < 0.1


def test_committed_index_lists_them():
    index = (DOCS / 'reproduction.md').read_text()
    assert index == reproduce.write_index(DOCS)
    assert 'Not run here:' not in index


# ----------------------------------------------------------------------------
# The driver
# ----------------------------------------------------------------------------


@pytest.fixture
def pages(monkeypatch):
    """Two reproductions in the place of the real ones."""

    def make(title, value):
        return SimpleNamespace(
            TITLE=title,
            OF_PAPER='Table 9',
            QUESTION=f'How much is {title}?',
            run=lambda: dict(value=value),
            answer=lambda found: f'It is {found["value"]}.',
            page=lambda found: f'| value |\n| --- |\n| {found["value"]} |',
            plot=lambda found, path: path.write_bytes(b'png'))

    modules = dict(one=make('One', 1), two=make('Two', 2))
    monkeypatch.setattr(reproduce, 'NAMES', tuple(modules))
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
    assert '# Two' in page and '**It is 2.**' in page and '| 2 |' in page
    assert (tmp_path / 'reproduction/two.png').read_bytes() == b'png'
    index = (tmp_path / 'reproduction.md').read_text()
    assert '[Two](reproduction/two.md) | Table 9 | It is 2. |' in index
    assert 'Not run here:\n\n- One' in index


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
    assert 'One' in index and 'Two' in index
    assert 'Not run here' not in index
    assert 'at commit abc.' in index


def test_what_fails_is_named(pages, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce.subprocess, 'run',
                        lambda command: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match='one, two failed'):
        start(monkeypatch, '--docs', tmp_path)


def test_render_runs_nothing(pages, monkeypatch, tmp_path):
    start(monkeypatch, 'one', '--docs', tmp_path)
    pages['one'].run = None
    (tmp_path / 'reproduction/one.md').unlink()
    start(monkeypatch, '--render', '--docs', tmp_path)
    assert '**It is 1.**' in (tmp_path / 'reproduction/one.md').read_text()


def test_an_unknown_name():
    result = subprocess.run(
        [sys.executable, reproduce.__file__, 'table5'],
        capture_output=True, text=True)
    assert result.returncode == 2
    assert 'NAME must be one of table4' in result.stderr
    assert "but got 'table5'" in result.stderr


@pytest.mark.parametrize('seconds, expected', [(0, '0 s'), (59, '59 s'),
                                               (60, '1 min 0 s'),
                                               (3725, '62 min 5 s')])
def test_duration(seconds, expected):
    assert reproduce.duration(seconds) == expected
