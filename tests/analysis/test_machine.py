import os
import subprocess

import pytest
import torch

from mmtune import __version__
from mmtune.analysis.machine import describe_commit, describe_machine


def test_describe_machine():
    found = describe_machine()
    assert found.pop('cpu')
    assert found == dict(
        device='CPU',
        cores=os.cpu_count(),
        torch=torch.__version__,
        mmtune=__version__)


def test_no_commit_outside_of_a_repository(tmp_path):
    assert describe_commit(tmp_path) is None


@pytest.mark.parametrize('change, dirty', [
    (None, False),
    ('docs/figures.json', False),
    ('code.py', True),
])
def test_commit(change, dirty, tmp_path):

    def git(*arguments):
        return subprocess.run(
            ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *arguments],
            cwd=tmp_path, check=True, capture_output=True,
            text=True).stdout.strip()

    git('init')
    for name in ('docs/figures.json', 'code.py'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('old')
    git('add', '.')
    git('commit', '-m', 'first')
    if change:
        (tmp_path / change).write_text('changed')
    commit = git('rev-parse', '--short', 'HEAD')
    assert describe_commit(tmp_path / 'docs') == commit + '-dirty' * dirty
