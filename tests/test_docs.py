"""What the pages say: snippets run, commands and paths exist, links hold."""
import ast
import functools
import importlib
import importlib.util
import inspect
import itertools
import re
import runpy
import shlex
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import distributed, nn

import mmtune
from mmtune.api import latest_runs
from mmtune.behaviours.activation import activation_runs
from mmtune.engine.options import CONFIG_KEY, OPTIONS, merge_options
from mmtune.layers.activations import ACTIVATION_KINDS
from mmtune.registry import HOOKS, MODEL_WRAPPERS, MODELS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs' / 'en'
PAGES = sorted([
    *DOCS.rglob('*.md'), *ROOT.glob('*.md'), *ROOT.glob('configs/**/*.md')
])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.DOTALL | re.MULTILINE)
each_page = pytest.mark.parametrize('page', PAGES, ids=NAMES)
render = runpy.run_path(str(ROOT / 'docs' / 'render.py'))


def blocks(page, *languages):
    return [
        block for language, block in FENCE.findall(page.read_text())
        if language in languages
    ]


def prose(page):
    """Return a page without its blocks of code."""
    return FENCE.sub('', page.read_text())


# --------------------------------------------------------------------------
# Snippets
# --------------------------------------------------------------------------


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    """One process of a distributed run, and a compiler that is quick."""
    monkeypatch.setattr(torch, 'compile',
                        functools.partial(torch.compile, backend='eager'))
    distributed.init_process_group(
        'gloo', f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def model_with_a_backbone():
    """What the snippets of the README and of a few pages call `model`."""
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    return nn.Sequential(OrderedDict(backbone=block))


def check_config(config):
    """Check what of a config is mmtune's: it builds, or takes its options."""
    key = config.get(CONFIG_KEY)
    if key is not None:
        merge_options(key, {})
    hooks = [*config.get('default_hooks', {}).values(),
             *config.get('custom_hooks', [])]
    for hook in hooks:
        if 'mmtune' in str(hook['type']):
            HOOKS.build(dict(hook))
    for name, registry in (('model', MODELS),
                           ('model_wrapper_cfg', MODEL_WRAPPERS)):
        value = config.get(name)
        if isinstance(value, dict) and 'mmtune' in str(value['type']):
            options = dict(value)
            kind = registry.get(options.pop('type'))
            if name == 'model_wrapper_cfg':
                options['module'] = nn.Identity()
            inspect.signature(kind).bind(**options)


# `make test` does without them.
OTHER_LIBRARIES = {'lightning', 'mmpose', 'mmpretrain', 'mmseg', 'mmyolo',
                   'timm', 'torchvision', 'transformers', 'ultralytics'}


def packages_of(block):
    """Packages that a block of Python imports, or whose configs it takes.

    ``mmtune.lightning`` counts as Lightning, which it imports.
    """
    modules = [module for node in ast.walk(ast.parse(block))
               if isinstance(node, (ast.Import, ast.ImportFrom))
               for module in ([node.module] if isinstance(
                   node, ast.ImportFrom) else [a.name for a in node.names])]
    modules += re.findall(r"^_base_ = '(\w+)::", block, re.MULTILINE)
    return {name for module in modules
            for name in module.removeprefix('mmtune.').split('.')[:1]}


# Those of the reproductions are whole scripts, which have tests of their own.
PAGES_WITH_PYTHON = [
    page for page in PAGES
    if blocks(page, 'python') and page.parent.name != 'reproduction'
]


@pytest.mark.parametrize(
    'page', PAGES_WITH_PYTHON,
    ids=[str(page.relative_to(ROOT)) for page in PAGES_WITH_PYTHON])
@pytest.mark.filterwarnings('ignore')
def test_python_runs(page, surroundings, tmp_path):
    torch.manual_seed(0)
    names = dict(__name__='__main__', model=model_with_a_backbone())
    missing = set()
    for number, block in enumerate(blocks(page, 'python')):
        absent = packages_of(block) & OTHER_LIBRARIES - {
            name for name in OTHER_LIBRARIES
            if importlib.util.find_spec(name) is not None}
        if absent:
            missing |= absent
            continue
        if '_base_ =' in block:
            path = tmp_path / f'config{number}.py'
            path.write_text(block)
            config = Config.fromfile(path)
        else:
            before = dict(names)
            exec(compile(block, f'{page.name}, block {number}', 'exec'), names)
            config = {
                key: value
                for key, value in names.items()
                if before.get(key) is not value
            }
        check_config(config)
    if missing:
        pytest.skip(f'blocks need {", ".join(sorted(missing))}')


@pytest.mark.parametrize('config', [
    dict(efficient_conv_bn_eval=dict(module='backbone')),
    dict(custom_hooks=[dict(type='mmtune.StepMemoryHook', every=1)]),
    dict(default_hooks=dict(tune_mode=dict(type='mmtune.TuneHook'))),
    dict(model=dict(type='mmtune.TuneModeModel', modules='backbone')),
])
def test_a_wrong_config_is_noticed(config):
    with pytest.raises((KeyError, TypeError, ValueError)):
        check_config(config)


# --------------------------------------------------------------------------
# Commands, paths and links
# --------------------------------------------------------------------------


def commands(page):
    """Yield the words of each command that a page shows."""
    for block in blocks(page, 'bash', 'shell'):
        for line in block.replace('\\\n', ' ').splitlines():
            for command in re.split('&&|;', line):
                yield shlex.split(command, comments=True)
    for text in re.findall(r'`((?:python|make) [^`]*)`', prose(page)):
        yield shlex.split(text.replace('\n', ' '))


def make_targets():
    text = (ROOT / 'Makefile').read_text()
    lines = re.findall(r'^\.PHONY: (.*)$', text, re.MULTILINE)
    return {target for line in lines for target in line.split()}


def options_of(script):
    """Return the text that names a script's options."""
    helpers = [script.parent / 'shared.py', script.parent / 'launch.py']
    return ''.join(path.read_text() for path in [script, *helpers]
                   if path.exists())


def check_command(words):
    if words[0] == 'make':
        targets = {word for word in words[1:] if '=' not in word}
        assert targets <= make_targets(), words
    elif words[0].endswith('python') and words[1] == '-m':
        if words[2].startswith('mmtune'):
            assert importlib.util.find_spec(words[2]), words
    elif words[0].endswith('python'):
        script = ROOT / words[1]
        assert script.is_file(), words
        known = options_of(script)
        for word in words[2:]:
            if word.startswith('--'):
                assert f"'{word}'" in known, words
    for word in words:
        if re.match(r'(configs|tests|tools|requirements)/', word):
            assert (ROOT / word).exists(), words


@each_page
def test_commands_exist(page):
    for words in commands(page):
        if words:
            check_command(words)


@pytest.mark.parametrize('command', [
    'make tset',
    'python tools/analysis_tools/inspect.py CONFIG',
    'python tools/analysis_tools/inspect_conv_bn.py CONFIG --mode tune',
    'python -m mmtune.nativ',
    'bash tools/dist_train.sh configs/none.py 8',
])
def test_a_wrong_command_is_noticed(command):
    with pytest.raises((AssertionError, ModuleNotFoundError)):
        check_command(shlex.split(command))


@each_page
def test_paths_exist(page):
    found = re.findall(
        r'`((?:mmtune|tests|tools|configs|docs|requirements)/[\w./-]*)`',
        prose(page))
    # What `make docs` builds may be there or not.
    assert [path for path in found if not (ROOT / path).exists()
            and not path.startswith('docs/_build')] == []


@functools.cache
def anchors(page):
    """Return what a link into a page may name, as GitHub and MyST do."""
    titles = re.findall(r'^#+ (.*)$', FENCE.sub('', page.read_text()),
                        re.MULTILINE)
    titles = [re.sub(r'\[(.*?)\]\(.*?\)', r'\1', title) for title in titles]
    return {
        re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')
        for title in titles
    }


@each_page
def test_links_hold(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
        if link.startswith('https://'):
            continue
        name, _, anchor = link.partition('#')
        target = page.parent / name if name else page
        # A folder has no page.
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target.resolve()), link


def test_contributors_find_every_room():
    text = (DOCS / 'contributing.md').read_text()
    rooms = {
        f'mmtune/{path.name}' + '/' * path.is_dir()
        for path in (ROOT / 'mmtune').iterdir()
        if not path.name.startswith(('_', '.')) and path.name != 'py.typed'
    }
    assert [room for room in sorted(rooms) if f'`{room}`' not in text] == []


# --------------------------------------------------------------------------
# Tables of what the code says
# --------------------------------------------------------------------------


def rows_of(page, title):
    """Return the cells of the table that begins with a title."""
    lines = (DOCS / page).read_text().splitlines()
    start = lines.index(next(
        line for line in lines if line.startswith(f'| {title} |')))
    table = itertools.takewhile(lambda line: line.startswith('|'),
                                lines[start + 2:])
    return [[cell.strip() for cell in line.strip('|').split(' | ')]
            for line in table]


def test_every_option_has_a_row():
    rows = rows_of('config.md', 'option')
    assert tuple(row[0].strip('`') for row in rows) == OPTIONS


def test_every_way_to_run_has_a_row():
    rows = rows_of('troubleshooting.md', 'it says')
    ways = re.findall("``'([a-z ]+)'``", inspect.getdoc(latest_runs))
    assert sorted(row[0].strip('*') for row in rows) == sorted(ways)


def test_every_way_of_an_activation_has_a_row():
    rows = rows_of('troubleshooting.md', 'an activation')
    ways = re.findall("``'([a-z ]+)'``", inspect.getdoc(activation_runs))
    assert ways and {row[0].strip('*') for row in rows} >= {*ways}


def test_every_activation_has_a_row():
    cells = ' '.join(row[0] for row in rows_of('activations.md', 'class'))
    assert {*re.findall(r'`(?:nn\.)?(\w+)`', cells)} >= {
        # Snippets of pages add theirs.
        name.rpartition('.')[2] for name in ACTIVATION_KINDS
        if name.startswith(('torch.', 'mmcv.'))
    }


def test_reasons_are_those_of_the_report():
    code = ''.join(
        path.read_text() for path in sorted((ROOT / 'mmtune').rglob('*.py')))
    # Strings that go on in the next line.
    code = re.sub(r"""['"]\n\s*f?['"]""", '', code)
    for reason, *_ in rows_of('troubleshooting.md', 'reason'):
        for part in reason.split('...'):
            assert part.strip() in code, reason


# --------------------------------------------------------------------------
# What is written by docs/render.py
# --------------------------------------------------------------------------


@pytest.mark.parametrize('name', render['TABLES'])
def test_tables_are_what_the_figures_make(name):
    assert (DOCS / name).read_text() == render['page'](name)


@pytest.mark.parametrize('name', render['DRAWINGS'])
def test_drawings_are_what_the_script_draws(name):
    assert (DOCS / '_static' / name).read_text() == render['DRAWINGS'][name]()


# --------------------------------------------------------------------------
# The API reference
# --------------------------------------------------------------------------


REFERENCE = re.findall(r'^\.\. automodule:: (\S+)$',
                       (DOCS / 'api.md').read_text(), re.MULTILINE)


def public(module):
    """Yield what a module gives to others, and the methods of its classes."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield f'{module.__name__}.{name}', value
        if inspect.isclass(value) and value.__module__.startswith('mmtune'):
            for method, function in vars(value).items():
                if not method.startswith('_') and (
                        callable(function) or isinstance(function, property)):
                    yield f'{module.__name__}.{name}.{method}', function


@pytest.mark.parametrize('module', REFERENCE)
def test_reference_is_complete(module):
    module = importlib.import_module(module)
    assert inspect.getdoc(module)
    undocumented = [
        name for name, value in public(module) if not inspect.getdoc(value)
    ]
    assert undocumented == []


def test_what_mmtune_gives_is_in_the_reference():
    found = {value.__module__ for _, value in public(mmtune)}
    assert found <= set(REFERENCE)


def test_every_module_says_what_it_is_for():
    files = (ROOT / 'mmtune').rglob('*.py')
    assert [file for file in files if not file.name.startswith('__main__')
            and not ast.get_docstring(ast.parse(file.read_text()))] == []
