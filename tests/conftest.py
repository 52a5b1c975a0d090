import pytest
import torch


@pytest.fixture(autouse=True, scope='session')
def few_threads():
    """Keep the thread count, and so rounding, alike on every machine."""
    torch.set_num_threads(2)
