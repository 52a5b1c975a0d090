"""A clamp that keeps bits, against autograd's own."""
import pytest
import torch
import torch.nn.functional as F

from mmtune import native
from mmtune.clamp import ClampFunction, inside, select

LAYOUTS = {
    'contiguous': (torch.Size((2, 5, 3, 7)), torch.contiguous_format),
    'channels_last': (torch.Size((2, 5, 3, 7)), torch.channels_last),
    '3d': (torch.Size((2, 3, 2, 3, 4)), torch.channels_last_3d),
    'many parts': (torch.Size((3, 4099)), torch.contiguous_format),
    'one': (torch.Size((1, )), torch.contiguous_format),
    'no dimension': (torch.Size(()), torch.contiguous_format),
    'empty': (torch.Size((0, 3)), torch.contiguous_format)
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=['native', 'python'])
def path(request, monkeypatch):
    if request.param == 'python':
        monkeypatch.setattr(native, 'node', lambda: None)
    elif native.node() is None:
        pytest.skip('there is no native node')


def values(shape, dtype):
    """Some at the borders; no NaN, of which stock's loops differ."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    special = torch.tensor([0, 1.3, -1.3, 6, float('inf'), -float('inf')])
    flat = x.view(-1)
    flat[::4] = special[torch.arange(len(flat[::4])) % 6]
    return x.to(dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('low, high', [(-1.3, 1.3), (0., 6.), (0, 1e-3)])
@pytest.mark.parametrize('shape, layout', LAYOUTS.values(), ids=LAYOUTS)
def test_lets_through_what_autograd_does(path, shape, layout, low, high,
                                         dtype):
    x = values(shape, dtype).contiguous(memory_format=layout)
    grad = values(shape, dtype)
    grad.view(-1)[1::5] = float('nan')
    bits = inside(x, low, high, layout)
    assert bits.dtype == torch.uint8
    assert len(bits) == (x.numel() + 7) // 8
    expected = torch.ops.aten.hardtanh_backward(grad, x, low, high)
    torch.testing.assert_close(
        select(grad, bits, layout), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize('strided', ['as it is', 'transposed', 'every other',
                                     'channels_last', 'expanded'])
@pytest.mark.parametrize('inplace', [False, True])
def test_node_equals_stock(path, inplace, strided):
    results = []
    for clamp in (F.hardtanh, ClampFunction.apply):
        leaf = values((2, 4, 6, 6), torch.float64).nan_to_num(0, 2, -2)
        leaf.requires_grad_()
        x = {
            'as it is': lambda t: t * 1,
            'transposed': lambda t: (t * 1).mT,
            'every other': lambda t: (t * 1)[..., ::2],
            'channels_last': lambda t: (t * 1).contiguous(
                memory_format=torch.channels_last),
            'expanded': lambda t: (t * 1)[:, :1].expand(-1, 3, -1, -1)
        }[strided](leaf)
        if inplace and x._is_view():
            x = x.clone()
        y = clamp(x, -1.3, 1.3, inplace)
        assert (y is x) == inplace
        z = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).pow(3).sum()
        grad, = torch.autograd.grad(z, leaf, create_graph=True)
        results.append((y.detach(), grad.detach(),
                        *torch.autograd.grad(grad.sum(), leaf)))
    for expected, actual in zip(*results):
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=0, equal_nan=True)


def test_third_derivative(path):
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)

    def cubed(x):
        return ClampFunction.apply(x * 1, -.5, .5, True) ** 3

    torch.autograd.gradcheck(cubed, x)
    torch.autograd.gradgradcheck(cubed, x)


def test_both_ways_have_one_format(monkeypatch):
    if native.node() is None:
        pytest.skip('there is no native node')
    x = values((1001, ), torch.float32)
    bits = inside(x, -1, 1, torch.contiguous_format)
    monkeypatch.setattr(native, 'node', lambda: None)
    assert torch.equal(bits, inside(x, -1, 1, torch.contiguous_format))
