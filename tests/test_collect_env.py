import os
import subprocess
import sys

from mmtune import __version__
from mmtune.collect_env import PACKAGES, collect_env


def test_names_versions_and_the_native_node():
    env = collect_env()
    assert env['mmtune'] == __version__
    assert {'PyTorch', 'Python', 'Processor', *PACKAGES} <= set(env)
    assert env['Native node'].startswith(('yes: ', 'no: '))


def test_command():
    """As a bug report is asked to hold it."""
    output = subprocess.run(
        [sys.executable, '-m', 'mmtune.collect_env'],
        env=dict(os.environ, MMTUNE_NATIVE='0'),
        capture_output=True,
        text=True,
        check=True).stdout
    assert f'mmtune: {__version__}' in output
    assert 'Native node: no: off' in output
