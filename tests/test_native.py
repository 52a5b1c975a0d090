"""The native node gives what stock modules give, whichever way it runs."""
import contextlib
import math
import os
import stat
import subprocess
import sys
import textwrap
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmtune import native
from mmtune.analysis import saved_bytes
from mmtune.functional.fold import Plan, fold_and_run_norm
from mmtune.functional.geometry import Convolution, Product

ROOT = Path(__file__).resolve().parents[1]
PLANS = (Plan.FOLD, Plan.SCALE)
PARAMETERS = ('0.weight', '0.bias', '1.weight', '1.bias')


class Operators(TorchDispatchMode):
    """Counts them; where a mode watches, the node runs by operators alone."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A view has an alias among what it returns.
        if not any(returned.alias_info for returned in func._schema.returns):
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


PATHS = {'loops': contextlib.nullcontext, 'operators': Operators}


@pytest.fixture(scope='session')
def node():
    """Built once a session, by whichever test comes first."""
    if os.environ.get('MMTUNE_NATIVE') == '0' or not native._compiler():
        pytest.skip('runs without the native node')
    found = native.node()
    # Else Python would pass most of the tests in its place.
    assert found is not None
    return found


# --------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------

LAYERS = {
    'plain': (nn.Conv2d(3, 4, 3, padding=1), (5, 6)),
    'no bias': (nn.Conv2d(3, 4, 3, bias=False), (5, 6)),
    'pointwise': (nn.Conv2d(3, 20, 1), (5, 7)),
    'strided': (nn.Conv2d(3, 4, 3, stride=2), (6, 8)),
    'dilated': (nn.Conv2d(3, 4, 3, (2, 1), 2, (1, 2)), (7, 7)),
    'groups': (nn.Conv2d(4, 6, 3, groups=2), (5, 5)),
    'depthwise': (nn.Conv2d(4, 4, 3, groups=4), (5, 5)),
    'depthwise pointwise': (nn.Conv2d(4, 4, 1, groups=4), (5, 5)),
    'one channel': (nn.Conv2d(1, 1, 3, padding=1), (5, 5)),
    'one pixel': (nn.Conv2d(3, 4, 3, padding=1), (1, 1)),
    'long rows': (nn.Conv2d(70, 3, 3), (12, 53)),
    '1d': (nn.Conv1d(3, 4, 3, padding=1), (9, )),
    '3d': (nn.Conv3d(2, 3, 2), (3, 4, 3)),
    'transposed': (nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), (4, 5)),
    'transposed 1d': (nn.ConvTranspose1d(3, 4, 3, 2), (5, )),
    'transposed 3d': (nn.ConvTranspose3d(2, 3, 2, bias=False), (3, 3, 2)),
    'transposed groups': (nn.ConvTranspose2d(
        6, 4, 3, 2, 1, 1, groups=2, dilation=2), (4, 5)),
    'linear': (nn.Linear(7, 5), ()),
    'linear, no bias': (nn.Linear(7, 5, bias=False), ()),
}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d,
         3: nn.BatchNorm3d}


def make_block(layer, size, batch=2, affine=True, eps=1e-5, seed=0,
               dtype=torch.float64):
    """A pair of modules, an input and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    linear = isinstance(layer, nn.Linear)
    channels = layer.out_features if linear else layer.out_channels
    norm = NORMS[len(size)](channels, eps=eps, affine=affine)
    settings = {name: getattr(layer, name) for name in layer.__constants__
                if name not in ('output_padding', 'padding_mode')}
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        settings['output_padding'] = layer.output_padding
    block = nn.Sequential(
        type(layer)(bias=layer.bias is not None, **settings), norm)
    block.double().eval()
    with torch.no_grad():
        for tensor in block.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(randn(*tensor.shape))
        norm.running_var.square_()
    features = layer.in_features if linear else layer.in_channels
    x = randn(batch, features, *size)
    grad = randn(*block(x).shape)
    return block.to(dtype), x.to(dtype), grad.to(dtype)


def run(block, x, plan=Plan.CHOOSE):
    conv, bn = block
    if isinstance(conv, nn.Linear):
        linear_map = Product()
        transposed = False
    else:
        transposed = conv.transposed
        linear_map = Convolution(conv.stride, conv.padding, conv.dilation,
                                 transposed, conv.output_padding, conv.groups)
    ones = (1, ) * (conv.weight.dim() - 2)
    if not transposed:
        shape = (conv.weight.size(0), 1, *ones)
    elif conv.groups == 1:
        shape = (1, conv.weight.size(1), *ones)
    else:
        shape = (conv.groups, 1, conv.weight.size(1), *ones)
    return fold_and_run_norm(linear_map, x, conv.weight, conv.bias, bn.weight,
                             bn.bias, bn.running_mean, bn.running_var, bn.eps,
                             shape, plan)


def results(function, block, x, grad, frozen=()):
    """The output and every gradient, by name; None where there is none."""
    x = x.detach().requires_grad_('x' not in frozen)
    learned = {'x': x, **dict(block.named_parameters())}
    for name, tensor in learned.items():
        tensor.requires_grad_(name not in frozen)
    output = function(block, x)
    wanted = [t for t in learned.values() if t.requires_grad]
    grads = iter(torch.autograd.grad(output, wanted, grad.to(output.dtype)))
    return {'output': output.detach(),
            **{name: next(grads) if t.requires_grad else None
               for name, t in learned.items()}}


def stock(block, x):
    return block(x)


def planned(plan):
    return lambda block, x: run(block, x, plan)


def assert_close(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
            continue
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        scale = value.abs().max().item() if value.numel() else 0.
        error = (actual[name] - value).abs()
        assert (error <= tolerance * max(scale, 1.)).all(), name


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('plan', PLANS)
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('layer', LAYERS)
def test_equals_stock(node, layer, affine, plan, path):
    block, x, grad = make_block(*LAYERS[layer], affine=affine)
    expected = results(stock, block, x, grad)
    with PATHS[path]():
        actual = results(planned(plan), block, x, grad)
    assert_close(actual, expected)


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('plan', PLANS)
@pytest.mark.parametrize('layer', ['strided', 'transposed groups', 'linear'])
@pytest.mark.parametrize('learned', [
    ('x', ), ('0.weight', ), ('0.bias', ), ('1.weight', ), ('1.bias', ),
    ('x', '1.bias'), ('x', '1.weight'), ('0.weight', '1.bias'),
    ('x', '0.weight'), PARAMETERS
])
def test_equals_stock_where_little_learns(node, learned, layer, plan, path):
    block, x, grad = make_block(*LAYERS[layer])
    frozen = {'x', *PARAMETERS} - set(learned)
    expected = results(stock, block, x, grad, frozen)
    with PATHS[path]():
        actual = results(planned(plan), block, x, grad, frozen)
    assert_close(actual, expected)


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('plan', PLANS)
def test_an_empty_batch(node, plan, path):
    block, x, grad = make_block(*LAYERS['plain'], batch=0)
    expected = results(stock, block, x, grad)
    with PATHS[path]():
        actual = results(planned(plan), block, x, grad)
    assert_close(actual, expected)


@pytest.mark.parametrize('layer', [
    'plain', 'groups', 'transposed groups', 'linear'
])
@pytest.mark.parametrize('plan', PLANS)
@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('of_x, of_weight, of_norm', [
    (torch.float32, torch.float32, torch.float32),
    (torch.float16, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float32),
    (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float64, torch.float32),
    (torch.float64, torch.float32, torch.float32),
])
def test_dtypes_are_those_of_the_node_in_python(
        node, of_x, of_weight, of_norm, plan, path, layer, monkeypatch):
    block, x, grad = make_block(*LAYERS[layer])
    exact = results(stock, block, x, grad)
    block[0].to(of_weight)
    block[1].to(of_norm)
    with PATHS[path]():
        actual = results(planned(plan), block, x.to(of_x), grad)
    monkeypatch.setattr(native, '_outcome', native._Outcome(None, None))
    expected = results(run, block, x.to(of_x), grad)
    low = min((of_x, of_weight, of_norm), key=lambda d: d.itemsize)
    bound = 8 * torch.finfo(low).eps
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        scale = exact[name].abs().max()
        assert (actual[name] - exact[name]).abs().max() <= bound * scale, name


@pytest.mark.parametrize('dtype', [
    torch.float64, torch.float32, torch.bfloat16
])
@pytest.mark.parametrize('layer', LAYERS)
def test_a_scaled_map_is_stock_bit_for_bit(node, layer, dtype):
    block, x, _ = make_block(*LAYERS[layer], batch=5, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(run(block, x, Plan.SCALE), block(x))
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
            assert torch.equal(run(block, x, Plan.SCALE), block(x))
    # And to mean anything:
    assert not torch.equal(run(block, x, Plan.FOLD), block(x))


@pytest.mark.parametrize('size, plan', [((6, 6), Plan.SCALE),
                                        ((64, 64), Plan.FOLD)])
def test_small_maps_are_scaled(node, size, plan):
    block, x, _ = make_block(
        nn.Conv2d(16, 16, 3, padding=1), size, dtype=torch.float32)
    with torch.no_grad():
        outputs = [run(block, x, p) for p in (Plan.CHOOSE, *PLANS)]
    equal = [torch.equal(outputs[0], output) for output in outputs[1:]]
    assert equal == [plan == p for p in PLANS]


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('plan', PLANS)
def test_a_value_that_is_not_finite_stays_in_its_channel(node, plan, path):
    for name in PARAMETERS:
        block, x, grad = make_block(*LAYERS['no bias' if name == '0.bias'
                                            else 'plain'])
        state = block.state_dict()
        if name not in state:
            name = '1.running_mean'
        state[name][1] = math.nan
        with PATHS[path]():
            actual = results(planned(plan), block, x, grad)
        for key, expected in results(stock, block, x, grad).items():
            assert torch.equal(actual[key].isfinite(), expected.isfinite())


@pytest.mark.parametrize('plan', PLANS)
@pytest.mark.parametrize('layer', [
    'plain', 'strided', 'groups', 'transposed', 'transposed groups', 'linear',
    'linear, no bias'
])
def test_first_and_second_derivative(node, layer, plan):
    layer, size = LAYERS[layer]
    block, x, _ = make_block(layer, size, batch=2)
    x = x[..., :4, :4] if x.dim() == 4 else x
    names = [name for name, _ in block.named_parameters()]

    def function(x, *values):
        tensors = dict(zip(names, values))
        return torch.func.functional_call(
            _Planned(block, plan), {f'block.{n}': t
                                    for n, t in tensors.items()}, (x, ))

    leaves = [x.requires_grad_(), *block.parameters()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)
    # Of the input alone, which is not kept then.
    frozen = [leaf.detach() for leaf in leaves[1:]]
    assert gradgradcheck(lambda x: function(x, *frozen).square(), leaves[:1],
                         fast_mode=True)


class _Planned(nn.Module):

    def __init__(self, block, plan):
        super().__init__()
        self.block, self.plan = block, plan

    def forward(self, x):
        return run(self.block, x, self.plan)


# All but the first are followed operator by operator.
@pytest.mark.parametrize('create_graph', [False, True])
@pytest.mark.parametrize('plan', PLANS)
@pytest.mark.parametrize('frozen', [(), PARAMETERS, ('x', '0.weight')])
@pytest.mark.parametrize('layer', [
    'plain', 'strided', 'groups', 'transposed', 'transposed groups', 'linear',
    'linear, no bias'
])
@pytest.mark.parametrize('way', ['batched', 'dual'])
def test_a_gradient_that_is_followed(node, way, layer, frozen, plan,
                                     create_graph):
    """Batched, or with a tangent, which comes through backward."""
    block, x, grad = make_block(*LAYERS[layer])
    x.requires_grad_('x' not in frozen)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)
    wanted = [t for t in (x, *block.parameters()) if t.requires_grad]

    def derivatives(output):
        if way == 'batched':
            grads = torch.stack([grad, grad.flip(0), grad.sin()])
            return torch.autograd.grad(output, wanted, grads,
                                       create_graph=create_graph,
                                       is_grads_batched=True)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(grad, grad.cos())
            given = torch.autograd.grad(output, wanted, dual,
                                        create_graph=create_graph)
            pairs = [forward_ad.unpack_dual(g) for g in given]
            return [value for pair in pairs for value in pair]

    expected = derivatives(block(x))
    for actual, value in zip(derivatives(run(block, x, plan)), expected,
                             strict=True):
        assert actual.shape == value.shape
        assert (actual - value).abs().max() <= 1e-10 * max(
            1, value.abs().max())


@pytest.mark.parametrize('plan', PLANS)
def test_a_jacobian_in_one_backward(node, plan):
    block, x, _ = make_block(*LAYERS['plain'], batch=1)
    actual, expected = (
        torch.autograd.functional.jacobian(
            lambda x, function=function: function(block, x).sum(1), x,
            vectorize=True) for function in (planned(plan), stock))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('plan', PLANS)
@pytest.mark.parametrize('layer', [
    nn.ConvTranspose1d(2, 4, 3, dilation=2, output_padding=1, groups=2),
    nn.ConvTranspose2d(2, 3, 3, stride=(1, 3), dilation=(3, 1),
                       output_padding=(2, 1)),
    nn.ConvTranspose3d(2, 3, 2, stride=(2, 1, 1), dilation=(1, 3, 2),
                       output_padding=(1, 2, 0)),
    nn.Conv2d(2, 3, 3, stride=3),
])
def test_the_gradient_of_an_input_that_is_not_kept(node, layer, plan, path):
    size = (4, 5, 4)[:layer.weight.dim() - 2]
    block, x, grad = make_block(layer, size)
    expected = results(stock, block, x, grad, PARAMETERS)
    with PATHS[path]():
        actual = results(planned(plan), block, x, grad, PARAMETERS)
    assert_close(actual, expected)
    assert actual['x'].stride() == expected['x'].stride()


@pytest.mark.parametrize('plan', PLANS)
@pytest.mark.parametrize('layer, settings', [
    (nn.Conv2d(3, 4, 3, 2, 1), dict(stride=2)),
    (nn.Conv2d(3, 4, 3, 2, 1), dict(stride=(2, ), padding=[1])),
    (nn.Conv2d(3, 4, 3, 1, 1), dict(stride=1, padding=1, dilation=(1, ))),
    (nn.ConvTranspose2d(3, 4, 3, 2, 0, 1), dict(output_padding=1)),
    (nn.Conv3d(3, 4, 3, 2), dict(stride=2, output_padding=0)),
])
@pytest.mark.parametrize('frozen', [(), PARAMETERS])
def test_one_number_for_all_dimensions(node, frozen, layer, settings, plan):
    """``torch.convolution`` and ``torch.conv2d`` take them."""
    size = (7, 8, 7)[:layer.weight.dim() - 2]
    block, x, grad = make_block(layer, size)
    expected = results(stock, block, x, grad, frozen)
    for name, value in settings.items():
        setattr(block[0], name, value)
    assert_close(results(planned(plan), block, x, grad, frozen), expected)


@pytest.mark.parametrize('settings, message', [
    (dict(stride=(1, 2, 1)), 'stride to be a single integer value or a list'),
    (dict(padding=()), 'padding to be a single integer value or a list'),
    (dict(stride=0), 'non-positive stride'),
    (dict(groups=0), 'non-positive groups'),
    (dict(dilation=0), 'dilation'),
    (dict(padding=-1), 'negative padding'),
])
@pytest.mark.parametrize('transposed', [False, True])
def test_impossible_settings_raise(node, transposed, settings, message):
    block, x, _ = make_block(*LAYERS['transposed' if transposed else 'plain'])
    for name, value in settings.items():
        setattr(block[0], name, value)
    with pytest.raises(RuntimeError, match=message):
        run(block, x)


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('plan', PLANS)
@pytest.mark.parametrize('of_x', [False, True])
@pytest.mark.parametrize('of_weight', [
    'contiguous', 'channels_last', 'transposed'
])
@pytest.mark.parametrize('layer', [
    'plain', 'pointwise', 'groups', 'depthwise', 'depthwise pointwise',
    'one channel', 'transposed', 'transposed groups', 'linear'
])
def test_memory_formats_are_those_of_stock(node, layer, of_weight, of_x, plan,
                                           path):
    block, x, grad = make_block(*LAYERS[layer])
    of_x = of_x and x.dim() == 4
    weight = block[0].weight
    if of_weight == 'transposed':
        weight.data = weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    elif of_weight == 'channels_last':
        weight.data = weight.data.movedim(1, -1).contiguous().movedim(-1, 1)
    if of_x:
        x = x.contiguous(memory_format=torch.channels_last)
        grad = grad.contiguous(memory_format=torch.channels_last)
    expected = results(stock, block, x, grad)
    with PATHS[path]():
        actual = results(planned(plan), block, x, grad)
    assert_close(actual, expected)
    for name in ('output', 'x'):
        # With one channel, its stride says nothing.
        strides = (tensors[name].squeeze(1).stride()
                   for tensors in (actual, expected))
        assert len(set(strides)) == 1, name
    assert actual['0.weight'].stride() == expected['0.weight'].stride()


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('plan', PLANS)
def test_tensors_that_are_not_dense(node, plan, path):
    block, x, grad = make_block(*LAYERS['plain'])
    conv, bn = block
    conv.weight = nn.Parameter(conv.weight.detach().flip(1).transpose(
        2, 3).contiguous().transpose(2, 3))
    bn.weight = nn.Parameter(torch.stack([bn.weight.detach()] * 2, 1)[:, 0])
    bn.running_var = torch.stack([bn.running_var] * 2, 1)[:, 0]
    x = x.transpose(2, 3)
    grad = torch.ones(()).double().expand(block(x).shape)
    expected = results(stock, block, x, grad)
    with PATHS[path]():
        actual = results(planned(plan), block, x, grad)
    assert_close(actual, expected)


@pytest.mark.parametrize('way', ['once', 'batched', 'to be derived again'])
@pytest.mark.parametrize('frozen', [(), PARAMETERS])
@pytest.mark.parametrize('layer', [
    'plain', 'groups', 'transposed', 'transposed groups', '1d', 'linear'
])
def test_a_scaled_map_in_float16(node, layer, frozen, way):
    """Where the folded weight would be infinite, and no gradient is."""
    block, x, grad = make_block(*LAYERS[layer])
    with torch.no_grad():
        block[0].weight.mul_(2**7)
        block[1].running_mean.mul_(2**-7)
        block[1].running_var.mul_(0).add_(2.**-26)
        if block[0].bias is not None:
            block[0].bias.mul_(2**-7)
    block[1].eps = 0.
    x, grad = x * 2**-14, grad * 2**-10
    settings = {} if way == 'once' else (
        dict(create_graph=True) if way != 'batched' else dict(
            is_grads_batched=True))

    def derivatives(function, block, x, grad):
        x = x.clone().requires_grad_('x' not in frozen)
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name not in frozen)
        output = function(block, x)
        grad = grad.to(output.dtype)
        wanted = [t for t in (x, *block.parameters()) if t.requires_grad]
        return [output, *torch.autograd.grad(
            output, wanted, torch.stack([grad, -grad])
            if way == 'batched' else grad, **settings)]

    exact = derivatives(stock, block, x, grad)
    block[0].float(), block[1].float()
    actual = derivatives(planned(Plan.SCALE), block, x.half(), grad)
    if way == 'once':
        folded = run(block, x.half(), Plan.FOLD)
        assert not folded.isfinite().all()
    for value, e in zip(actual, exact, strict=True):
        # Subnormal numbers, as some of the input are, have few digits.
        assert (value - e).abs().max() <= .02 * e.abs().max()


@pytest.mark.parametrize('layer, size', [
    (nn.Conv2d(3, 4, 3, padding=1), (5, 5)),
    (nn.Conv2d(3, 4, 3, padding=1), (24, 24)),
    (nn.Conv2d(3, 4, 3, padding=1, bias=False), (24, 24)),
    (nn.Linear(7, 5), ()),
])
def test_small_gradients_in_float16_keep_their_digits(node, layer, size):
    """Those of the folded weight would be subnormal, and Eval's are not."""
    block, x, grad = make_block(layer, size)
    x, grad = x.half().double(), grad.sign() * 2**-20
    with torch.no_grad():
        block[1].running_var.fill_(2.**-16)
        # Else the coefficient is not large.
        block[1].weight.clamp_(min=.5)
    exact = results(stock, block, x, grad)
    block.float()

    def error(function, name):
        with torch.autocast('cpu', torch.float16):
            actual = results(function, block, x.half(), grad)
        return (actual[name] - exact[name]).abs().max().item()

    for name in ('x', *dict(block.named_parameters())):
        rounding = 2**-11 * exact[name].abs().max().item()
        limit = max(1.5 * error(stock, name), rounding)
        assert error(run, name) <= limit, name


# --------------------------------------------------------------------------
# What is kept
# --------------------------------------------------------------------------


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('plan', PLANS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('learned, keeps_x', [
    (('0.weight', ), True),
    (('1.weight', ), True),
    (('x', ), False),
    (('x', '0.bias', '1.bias'), False),
])
def test_what_is_kept(node, learned, keeps_x, dtype, plan, path):
    block, x, _ = make_block(nn.Conv2d(16, 8, 3, padding=1), (32, 32))
    x = x.to(dtype).requires_grad_('x' in learned)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name in learned)
    with PATHS[path](), saved_bytes(block) as saved:
        output = run(block, x, plan)
    assert output.requires_grad
    expected = x.nbytes if keeps_x else 0
    assert expected <= saved.total <= expected + 3 * 8 * 8


@pytest.mark.parametrize('plan', PLANS)
def test_hooks_on_saved_tensors_see_each(node, plan):
    block, x, grad = make_block(*LAYERS['plain'])
    expected = results(stock, block, x, grad)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return len(packed) - 1

    with saved_tensors_hooks(pack, lambda i: packed[i]):
        actual = results(planned(plan), block, x, grad)
    assert_close(actual, expected)
    assert {x.data_ptr(), block[0].weight.data_ptr()} <= {
        tensor.data_ptr() for tensor in packed}


@pytest.mark.parametrize('plan', PLANS)
@pytest.mark.parametrize('use_reentrant', [False, True])
def test_an_activation_checkpoint(node, use_reentrant, plan):
    """The one stops the second forward by an exception of a hook's."""
    block, x, grad = make_block(*LAYERS['plain'])

    def checkpointed(block, x):
        return checkpoint(planned(plan), block, x, use_reentrant=use_reentrant)

    expected = results(stock, block, x, grad)['output']
    output = checkpointed(block, x.requires_grad_())
    assert_close({'output': output.detach()}, {'output': expected})
    output.backward(grad)
    actual = {'x': x.grad, **{name: parameter.grad
                              for name, parameter in block.named_parameters()}}
    expected = results(stock, block, x, grad)
    del expected['output']
    assert_close(actual, expected)


@pytest.mark.parametrize('plan', PLANS)
def test_the_same_with_more_threads(node, plan):
    """A sum belongs to one thread, however many there are."""
    block, x, grad = make_block(
        nn.Conv2d(96, 256, 1), (8, 8), dtype=torch.float32)
    threads = torch.get_num_threads()
    grads = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            grads.append(results(planned(plan), block, x, grad))
    finally:
        torch.set_num_threads(threads)
    for other in grads[1:]:
        # Other gradients depend on kernels that may not be so.
        assert torch.equal(other['1.bias'], grads[0]['1.bias'])
    assert_close(grads[1], grads[3], tolerance=0)


@pytest.mark.parametrize('plan', PLANS)
@pytest.mark.parametrize('name', ['x', '0.weight', '0.bias', '1.weight'])
def test_a_change_in_place_before_backward_raises(node, name, plan):
    block, x, _ = make_block(*LAYERS['plain'])
    output = run(block, x, plan)
    with torch.no_grad():
        {'x': x, **block.state_dict(keep_vars=True)}[name].mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace'):
        output.sum().backward()


@pytest.mark.parametrize('plan', PLANS)
def test_backward_goes_by_the_statistics_of_the_forward(node, plan):
    block, x, grad = make_block(*LAYERS['plain'])
    expected = results(stock, block, x, grad)['0.weight']
    output = run(block, x, plan)
    block[1].running_var.data.mul_(4)
    block[1].running_mean.add_(1)
    output.backward(grad)
    torch.testing.assert_close(block[0].weight.grad, expected)
    with pytest.raises(RuntimeError, match='second time'):
        output.backward(grad)


@pytest.mark.parametrize('plan', PLANS)
def test_no_gradient_no_node(node, plan):
    block, x, _ = make_block(*LAYERS['plain'])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = run(block, x, plan)
        assert output.grad_fn is None and not output.requires_grad


@pytest.mark.parametrize('plan', PLANS)
@pytest.mark.parametrize('layer', [
    layer for layer in LAYERS if layer != 'transposed groups'
])
def test_operators_where_no_loop_serves(node, layer, plan):
    block, x, grad = make_block(*LAYERS[layer], dtype=torch.float32)
    with Operators() as operators:
        results(planned(plan), block, x, grad)
    # The gradients of a linear layer are an operator each; with one number a
    # channel, zero is copied for each. There is none to spare: statistics,
    # zero, fold 2, fold anew, sum of dZ, chain 3.
    more = ('linear', 'linear, no bias', 'depthwise pointwise')
    limit = 12 if layer in more and plan == Plan.FOLD else 11
    assert operators.calls.total() <= limit, operators.calls


def test_operators_beside_the_loops(node):
    """A profiler sees what ran; else nothing but the convolution did."""
    block, x, grad = make_block(*LAYERS['plain'], dtype=torch.float32)
    with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results(planned(Plan.FOLD), block, x, grad)
    names = {event.key for event in profile.key_averages()}
    assert {'aten::convolution', 'aten::convolution_backward'} <= names
    assert not names & {'aten::mul', 'aten::sum', 'aten::add', 'aten::copy_'}


# --------------------------------------------------------------------------
# Any block
# --------------------------------------------------------------------------


@st.composite
def blocks(draw):
    dim = draw(st.integers(0, 3))
    channels = st.integers(1, 4)
    if dim == 0:
        layer = nn.Linear(draw(st.integers(1, 40)), draw(st.integers(1, 40)),
                          draw(st.booleans()))
    else:
        transposed = draw(st.booleans())
        kinds = ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
                 if transposed else (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        groups = draw(st.integers(1, 3))
        stride = draw(st.integers(1, 3))
        settings = dict(
            kernel_size=draw(st.integers(1, 3)),
            stride=stride,
            padding=draw(st.integers(0, 1)),
            dilation=draw(st.integers(1, 2)),
            groups=groups,
            bias=draw(st.booleans()))
        if transposed:
            settings['output_padding'] = draw(st.integers(0, stride - 1))
        layer = kinds[dim - 1](groups * draw(channels),
                               groups * draw(channels), **settings)
    size = tuple(draw(st.integers(5, 7)) for _ in range(dim))
    return make_block(layer, size, draw(st.integers(1, 3)),
                      draw(st.booleans()), draw(st.sampled_from([1e-5, 1.])),
                      draw(st.integers(0, 99)))


def check_any_block(case, plan, path, channels_last, frozen):
    block, x, grad = case
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        block.to(memory_format=torch.channels_last)
    names = {'x', *(name for name, _ in block.named_parameters())}
    frozen = set() if names <= frozen else frozen
    expected = results(stock, block, x, grad, frozen)
    with PATHS[path]():
        actual = results(planned(plan), block, x, grad, frozen)
    assert_close(actual, expected)


ANY = dict(
    case=blocks(),
    plan=st.sampled_from(Plan),
    path=st.sampled_from(list(PATHS)),
    channels_last=st.booleans(),
    frozen=st.sets(st.sampled_from(['x', *PARAMETERS])))


@settings(max_examples=40, deadline=None)
@given(**ANY)
def test_any_block_equals_stock(node, **case):
    check_any_block(**case)


@pytest.mark.slow
@pytest.mark.exhaustive
@settings(max_examples=10_000, deadline=None)
@given(**ANY)
def test_10000_blocks_equal_stock(node, **case):
    check_any_block(**case)


# --------------------------------------------------------------------------
# Where it does not run
# --------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def dual_level(block, x):
    with forward_ad.dual_level():
        return run(block, x)


def traced(block, x):
    return torch.jit.trace(lambda x: run(block, x), x, check_trace=False)(x)


def compiled(block, x):
    return torch.compile(run, backend='eager', fullgraph=True)(block, x)


def in_subclass(block, x):
    output = run(block, x.as_subclass(Subclass))
    assert type(output) is Subclass
    return output.as_subclass(torch.Tensor)


@pytest.mark.parametrize('function', [
    dual_level, traced, compiled, in_subclass
])
def test_python_serves_what_follows_operators(function, monkeypatch):
    monkeypatch.setattr(native, 'node', lambda: pytest.fail('was asked'))
    block, x, _ = make_block(*LAYERS['plain'])
    block.requires_grad_(False)
    torch.testing.assert_close(function(block, x), block(x))


@pytest.mark.parametrize('spoil', [
    lambda block: setattr(block[1], 'running_var', torch.ones(3).double()),
    lambda block: setattr(block[1], 'weight', nn.Parameter(torch.ones(5))),
    lambda block: setattr(block[0], 'bias', nn.Parameter(torch.ones(4, 1))),
])
def test_a_vector_of_another_length_raises(node, spoil):
    block, x, _ = make_block(*LAYERS['plain'])
    spoil(block)
    with pytest.raises(ValueError, match='4 output channels'):
        run(block, x)


# --------------------------------------------------------------------------
# The build
# --------------------------------------------------------------------------

# Builds in a second, and needs no header of torch's.
SMALL_SOURCE = textwrap.dedent("""
    #include <Python.h>
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, "mmtune_fold", nullptr, -1, nullptr};
    PyMODINIT_FUNC PyInit_mmtune_fold() { return PyModule_Create(&module); }
    """)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """As in a new process with an empty cache and a small source."""
    if not native._compiler():
        pytest.skip('needs a compiler')
    source = tmp_path / 'small.cpp'
    source.write_text(SMALL_SOURCE)
    monkeypatch.setattr(native, 'SOURCE', source)
    monkeypatch.setattr(native, '_outcome', None)
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path / 'cache'))
    monkeypatch.delenv('MMTUNE_NATIVE', raising=False)
    return tmp_path


def as_in_a_new_process(monkeypatch):
    monkeypatch.setattr(native, '_outcome', None)


def assert_absent(monkeypatch, reason):
    """One warning, then silence; an error where it is asked for."""
    as_in_a_new_process(monkeypatch)
    with pytest.warns(UserWarning, match=reason) as caught:
        assert native.node() is None
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert native.node() is None
        block, x, grad = make_block(*LAYERS['plain'])
        assert_close(results(run, block, x, grad),
                     results(stock, block, x, grad))
    monkeypatch.setenv('MMTUNE_NATIVE', '1')
    as_in_a_new_process(monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=reason):
            native.node()


def compiler(path, script):
    path.write_text('#!/bin/sh\n' + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_builds_once_and_says_so(fresh, capfd, monkeypatch):
    first = native.node()
    said = capfd.readouterr().err
    assert 'building' in said and first.__file__ in said
    assert native.node() is first
    as_in_a_new_process(monkeypatch)
    assert native.node().__file__ == first.__file__
    assert capfd.readouterr().err == ''


def test_another_source_or_compiler_is_another_build(fresh, monkeypatch):
    first = native.built_file()
    monkeypatch.setenv('CXX', compiler(
        fresh / 'mine', f'exec {native._compiler()[0]} "$@"\n'))
    second = native.built_file()
    native.SOURCE.write_text(SMALL_SOURCE + '// changed\n')
    third = native.built_file()
    assert len({path.parent for path in (first, second, third)}) == 3
    assert first.exists()


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.setenv('PATH', str(fresh))
    monkeypatch.delenv('CXX', raising=False)
    assert_absent(monkeypatch, r'no C\+\+ compiler.*install')


def test_no_compiler_any_more(fresh, monkeypatch):
    built = native.built_file()
    monkeypatch.setenv('PATH', str(fresh))
    monkeypatch.delenv('CXX', raising=False)
    assert native.node().__file__ == str(built)


def test_a_compiler_that_fails(fresh, monkeypatch):
    monkeypatch.setenv('CXX', compiler(
        fresh / 'bad', 'echo "fold.cpp:1: fatal error: Python.h" >&2\n'
        'exit 1\n'))
    assert_absent(monkeypatch, r'cannot build.*fatal error: Python\.h')


def test_a_compiler_that_does_not_run(fresh, monkeypatch):
    broken = fresh / 'broken'
    broken.write_bytes(b'\x7fELF')
    broken.chmod(0o755)
    monkeypatch.setenv('CXX', str(broken))
    assert_absent(monkeypatch, 'does not run')


def test_what_is_built_does_not_load(fresh, monkeypatch):
    monkeypatch.setenv('CXX', compiler(
        fresh / 'odd', '[ "$1" = --version ] && exit\n'
        'for last; do :; done; echo nothing > "$last"\n'))
    assert_absent(monkeypatch, 'does not load')


def test_a_folder_that_cannot_be_written(fresh, monkeypatch):
    # A file in its place: root may write anywhere.
    (fresh / 'cache').write_text('')
    assert_absent(monkeypatch, 'cannot be kept.*TORCH_EXTENSIONS_DIR')


def test_a_build_in_a_folder_that_allows_no_lock(fresh, monkeypatch):
    built = native.built_file()
    (built.parent / 'lock').unlink()
    (built.parent / 'lock').mkdir()
    assert native.node().__file__ == str(built)


@pytest.mark.parametrize('damage', [
    lambda data: data[:len(data) // 2], lambda data: b'',
    lambda data: data[:-1] + bytes([data[-1] ^ 1])
])
def test_a_damaged_build_is_built_again(fresh, damage, capfd):
    built = native.built_file()
    data = built.read_bytes()
    # Not in place: a library that is loaded must stay as it is.
    built.unlink()
    built.write_bytes(damage(data))
    capfd.readouterr()
    assert native.node() is not None
    assert capfd.readouterr().err.count('building') == 1
    assert [path.name for path in built.parent.glob('*.so')] == [built.name]


def test_a_build_for_another_torch_is_built_again(fresh, capfd):
    built = native.built_file()
    stale = b'no library, though whole'
    built.unlink()
    built.with_name(
        f'{native.NAME}-{native._digest(stale)}.so').write_bytes(stale)
    capfd.readouterr()
    assert native.node() is not None
    assert capfd.readouterr().err.count('building') == 1
    assert [path.name for path in built.parent.glob('*.so')] == [built.name]


PROCESS = textwrap.dedent("""
    import sys
    from pathlib import Path
    from mmtune import native
    native.SOURCE = Path(sys.argv[1])
    print(native.built_file())
    """)


def start_process(source):
    return subprocess.Popen(
        [sys.executable, '-c', PROCESS, str(source)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_build_once(fresh, monkeypatch):
    monkeypatch.setenv('CXX', compiler(
        fresh / 'slow', '[ "$1" = --version ] || sleep 1\n'
        f'exec {native._compiler()[0]} "$@"\n'))
    processes = [start_process(native.SOURCE) for _ in range(2)]
    outputs, errors = zip(*(p.communicate(timeout=60) for p in processes))
    assert [p.returncode for p in processes] == [0, 0], errors
    assert outputs[0] == outputs[1]
    assert ''.join(errors).count('building') == 1


def test_a_killed_build_leaves_no_lock(fresh, monkeypatch):
    good = os.environ.get('CXX', '')
    started = fresh / 'started'
    slow = compiler(
        fresh / 'slow', f'[ "$1" = --version ] && exit\ntouch {started}\n'
        'exec sleep 600\n')
    monkeypatch.setenv('CXX', slow)
    process = start_process(native.SOURCE)
    end = time.monotonic() + 60
    while not started.exists() and time.monotonic() < end:
        time.sleep(.05)
    assert started.exists()
    process.kill()
    process.communicate()
    compiler(fresh / 'slow', '[ "$1" = --version ] && exit\n'
             f'exec {good or "c++"} "$@"\n')
    start = time.monotonic()
    assert native.node() is not None
    assert time.monotonic() - start < 30


def test_it_can_be_turned_off(fresh, monkeypatch):
    monkeypatch.setenv('MMTUNE_NATIVE', '0')
    monkeypatch.setenv('PATH', str(fresh))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert native.node() is None


def test_an_unknown_setting_raises(fresh, monkeypatch):
    monkeypatch.setenv('MMTUNE_NATIVE', 'yes')
    with pytest.raises(ValueError, match="is 'yes'; unset it"):
        native.node()


def test_import_builds_nothing(fresh):
    subprocess.run([sys.executable, '-c', 'import mmtune'], cwd=ROOT,
                   check=True)
    assert not (fresh / 'cache').exists()


def test_the_command_says_where_it_lies(node):
    result = subprocess.run([sys.executable, '-m', 'mmtune.native'], cwd=ROOT,
                            check=True, capture_output=True, text=True)
    assert Path(result.stdout.strip()).samefile(node.__file__)
    assert result.stderr == ''
