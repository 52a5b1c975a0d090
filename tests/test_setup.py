import ast
import importlib.metadata
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
MIM = ('configs', 'tools', 'model-index.yml')
SOURCES = ('mmtune', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md',
           'LICENSE', 'CHANGELOG.md', 'CITATION.cff', *MIM)
VERSION = runpy.run_path(str(ROOT / 'mmtune' / 'version.py'))['__version__']


def files_below(folder, *parts):
    """Return the paths of the files there, relative to the folder."""
    found = set()
    for part in parts:
        path = folder / part
        found.update(path.rglob('*') if path.is_dir() else [path])
    return {
        str(path.relative_to(folder))
        for path in found if path.is_file() and '__pycache__' not in path.parts
    }


def run(*command, cwd=None):
    """Return what a command prints; show its whole output if it fails."""
    answer = subprocess.run(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True)
    assert answer.returncode == 0, answer.stdout
    return answer.stdout


def backend(source, hook, folder):
    """Run a build hook of setuptools, which is what pip does."""
    run(sys.executable, '-c',
        f'from setuptools import build_meta as backend; '
        f'backend.{hook}({str(folder)!r})',
        cwd=source)
    return next(folder.iterdir())


def unpack(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp('source')
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(
                path,
                folder / name,
                ignore=shutil.ignore_patterns('.mim', '__pycache__'))
        else:
            shutil.copy(path, folder)
    # What setuptools takes along by itself.
    (folder / 'tests').mkdir()
    (folder / 'tests' / 'test_stray.py').touch()
    return folder


@pytest.fixture(scope='module')
def editable(source, tmp_path_factory):
    """A folder to put on the path, as site-packages after `pip install -e`."""
    wheel = backend(source, 'build_editable', tmp_path_factory.mktemp('built'))
    return unpack(wheel, tmp_path_factory.mktemp('editable'))


@pytest.fixture(scope='module')
def sdist(source, editable, tmp_path_factory):
    """The source archive of a folder that is installed editable."""
    return backend(source, 'build_sdist', tmp_path_factory.mktemp('sdist'))


@pytest.fixture(scope='module', params=['source', 'sdist'])
def installed(request, source, editable, tmp_path_factory):
    """The content of the wheel of such a folder, or of its archive."""
    if request.param == 'sdist':
        folder = tmp_path_factory.mktemp('unpacked')
        shutil.unpack_archive(request.getfixturevalue('sdist'), folder)
        source = next(folder.iterdir())
    wheel = backend(source, 'build_wheel', tmp_path_factory.mktemp('wheel'))
    assert wheel.name == f'mmtune-{VERSION}-py3-none-any.whl'
    return unpack(wheel, tmp_path_factory.mktemp('installed'))


def test_wheel_holds_mim(installed):
    held = files_below(installed / 'mmtune' / '.mim', *MIM)
    assert held == files_below(ROOT, *MIM)


def test_wheel_holds_the_package_and_no_more(installed):
    expected = {
        name
        for name in files_below(ROOT, 'mmtune')
        if name.endswith('.py') and not name.startswith('mmtune/.mim')
    }
    assert 'mmtune/api.py' in expected
    found = {
        name
        for name in files_below(installed, '.') if not re.match(
            r'mmtune/\.mim/|mmtune-[^/]*\.dist-info/', name)
    }
    native = files_below(ROOT, 'mmtune/csrc')
    assert 'mmtune/csrc/fold.cpp' in native
    assert found == expected | native | {'mmtune/py.typed'}


def test_sdist_holds_the_sources_and_no_more(sdist):
    with tarfile.open(sdist) as archive:
        found = {
            member.name.split('/', 1)[1]
            for member in archive if member.isfile()
        }
    made = {'PKG-INFO', 'setup.cfg'} | {
        name
        for name in found if name.startswith('mmtune.egg-info/')
    }
    expected = {
        name
        for name in files_below(ROOT, *SOURCES)
        if not name.startswith('mmtune/.mim/')
    }
    assert 'mmtune/csrc/fold.cpp' in expected
    assert found - made == expected


def test_wheel_has_a_licence_and_authors(installed):
    folder, = installed.glob('mmtune-*.dist-info')
    metadata = importlib.metadata.PathDistribution(folder).metadata
    assert metadata['License-Expression'] == 'Apache-2.0'
    assert metadata['Author'] == 'mmtune contributors'
    licence = folder / 'licenses' / 'LICENSE'
    assert licence.read_text() == (ROOT / 'LICENSE').read_text()
    # What a page of the package would show as it is written.
    assert metadata['Description-Content-Type'] == 'text/markdown'


@pytest.mark.parametrize('installed', ['sdist'], indirect=True)
def test_wheel_works_where_there_is_torch_alone(installed):
    script = (
        'import sys\n'
        'for name in ("mmengine", "mmcv", "mmdet", "numpy", "rich"):\n'
        '    sys.modules[name] = None\n'  # makes an import of it fail
        'import mmtune, torch\n'
        'from torch import nn\n'
        'model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()\n'
        'report = mmtune.turn_on(model)\n'
        'model(torch.ones(2, 3, 8, 8)).sum().backward()\n'
        'print(mmtune.__file__, len(report.rewritten))')
    # The native node would take half a minute to build.
    output = run(
        'env', 'MMTUNE_NATIVE=0', sys.executable, '-c', script,
        cwd=installed)
    package = installed / 'mmtune' / '__init__.py'
    # torch warns where there is no NumPy.
    assert output.splitlines()[-1] == f'{package} 1'


def test_editable_install_holds_mim(source, editable):
    # -IS keeps any other mmtune out of the search.
    origin = run(
        sys.executable, '-IS', '-c', f'import site; '
        f'site.addsitedir({str(editable)!r}); from importlib import util; '
        f'print(util.find_spec("mmtune").origin)').strip()
    assert origin == str(source / 'mmtune' / '__init__.py')
    mim = source / 'mmtune' / '.mim'
    assert files_below(mim, *MIM) == files_below(ROOT, *MIM)
    for name in MIM:
        assert (mim / name).resolve() == source / name


def test_version_is_read_without_torch(source):
    # None in sys.modules makes an import of that name fail.
    output = run(
        sys.executable,
        '-c',
        'import runpy, sys; sys.modules["torch"] = None; '
        'sys.argv = ["setup.py", "--version"]; '
        'runpy.run_path("setup.py", run_name="__main__")',
        cwd=source)
    assert output.splitlines()[-1] == VERSION


def test_installed_version_is_the_written_one():
    assert importlib.metadata.version('mmtune') == VERSION


def pinned():
    """Return the constraints that hold for this Python, by package."""
    lines = (ROOT / 'requirements' / 'constraints.txt').read_text()
    requirements = [
        Requirement(line) for line in lines.splitlines()
        if line and not line.startswith('#')
    ]
    return {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate()
    }


def is_brought_by_torch(name):
    """Return whether a CUDA build of torch chooses the version by itself."""
    return name == 'triton' or name.startswith(('cuda-', 'nvidia-'))


def needed(name, extras=(), seen=None):
    """Return every package that a package needs, and they in turn."""
    seen = set() if seen is None else seen
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        key = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({'extra': extra})
            for extra in ('', *extras))
        if wanted and key not in seen and not is_brought_by_torch(key):
            seen.add(key)
            needed(requirement.name, requirement.extras, seen)
    return seen


@pytest.mark.parametrize('extras, some', [
    (('mmdet', 'tests', 'lint'), {'torch', 'mmcv', 'ruff', 'sympy'}),
    (('docs', ), {'sphinx', 'docutils'}),
    (('release', ), {'twine', 'keyring'}),
])
def test_constraints_pin_all_that_is_needed(extras, some):
    try:
        packages = needed('mmtune', extras)
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f'{error.name} comes with `make docs` or `make wheel`')
    assert some <= packages
    specifiers = pinned()
    assert packages - set(specifiers) == set()
    different = {
        name: importlib.metadata.version(name)
        for name in packages if not specifiers[name].contains(
            importlib.metadata.version(name).split('+')[0])
    }
    assert different == {}


def third_party_imports(folder):
    for path in sorted((ROOT / folder).rglob('*.py')):
        if path.parent.name == 'libraries':
            continue  # each says what it needs itself
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            yield from (name.split('.')[0] for name in names)


@pytest.mark.parametrize('folder, extras', [
    ('mmtune', ('mmdet', 'device', 'huggingface', 'lightning')),
    ('tools', ('mmdet', 'tests')),
    ('tests', ('mmdet', 'tests')),
])
def test_imports_are_declared(folder, extras):
    # Lightning under its other name.
    declared = {'mmtune', 'pytorch-lightning', 'setuptools'}
    for text in importlib.metadata.requires('mmtune'):
        requirement = Requirement(text)
        if requirement.marker is None or any(
                requirement.marker.evaluate({'extra': extra})
                for extra in extras):
            declared.add(canonicalize_name(requirement.name))
    distributions = importlib.metadata.packages_distributions()
    local = {
        path.stem
        for place in (folder, 'tools') for path in (ROOT / place).rglob('*')
    }
    undeclared = {
        name
        for name in third_party_imports(folder)
        if name not in sys.stdlib_module_names | local | {folder}
        and not declared.intersection(
            # Not everything is installed: torchvision is as it is called.
            map(canonicalize_name, [name, *distributions.get(name, ())]))
    }
    assert undeclared == set()
