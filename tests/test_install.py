import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).resolve().parents[1] / 'requirements'


@pytest.fixture
def install(tmp_path, monkeypatch):
    """The set-up script, working on an empty project in a folder."""
    spec = importlib.util.spec_from_file_location('install',
                                                  REQUIREMENTS / 'install.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ('ROOT', 'CONSTRAINTS', 'VENV', 'PYTHON', 'COMPLETE', 'CHANGING')
    for name in names:
        path = getattr(module, name).relative_to(REQUIREMENTS.parent)
        monkeypatch.setattr(module, name, tmp_path / path)
    for name in ('requirements/constraints.txt', 'setup.py', 'pyproject.toml',
                 'mmtune/version.py', '.venv/bin/python'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return module


@pytest.fixture
def steps(install, monkeypatch):
    """The commands of a set-up in which pip and the ops do as they should."""
    commands = []

    def record(*command, **kwargs):
        commands.append(' '.join(map(str, command)))

    monkeypatch.setattr(install, 'run', record)
    monkeypatch.setattr(install, 'runs', lambda: True)
    monkeypatch.setattr(install, 'ops_work', lambda: True)
    monkeypatch.setattr(install, 'build_native',
                        lambda: commands.append('native'))
    return commands


def test_torch_comes_first_and_nothing_is_done_twice(install, steps):
    install.main()
    torch, others, check, native = steps
    assert 'torch' in torch and '[mmdet,tests,lint]' in others
    assert f'-c {install.CONSTRAINTS}' in torch
    assert f'-c {install.CONSTRAINTS}' in others
    assert 'mmcv.ops' in check and native == 'native'
    install.main()
    assert len(steps) == 4


@pytest.mark.parametrize('name', [
    'requirements/constraints.txt', 'setup.py', 'pyproject.toml',
    'mmtune/version.py'
])
def test_a_changed_file_sets_up_again(install, steps, name):
    install.main()
    before = list(steps)
    (install.ROOT / name).write_text('other')
    install.main()
    assert steps == before * 2


def test_extra_comes_last_and_once(install, steps):
    for _ in range(2):
        install.main(['docs'])
    assert len(steps) == 5
    assert steps[-1].endswith(f'--editable {install.ROOT}[docs]')
    (install.ROOT / 'setup.py').write_text('other')
    install.main(['docs'])
    assert len(steps) == 10


def test_set_up_cut_short_starts_from_a_new_venv(install, monkeypatch, steps):

    def stop(*command):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(install, 'pip', stop)
        with pytest.raises(KeyboardInterrupt):
            install.main()
    assert steps == []
    install.main()
    assert '-m venv --clear' in steps[0]


def test_venv_without_pip_is_made_anew(install, monkeypatch, steps):
    monkeypatch.setattr(install, 'runs', lambda: False)
    install.main()
    assert '-m venv --clear' in steps[0]


def test_mmcv_is_compiled_where_its_wheel_fails(install, monkeypatch, steps):
    outcomes = iter([False, False])
    monkeypatch.setattr(install, 'ops_work', lambda: next(outcomes))
    monkeypatch.setattr(install.subprocess, 'run',
                        lambda *a, **k: subprocess.CompletedProcess(a, 0))
    monkeypatch.setattr(install, 'compile_mmcv', lambda: 'mmcv.whl')
    install.main()
    assert steps[1].endswith('--force-reinstall --no-deps mmcv.whl')


def test_old_python_is_refused(install, monkeypatch):
    monkeypatch.setattr(install.sys, 'version_info', (3, 9, 18))
    with pytest.raises(SystemExit, match='needs Python 3.10 .* is 3.9: name'):
        install.main()


@pytest.mark.parametrize('change, message', [
    (dict(compiler='no-such-compiler'), 'no C.. compiler `no-such-compiler`'),
    (dict(header='/none/Python.h'), '/none/Python.h is missing'),
    (dict(gpu=True), 'no nvcc: install CUDA 13.0'),
])
def test_what_compiling_needs_is_checked(install, monkeypatch, change,
                                         message):
    about = dict(gpu=False, nvcc=False, cuda='13.0', header=__file__)
    monkeypatch.setenv('CXX', sys.executable)
    install.check_compiler(about)

    monkeypatch.setenv('CXX', change.pop('compiler', sys.executable))
    with pytest.raises(SystemExit, match=message):
        install.check_compiler({**about, **change})


def test_sources_are_unpacked_whole_and_once(install, monkeypatch, tmp_path):
    folder = tmp_path / 'build'
    half = folder / 'download' / 'mmcv-2.1.0'
    half.mkdir(parents=True)
    (half / 'half').touch()
    downloads = []

    def download(*command, env):
        downloads.append(command)
        target = Path(command[command.index('--dest') + 1])
        target.mkdir()
        with tarfile.open(target / 'mmcv-2.1.0.tar.gz', 'w:gz') as archive:
            archive.add(__file__, 'mmcv-2.1.0/setup.py')

    monkeypatch.setattr(install, 'run', download)
    for _ in range(2):
        sources = install.unpack_mmcv(folder, os.environ)
        assert os.listdir(sources) == ['setup.py']
    assert len(downloads) == 1


def test_compiling_shows_progress(install, tmp_path, capsys):
    script = 'print("start"); print("  [1/4] c++"); print("[4/4] c++ -shared")'
    log = tmp_path / 'log'
    install.show_compiling([sys.executable, '-c', script], os.environ, log)
    shown = capsys.readouterr().out
    assert '1 of 4 files' in shown and '4 of 4 files' in shown
    assert 'start' in log.read_text()


def test_failed_compiling_shows_why(install, tmp_path, capsys):
    script = 'print("error: no such header"); raise SystemExit(1)'
    log = tmp_path / 'log'
    with pytest.raises(SystemExit, match=f'did not compile; {log}'):
        install.show_compiling([sys.executable, '-c', script], os.environ, log)
    assert 'error: no such header' in capsys.readouterr().out


def test_failed_command_is_named(install):
    with pytest.raises(SystemExit, match='-c exit.7.` failed with status 7'):
        install.run(sys.executable, '-c', 'exit(7)')


def test_bare_exec_defines_what_locals_shows():
    script = ('from sitecustomize import exec_in_frame as exec\n'
              'def version():\n'
              '    exec("__version__ = 7")\n'
              '    return locals()["__version__"]\n'
              'assert version() == 7\n'
              'names = {}\n'
              'exec("x = 1", names)\n'
              'assert names["x"] == 1 and "x" not in globals()\n'
              'exec("y = 2")\n'
              'assert y == 2\n')
    subprocess.run([sys.executable, '-c', script],
                   check=True,
                   env=dict(
                       os.environ,
                       PYTHONPATH=str(REQUIREMENTS / 'mmcv_build')))
