import os

import pytest
import torch
from torch.torch_version import TorchVersion

from mmtune.behaviours import convolution, saved


def pytest_addoption(parser):
    parser.addoption('--every', type=int, default=1, metavar='N',
                     help='run the first test and every Nth after it')


def pytest_runtest_setup(item):
    if 'whole_graph' in item.keywords and TorchVersion(
            torch.__version__) < '2.9':
        pytest.skip('the compiler of this version of torch breaks the graph')
    if 'one_map' in item.keywords and saved._top_hooks is None:
        pytest.skip('with this version of torch activations run as stock')


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    chosen = items[::config.getoption('every')]
    kept = set(chosen)
    config.hook.pytest_deselected(
        items=[item for item in items if item not in kept])
    items[:] = chosen


@pytest.fixture(autouse=True, scope='session')
def one_thread():
    """Keep rounding alike, and processes out of each other's way."""
    os.environ['OMP_NUM_THREADS'] = '1'  # of the processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_is_small(request, monkeypatch):
    """Fold however small a map is: tests are quick with small ones."""
    if 'small_maps' not in request.keywords:
        monkeypatch.setattr(convolution, 'SMALL_MAP', 0)
        monkeypatch.setattr(convolution, 'SMALL_SHARE', 0)
