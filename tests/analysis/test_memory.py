import pytest
import torch
from torch import nn

from mmtune.analysis import peak_bytes, peak_on, saved_bytes

MIB = 2**20


def mebibyte():
    return torch.ones(MIB // 4)


@pytest.fixture
def weight():
    return nn.ParameterList([nn.Parameter(mebibyte())])


@pytest.mark.parametrize('forward, expected', [
    (lambda x, w: x + w, 0),
    (lambda x, w: x * w, 1),
    (lambda x, w: x.exp() * 2, 1),
    (lambda x, w: (x * w).exp().exp(), 3),
    (lambda x, w: (x.view(2, -1) * x.view(2, -1)).sum(), 1),
    (lambda x, w: (w * w).sum(), 0),
])
def test_saved_bytes_counts_storages_once(weight, forward, expected):
    x = mebibyte().requires_grad_()
    with saved_bytes(weight) as saved:
        y = forward(x, weight[0])
    assert saved.total == expected * MIB
    y.sum().backward()
    del y
    assert saved.total == 0


def test_saved_bytes_does_not_disturb_gradients():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with saved_bytes(nn.Identity()):
        y = x.exp() * x.sin()
        grad, = torch.autograd.grad(y.sum(), x, create_graph=True)
        second, = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, 2 * x.exp() * x.cos())


def test_saved_bytes_of_a_dead_branch_does_not_count(weight):
    x = mebibyte().requires_grad_()
    with saved_bytes(weight) as saved:
        y = x.exp()
        del y
    assert saved.total == 0


def test_peak_bytes_follows_what_is_alive():
    outside = mebibyte()
    with peak_bytes() as memory:
        one = mebibyte()
        assert (memory.current, memory.peak) == (MIB, MIB)
        two = one + outside
        del one
        three = two.view(2, -1)
        two.add_(1)
        assert (memory.current, memory.peak) == (MIB, 2 * MIB)
        del two, three
        assert (memory.current, memory.peak) == (0, 2 * MIB)


def test_peak_bytes_of_a_backward():
    x = mebibyte().requires_grad_()
    with peak_bytes() as memory:
        x.exp().sum().backward()
    # The output, kept; the gradient of the sum is expanded, not stored; then
    # the gradient of x, which stays.
    assert 2 * MIB <= memory.peak <= 2 * MIB + 64
    assert MIB <= memory.current <= MIB + 64


def test_a_buffer_replaced_in_the_forward_hides_nothing():
    model = nn.Module()
    model.register_buffer('state', mebibyte())
    x = mebibyte().requires_grad_()
    with saved_bytes(model) as saved:
        model.state = None
        y = x.exp()
    assert saved.total == MIB and y is not None


def test_peak_on_the_cpu_is_that_of_tensors():
    with peak_on(torch.device('cpu')) as peak:
        kept = mebibyte() + mebibyte()
    assert peak() == 3 * kept.nbytes


def test_peak_on_a_gpu_is_what_its_allocator_adds(monkeypatch):
    """Without a GPU: what is asked of torch.cuda, and in which order."""
    asked = []

    def answer(name, value=None):
        monkeypatch.setattr(
            torch.cuda, name,
            lambda device: asked.append((name, device.index)) or value)

    answer('synchronize')
    answer('memory_allocated', 100)
    answer('reset_peak_memory_stats')
    answer('max_memory_allocated', 350)
    with peak_on(torch.device('cuda', 1)) as peak:
        assert [name for name, _ in asked] == [
            'synchronize', 'memory_allocated', 'reset_peak_memory_stats'
        ]
    assert peak() == 250
    assert {index for _, index in asked} == {1}
