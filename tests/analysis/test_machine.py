import os

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
