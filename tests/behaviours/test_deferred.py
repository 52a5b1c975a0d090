import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmtune import turn_on
from mmtune.behaviours.calls import call_of
from mmtune.behaviours.deferred import (
    CompiledDeferredConv,
    DeferredConv,
    defer,
    settle,
)
from mmtune.layers.convolutions import conv_kind


@pytest.fixture
def block():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    turn_on(model.double().eval())
    return model


def promise_of(conv, x):
    return defer(call_of('0', conv, conv_kind(nn.Conv2d), x), (x, ))


def test_promise_has_every_attribute_of_a_tensor(block):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    missing = [
        name for name in dir(torch.Tensor) if not hasattr(DeferredConv, name)
    ]
    assert set(missing) <= {'__slotnames__'}  # made when one is pickled
    expected = F.conv2d(x, block[0].weight, block[0].bias, padding=1)
    promise = promise_of(block[0], x)
    assert promise.shape == expected.shape and promise.dim() == 4
    assert promise.dtype == x.dtype and promise.requires_grad
    assert repr(promise) == repr(promise.tensor())
    assert torch.equal(promise, expected) and len(promise) == 2
    assert float(promise.sum()) == float(expected.sum())
    assert (promise.detach().numpy() == expected.detach().numpy()).all()
    assert [row.shape for row in promise] == [row.shape for row in expected]
    assert {promise: 1}[promise] == 1


@pytest.mark.parametrize('value', [
    1, None, 'text', (1, 'a'), [None], dict(a=1), torch.Size([1, 2]), {1},
])
def test_settle_leaves_the_rest_alone(value):
    assert settle(value) is value


def test_promise_is_kept_once(block):
    promise = promise_of(block[0], torch.ones(1, 3, 5, 5).double())
    assert promise.foldable()
    assert promise.tensor() is promise.tensor()
    assert not promise.foldable()


@pytest.mark.parametrize('container', [
    lambda y: y, lambda y: (1, y), lambda y: [[y]], lambda y: dict(a=dict(b=y))
])
def test_settle_finds_promises(block, container):
    x = torch.ones(1, 3, 5, 5).double()
    settled = settle(container(promise_of(block[0], x)))
    assert type(settled) is type(container(x))
    leaf = settled
    while not isinstance(leaf, torch.Tensor):
        leaf = leaf[-1] if isinstance(leaf, (tuple, list)) else [
            *leaf.values()][0]
    expected = F.conv2d(x, block[0].weight, block[0].bias, padding=1)
    assert torch.equal(leaf, expected)


def test_promise_of_a_compiled_part_is_folded_outside_of_it(block):
    """Older compilers of torch break a graph between the two."""
    conv, norm = block
    x = torch.ones(1, 3, 5, 5).double()
    expected = block(x)
    call = call_of('0', conv, conv_kind(nn.Conv2d), x)
    promise = CompiledDeferredConv(call, (x, ), False)
    torch.testing.assert_close(norm(promise), expected)
    assert promise.output is None
