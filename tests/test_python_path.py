"""The tests of blocks pass without the native node as well."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmtune import native

ROOT = Path(__file__).resolve().parents[1]
# Those that run blocks, and measure neither time nor bytes of the machine.
CORE = ('behaviours', 'functional', 'integrations/test_changes.py',
        'integrations/test_compile.py', 'integrations/test_training.py',
        'layers', 'matching', 'test_api.py', 'test_backbones.py',
        'test_numbers.py')
IS_OFF = os.environ.get('MMTUNE_NATIVE') == '0'

beside_the_node = pytest.mark.skipif(
    IS_OFF, reason='every test runs without the native node')


@pytest.mark.skipif(not IS_OFF, reason='runs with the native node')
def test_there_is_no_node():
    assert native.node() is None


def run_without_the_node(paths, *options):
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
         f'{__file__}::test_there_is_no_node',
         *(f'tests/{path}' for path in paths), *options],
        cwd=ROOT, env={**os.environ, 'MMTUNE_NATIVE': '0'},
        capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr


@beside_the_node
def test_some_pass_without_the_node():
    run_without_the_node(CORE, '-m', 'not exhaustive and not slow',
                         '--every', '97')


@beside_the_node
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('path', CORE)
def test_all_pass_without_the_node(path):
    run_without_the_node([path], '-m', 'not exhaustive')
