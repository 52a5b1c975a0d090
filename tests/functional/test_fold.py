import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from mmtune import native
from mmtune.analysis import saved_bytes
from mmtune.functional.fold import fold, fold_and_run_norm, norm_coefficients
from mmtune.functional.geometry import Convolution

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def make_case(dim=2,
              batch=2,
              groups=1,
              in_channels=2,
              out_channels=3,
              size=5,
              kernel=3,
              stride=1,
              padding=1,
              dilation=1,
              bias=True,
              affine=True,
              eps=1e-5,
              dtype=torch.float64,
              seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    channels = out_channels * groups
    tensors = dict(
        x=randn(batch, in_channels * groups, *[size] * dim),
        weight=randn(channels, in_channels, *[kernel] * dim),
        bias=randn(channels) if bias else None,
        bn_weight=randn(channels) if affine else None,
        bn_bias=randn(channels) if affine else None)
    statistics = dict(
        running_mean=randn(channels), running_var=randn(channels)**2)
    geometry = Convolution((stride, ) * dim, (padding, ) * dim,
                           (dilation, ) * dim, False, (0, ) * dim, groups)
    return tensors, statistics, geometry, eps


def stock(tensors, statistics, geometry, eps):
    dim = len(geometry.stride)
    y = CONVS[dim](tensors['x'], tensors['weight'], tensors['bias'],
                   geometry.stride, geometry.padding, geometry.dilation,
                   geometry.groups)
    return F.batch_norm(
        y,
        statistics['running_mean'],
        statistics['running_var'],
        tensors['bn_weight'],
        tensors['bn_bias'],
        eps=eps)


def tuned(tensors, statistics, geometry, eps):
    weight = tensors['weight']
    coeff_shape = (weight.size(0), ) + (1, ) * (weight.dim() - 1)
    return fold_and_run_norm(geometry, *tensors.values(),
                             *statistics.values(), eps, coeff_shape)


def gradients(function, case):
    tensors, *rest = case
    tensors = {
        name: None if t is None else t.clone().requires_grad_()
        for name, t in tensors.items()
    }
    output = function(tensors, *rest)
    learned = [t for t in tensors.values() if t is not None]
    probe = torch.linspace(
        -1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad((output * probe).sum(), learned)]


CASES = {
    'plain': {},
    '1d': dict(dim=1),
    '3d': dict(dim=3, size=4),
    'no bias': dict(bias=False),
    'not affine': dict(affine=False),
    'neither': dict(bias=False, affine=False),
    'pointwise': dict(kernel=1, padding=0),
    'depthwise': dict(groups=4, in_channels=1, out_channels=1),
    'groups': dict(groups=2),
    'stride that leaves a border': dict(stride=2, size=6, padding=0),
    'large stride': dict(stride=3, size=7),
    'dilation': dict(dilation=2, padding=2, size=6),
    'dilation and stride': dict(dilation=2, stride=2, size=8),
    'one pixel': dict(size=1),
    'one channel': dict(in_channels=1, out_channels=1),
    'empty batch': dict(batch=0),
    'large eps': dict(eps=1.),
    'tiny eps': dict(eps=1e-12),
}


@pytest.mark.parametrize('settings', CASES.values(), ids=CASES)
def test_output_and_gradients_equal_stock(settings):
    case = make_case(**settings)
    for expected, actual in zip(
            gradients(stock, case), gradients(tuned, case)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(1, 3),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    in_channels=st.integers(1, 3),
    out_channels=st.integers(1, 3),
    size=st.integers(5, 8),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from([1e-12, 1e-5, 1e-3, 1.]),
    seed=st.integers(0, 5))
def test_any_geometry_equals_stock(**settings):
    case = make_case(**settings)
    for expected, actual in zip(
            gradients(stock, case), gradients(tuned, case)):
        scale = expected.abs().max().item() if expected.numel() else 1
        torch.testing.assert_close(
            actual, expected, rtol=1e-10, atol=1e-10 * max(scale, 1))


@pytest.mark.parametrize('frozen', [
    ('weight', ),
    ('bn_weight', 'bn_bias'),
    ('weight', 'bias'),
    ('weight', 'bias', 'bn_weight'),
    ('weight', 'bias', 'bn_weight', 'bn_bias'),
    ('x', ),
    ('x', 'weight', 'bn_weight'),
])
@pytest.mark.parametrize('geometry', [
    dict(),
    dict(stride=2, size=6),
    dict(stride=3, dilation=2, size=9),
    dict(groups=2),
    dict(dim=1, stride=2),
])
def test_frozen_tensors(frozen, geometry):
    tensors, *rest = make_case(**geometry)
    results = []
    for function in (stock, tuned):
        leaves = {
            name: t.clone().requires_grad_(name not in frozen)
            for name, t in tensors.items()
        }
        output = function(leaves, *rest)
        (output**2).sum().backward()
        results.append({name: t.grad for name, t in leaves.items()})
    for name in tensors:
        expected, actual = (result[name] for result in results)
        assert (actual is None) == (expected is None) == (name in frozen)
        if expected is not None:
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('settings', [
    dict(size=3),
    dict(dim=1, bias=False),
    dict(groups=2, in_channels=1, out_channels=1, size=3),
    dict(stride=2, size=4, affine=False),
])
def test_first_and_second_derivative(settings):
    tensors, *rest = make_case(**settings)
    names = [name for name, t in tensors.items() if t is not None]

    def function(*values):
        return tuned({**tensors, **dict(zip(names, values))}, *rest)

    leaves = [tensors[name].requires_grad_() for name in names]
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize('settings', [
    dict(),
    dict(stride=2, size=6),
    dict(groups=2, dilation=2, padding=2),
])
def test_second_derivative_of_the_input_alone(settings):
    tensors, *rest = make_case(**settings)

    def function(x):
        return tuned({**tensors, 'x': x}, *rest)

    x = tensors['x'].requires_grad_()
    assert gradcheck(function, x)
    assert gradgradcheck(function, x)


@pytest.mark.parametrize('of', [lambda number: number, lambda number: [number],
                                lambda number: (number, )])
@pytest.mark.parametrize('learns', [True, False])
@pytest.mark.parametrize('in_python', [True, False])
def test_one_number_for_all_dimensions(in_python, learns, of, monkeypatch):
    """``F.conv2d`` takes them, and so may a module's attribute."""
    if in_python:
        monkeypatch.setattr(native, 'node', lambda: None)
    tensors, statistics, geometry, eps = make_case(
        stride=2, size=6, padding=1, dilation=1)
    short = Convolution(of(2), of(1), of(1), False, of(0), 1)
    results = []
    for form in (geometry, short):
        leaves = {
            name: t.clone().requires_grad_(learns or name == 'x')
            for name, t in tensors.items()
        }
        output = tuned(leaves, statistics, form, eps)
        output.square().sum().backward()
        with torch.no_grad():
            outputs = [output, tuned(tensors, statistics, form, eps)]
        results.append([*outputs, *(t.grad for t in leaves.values())])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert torch.equal(actual, expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_fold_of_half_precision_runs_in_float32(dtype):
    tensors, statistics, *_ = make_case(dtype=dtype)
    coefficients = norm_coefficients(statistics['running_mean'],
                                     statistics['running_var'], 1e-5)
    shape = (-1, 1, 1, 1)
    del tensors['x']
    weight, bias = fold(*tensors.values(), *coefficients, shape)
    assert weight.dtype == bias.dtype == torch.float32
    exact = fold(*(t.double() for t in tensors.values()),
                 *(c.double() for c in coefficients), shape)
    torch.testing.assert_close(weight.double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bias.double(), exact[1], rtol=1e-6, atol=1e-6)


def test_gradients_have_the_dtype_of_their_tensors():
    tensors, *rest = make_case(dtype=torch.float32)
    tensors['x'] = tensors['x'].bfloat16()
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    output = tuned(leaves, *rest)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    for name, t in leaves.items():
        assert t.grad.dtype == t.dtype, name


@pytest.mark.parametrize('learned, keeps_x', [
    (('weight', ), True),
    (('bn_weight', ), True),
    (('x', ), False),
    (('bn_bias', ), False),
    (('bias', ), False),
])
def test_input_is_kept_only_where_a_gradient_depends_on_it(learned, keeps_x):
    tensors, *rest = make_case(size=32, in_channels=16)
    for name in learned:
        tensors[name].requires_grad_()
    holder = torch.nn.ParameterList(
        torch.nn.Parameter(t, t.requires_grad)
        for name, t in tensors.items() if name != 'x')
    tensors.update(zip([name for name in tensors if name != 'x'], holder))
    with saved_bytes(holder) as saved:
        output = tuned(tensors, *rest)
    vectors = 4 * tensors['bias'].numel() * 8
    x = tensors['x'].numel() * 8 if keeps_x else 0
    assert output.requires_grad
    assert x <= saved.total <= x + vectors
