"""Who may import whom, and how long files and functions may be."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / 'mmtune').rglob('*.py'))
# Each room imports those of its own line and of the lines above.
ORDER = (
    ('native', 'utils', 'version'),
    ('functional', ),
    ('layers', ),
    ('arguments', 'behaviours', 'matching', 'report'),
    ('api', 'deploy'),
    ('analysis', 'collect_env', 'engine', 'registry'),
    ('hooks', 'huggingface', 'lightning', 'models'),
)
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def room_of(module):
    """The room of a module of mmtune, by its dotted name."""
    return module.split('.')[1] if '.' in module else None


def imports(path):
    """Modules of mmtune that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == 'mmtune':
            yield from (f'mmtune.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def name_of(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_imports_go_one_way(path):
    own = room_of(name_of(path))
    if own == '__init__':  # what users import of `mmtune` itself
        return
    for module in imports(path):
        if module.startswith('mmtune.'):
            room = room_of(module)
            # `from mmtune import turn_on`, say.
            room = room if room in LEVELS else 'api'
            assert LEVELS[room] <= LEVELS[own], module


def test_the_order_names_every_room():
    rooms = {room_of(name_of(path)) for path in FILES} - {'__init__'}
    assert rooms == {*LEVELS}


def lengths(path):
    """Of each function: its name, and how many lines of code it has."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            documented = ast.get_docstring(node) is not None
            first = node.body[1 if documented and len(node.body) > 1 else 0]
            yield node.name, node.end_lineno - first.lineno + 1


@pytest.mark.parametrize(
    'path', [*FILES, *sorted((ROOT / 'tools/reproductions').glob('*.py'))],
    ids=name_of)
def test_files_and_functions_fit(path):
    assert len(path.read_text().splitlines()) <= 400
    assert {name: length for name, length in lengths(path)
            if length > 50} == {}
