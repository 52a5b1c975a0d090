"""Activations that keep one map, against stock, in float64."""
import copy
import gc
import importlib
import importlib.util
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmtune import turn_off, turn_on
from mmtune.analysis import peak_bytes, saved_bytes
from mmtune.behaviours.activation import activation_runs
from mmtune.behaviours.remade import spared
from mmtune.layers.activations import (
    ACTIVATION_KINDS,
    ActivationKind,
    activation_kind,
)
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy

pytestmark = pytest.mark.one_map
HAS_MMCV = importlib.util.find_spec('mmcv') is not None
NEEDS_ARGUMENTS = {'mmcv.cnn.bricks.activation.Clamp': (-.5, .5)}


def activation_type(name):
    module, _, cls = name.rpartition('.')
    return getattr(importlib.import_module(module), cls)


def build_activations():
    """Each kind, and in place where the class can."""
    built = {}
    for name in ACTIVATION_KINDS:
        if name.startswith('mmcv.') and not HAS_MMCV:
            continue
        cls = activation_type(name)
        arguments = NEEDS_ARGUMENTS.get(name, ())
        built[cls.__name__] = lambda cls=cls, a=arguments: cls(*a)
        # These keep one map already.
        if cls in (nn.CELU, nn.ELU, nn.LeakyReLU, nn.SELU):
            continue
        if 'inplace' in cls.__init__.__code__.co_varnames:
            built[f'{cls.__name__} in place'] = (
                lambda cls=cls, a=arguments: cls(*a, inplace=True))
    built['ReLU6'] = nn.ReLU6
    built['ReLU6 in place'] = lambda: nn.ReLU6(inplace=True)
    built['Hardtanh, other borders'] = lambda: nn.Hardtanh(-.3, 1.2)
    built['GELU tanh'] = lambda: nn.GELU('tanh')
    built['Softplus, other settings'] = lambda: nn.Softplus(2, .5)
    built['ELU, other settings'] = lambda: nn.ELU(.5)
    return built


ACTIVATIONS = build_activations()
FEW = {
    name: ACTIVATIONS[name]
    for name in ('SiLU', 'SiLU in place', 'ReLU6', 'ReLU6 in place', 'Swish',
                 'Hardswish in place', 'GELU') if name in ACTIVATIONS
}


def chain(act, train=False, dtype=torch.float64):
    """Two blocks, then a linear layer; their BatchNorms in either mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), act(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), act(),
        nn.Flatten(2), nn.Linear(36, 5))
    return randomize(model).to(dtype).train(train)


def image(dtype=torch.float64):
    return torch.randn(
        2, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def kept(model, x=None):
    x = image() if x is None else x
    with saved_bytes(model) as saved:
        output = model(x)
        total = saved.total
    del output
    return total


def check(model, call=None, x=None, **options):
    """Turn a model on, and compare a step of it with stock's."""
    stock = stock_copy(model)
    report = turn_on(model, **options)
    before = torch.get_rng_state()
    expected = step(stock, image() if x is None else x, call)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    actual = step(model, image() if x is None else x, call)
    assert torch.equal(torch.get_rng_state(), after)
    assert_equal_steps(expected, actual)
    return report


# --------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('act', ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_kind_equals_stock_and_keeps_one_map(act, train):
    model = chain(act, train)
    stock = stock_copy(model)
    blocks = stock_copy(model)
    turn_on(blocks, activations=False)
    report = check(model)
    assert report.activations == ['2', '5']
    assert set(activation_runs(model).values()) == {'one map'}
    a_map = 2 * 8 * 36 * 8
    # A clamp keeps a bit of the 64 of an element.
    assert kept(blocks) - kept(model) >= 2 * (a_map - a_map // 64)
    assert kept(stock) - kept(model) >= 2 * (a_map - a_map // 64)


@pytest.mark.parametrize('x', [
    torch.tensor([-1., 0, 1, 6, 7, float('nan'), float('inf'),
                  -float('inf')]),
    torch.empty(0)
], ids=['borders', 'empty'])
@pytest.mark.parametrize('act', ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_values_at_borders(act, x):
    stock = nn.Sequential(nn.Identity(), act())
    model = stock_copy(stock)
    turn_on(model)
    results = []
    for each in (stock, model):
        leaf = x.double().requires_grad_()
        output = each(leaf * 1)
        output.sum().backward()
        if isinstance(each[1], nn.Hardtanh):
            # Stock's own loops differ there.
            leaf.grad[x.isnan()] = 0
        results.append((output.detach(), leaf.grad))
    for expected, actual in zip(*results):
        torch.testing.assert_close(
            actual, expected, rtol=1e-12, atol=0, equal_nan=True)


class Shifted(nn.SiLU):
    """A forward of its own."""

    def forward(self, x):
        return super().forward(x - 1)


class Renamed(nn.SiLU):
    """Runs its parent's code."""


class Mine(nn.Module):
    """What somebody adds to the table."""

    def forward(self, x):
        return x * torch.tanh(x)


@pytest.mark.parametrize('act, is_known', [
    (nn.SiLU(), True), (nn.ReLU6(), True), (Renamed(), True),
    (Shifted(), False), (Mine(), False), (nn.ReLU(), False),
    (nn.LeakyReLU(), True), (nn.LeakyReLU(inplace=True), False),
    (nn.Sigmoid(), False), (nn.PReLU(), False), (nn.RReLU(), False),
    (nn.Dropout(), False), (nn.Softmax(1), False), (nn.GLU(), False),
    (nn.Identity(), False)
])
def test_which_are_known(act, is_known):
    assert (activation_kind(act) is not None) == is_known


def test_method_on_the_instance_runs():
    act = nn.SiLU()
    act.forward = lambda x: x * 2
    assert activation_kind(act) is None
    assert check(chain(lambda: act)).activations == []


def test_own_line_in_the_table(monkeypatch):
    monkeypatch.setitem(ACTIVATION_KINDS, f'{__name__}.Mine',
                        ActivationKind())
    model = chain(Mine)
    stock = stock_copy(model)
    assert check(model).activations == ['2', '5']
    # Of each, the tangent, its product's input and the reader's.
    assert kept(stock) - kept(model) >= 4 * 2 * 8 * 36 * 8


@pytest.mark.parametrize('when', ['before', 'after'])
def test_patched_function_runs(monkeypatch, when):
    model = chain(nn.SiLU)
    if when == 'after':
        turn_on(model)

    def silu(x, inplace=False):
        return x * 3

    monkeypatch.setattr(F, 'silu', silu)
    stock = stock_copy(model)
    turn_off(stock)
    if when == 'before':
        turn_on(model)
    assert_equal_steps(step(stock, image()), step(model, image()))
    assert set(activation_runs(model).values()) == {'stock'}


# --------------------------------------------------------------------------
# Who reads the output, and what becomes of it
# --------------------------------------------------------------------------


class Reads(nn.Module):
    """A block, an activation, and what is done with its output."""

    def __init__(self, act, then):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.act = act()
        self.fused = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.deconv = nn.ConvTranspose2d(4, 4, 2)
        self.linear = nn.Linear(6, 6)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), act(),
            nn.Conv2d(4, 4, 1), nn.Sigmoid())
        self.norm = nn.BatchNorm2d(4)
        self.then = then
        randomize(self)

    def forward(self, x):
        return self.then(self, self.act(self.bn(self.conv(x))))


def _changed(model, y):
    z = model.fused(y.clone())
    y += 1
    return y, z


def _changed_by_activation(model, y):
    return F.relu_(y) * 2


def _input_read_too(model, x):
    return x


READERS = {
    'returned': lambda m, y: y,
    'block': lambda m, y: m.fused(y),
    'convolution': lambda m, y: m.squeeze[1](y),
    'transposed': lambda m, y: m.deconv(y),
    'linear layer': lambda m, y: m.linear(y),
    'BatchNorm': lambda m, y: m.norm(y),
    'read twice': lambda m, y: m.fused(y) + m.deconv(y)[..., :-1, :-1],
    'read and returned': lambda m, y: (y, m.fused(y)),
    'squeezed and excited': lambda m, y: y * m.squeeze(y),
    'residual': lambda m, y: y + m.fused(y),
    'squared': lambda m, y: y * y,
    'matrix product': lambda m, y: y @ y.transpose(-1, -2),
    'concatenated': lambda m, y: m.linear(torch.cat([y, m.fused(y)])),
    'slice': lambda m, y: m.fused(y[:, :, 1:4]) * 2,
    'slices multiplied': lambda m, y: y[:, :2] * y[:, 2:],
    'chunks': lambda m, y: torch.mul(*y.chunk(2, 1)),
    'view': lambda m, y: y.view(2, 4, 36) ** 2,
    'transposed view': lambda m, y: y.permute(0, 2, 3, 1) ** 2,
    'expanded view': lambda m, y: y[None].expand(3, -1, -1, -1, -1) ** 2,
    'view of a view': lambda m, y: y.flatten(2)[:, 1:, 3:9] ** 2,
    'strided': lambda m, y: m.fused(y[..., ::2, ::2]),
    'channels_last': lambda m, y: m.fused(
        y.contiguous(memory_format=torch.channels_last)),
    'detached': lambda m, y: m.fused(y) * y.detach(),
    'detached alone': lambda m, y: m.fused(y.detach()),
    'max pooled': lambda m, y: F.max_pool2d(y, 2) * 1,
    'upsampled': lambda m, y: m.fused(F.interpolate(y, scale_factor=2)),
    'changed in place later': _changed,
    'changed in place by an activation': _changed_by_activation,
    'dropped': lambda m, y: m.linear(F.dropout(y, .5)),
    'dropped in place': lambda m, y: F.dropout(y, .5, inplace=True) * 1,
    'activated again': lambda m, y: m.fused(m.act(y * 1)),
    'part of it filled': lambda m, y: (y.clone().index_fill_(
        1, torch.tensor([1]), 0.)) ** 2,
    'in float32': lambda m, y: m.linear(y.float().double()),
    'norm of it': lambda m, y: y.norm(dim=1, keepdim=True) * y,
    'softmax': lambda m, y: y.softmax(1) * y,
    'sum': lambda m, y: y.sum()[None],
    'exp': lambda m, y: y.exp() * y,
}


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('then', READERS.values(), ids=READERS)
@pytest.mark.parametrize('act', FEW.values(), ids=FEW)
def test_reader(act, then, train):
    model = Reads(act, then).double().train(train)
    stock = stock_copy(model)
    check(model)
    assert activation_runs(model)['act'] == 'one map'
    assert kept(model) <= kept(stock)


class Bad(nn.Module):
    """Something that autograd refuses in stock, after the activation."""

    def __init__(self, act, then):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = act()
        self.next = nn.Conv2d(4, 4, 1)
        self.then = then

    def forward(self, x):
        return self.then(self, self.conv(x))


def _output_changed(m, x):
    y = m.act(x)
    z = m.next(y)
    y.mul_(2)
    return z


def _view_changed(m, x):
    y = m.act(x)
    z = m.next(y[:, :, 1:])
    y[:, :, :2].mul_(2)
    return z


def _input_changed(m, x):
    y = m.act(x)
    x.add_(1)
    return m.next(y)


def _weight_changed(m, x):
    z = m.next(m.act(x))
    with torch.no_grad():
        m.next.weight.mul_(2)
    return z


CHANGES = {
    'output': _output_changed,
    'view of it': _view_changed,
    'input': _input_changed,
    'weight': _weight_changed
}


@pytest.mark.parametrize('then', CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize('act', FEW.values(), ids=FEW)
def test_forbidden_changes_raise_or_equal_stock(act, then):
    model = Bad(act, then).double()
    stock = stock_copy(model)
    turn_on(model)
    # A clamp has no use of its input, whose change stock forbids.
    is_freed = isinstance(model.act, nn.ReLU6) and then is _input_changed
    if is_freed and not model.act.inplace:
        stock.then = lambda m, x: m.next(m.act(x))
    try:
        expected = step(stock, image())
    except RuntimeError:
        with pytest.raises(RuntimeError, match='modified by an inplace'):
            step(model, image())
    else:
        assert_equal_steps(expected, step(model, image()))


@pytest.mark.parametrize('act', FEW.values(), ids=FEW)
def test_in_place_is_seen_by_who_holds_the_input(act):

    class Holds(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.act = act()

        def forward(self, x):
            y = self.conv(x)
            z = self.act(y)
            return y * 1, z, torch.tensor(float(y is z))

    check(Holds().double())


# --------------------------------------------------------------------------
# Ways to run
# --------------------------------------------------------------------------


def _hooked(model, x):
    handles = [
        model[2].register_forward_pre_hook(lambda m, args: (args[0] * 2, )),
        model[2].register_forward_hook(lambda m, args, y: y + 1),
        model[5].register_full_backward_hook(
            lambda m, into, out: (into[0] * 3, )),
        model[5].register_full_backward_pre_hook(
            lambda m, out: (out[0] * 2, )),
    ]
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()


def _autocast(model, x):
    with torch.autocast('cpu', torch.bfloat16):
        return model(x)


def _autocast_off_inside(model, x):
    with torch.autocast('cpu', torch.bfloat16):
        x = model[:3](x)
    return model[3:](x.double())


def _under_hooks(model, x):
    with torch.autograd.graph.save_on_cpu():
        return model(x)


def _hooks_inside(model, x):
    x = model[:2](x)
    with torch.autograd.graph.save_on_cpu():
        x = model[2:5](x)
    return model[5:](x)


def _double(model, x):
    grad, = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    return grad


def _penalty(model, x):
    y = model(x)
    grad, = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y, grad.pow(2)


def _twice(model, x):
    y = model(x)
    y.sum().backward(retain_graph=True)
    return y


def _turned_off_in_between(model, x):
    y = model(x)
    if activation_runs(model):
        turn_off(model)
    return y


def _no_grad_before(model, x):
    with torch.no_grad():
        model(x)
    return model(x)


def _parts(model, x):
    for module in model:
        x = module(x)
    return x


def _in_thread(model, x):
    found = []
    thread = threading.Thread(target=lambda: found.append(model(x)))
    thread.start()
    thread.join()
    return found[0]


def _after_an_error(model, x):
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    return model(x)


def _interrupted(model, x):

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model[4].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    return model(x)


def _copied(model, x):
    return copy.deepcopy(model)(x) * 0 + model(x)


def _weights_frozen(model, x):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model(x)


def _first_layers_frozen(model, x):
    for parameter in model[:4].parameters():
        parameter.requires_grad_(False)
    return model(x.detach())


def _switched(model, x):
    y = model.train()(x)
    return y + model.eval()(x)


def _vmap(model, x):
    return torch.func.vmap(lambda a: model.eval()(a[None])[0])(x)


def _func_grad(model, x):
    return torch.func.grad(lambda a: model(a).pow(2).sum())(x)


def _forward_mode(model, x):
    return torch.func.jvp(model, (x, ), (torch.ones_like(x), ))


def _graph_outlives(model, x):
    y = copy.deepcopy(model)(x)
    gc.collect()
    return y


def _inference_first(model, x):
    with torch.inference_mode():
        model(x.detach())
    return model(x)


WAYS = {
    'plain': lambda m, x: m(x),
    'hooks': _hooked,
    'save_on_cpu': _under_hooks,
    'save_on_cpu inside': _hooks_inside,
    'reentrant checkpoint': lambda m, x: checkpoint(
        m, x, use_reentrant=True),
    'checkpoint': lambda m, x: checkpoint(m, x, use_reentrant=False),
    'checkpoint of a part': lambda m, x: m[4:](checkpoint(
        m[:4], x, use_reentrant=False)),
    'checkpoint of an activation': lambda m, x: m[3:](checkpoint(
        m[2], m[:2](x), use_reentrant=False)),
    'double backward': _double,
    'gradient penalty': _penalty,
    'backward twice': _twice,
    'turned off in between': _turned_off_in_between,
    'after no_grad': _no_grad_before,
    'after inference': _inference_first,
    'layer by layer': _parts,
    'in a thread': _in_thread,
    'after an error': _after_an_error,
    'after an interrupt': _interrupted,
    'a copy runs too': _copied,
    'graph outlives the model': _graph_outlives,
    'weights frozen': _weights_frozen,
    'first layers frozen': _first_layers_frozen,
    'modes switched': _switched,
    'vmap': _vmap,
    'func.grad': _func_grad,
    'forward mode': _forward_mode,
    'channels_last': lambda m, x: m(
        x.contiguous(memory_format=torch.channels_last)),
    'several inputs': lambda m, x: m(x) * m(x + 1),
}


# By autograd: what a backward hook or a checkpoint is given is a view.
IN_PLACE_REFUSED = (_hooked, WAYS['checkpoint of an activation'])


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
@pytest.mark.parametrize('act', FEW.values(), ids=FEW)
def test_way_to_run(act, way, train):
    if train and way in (_vmap, _func_grad, _forward_mode):
        pytest.skip('stock cannot change buffers in a transform')
    model = chain(act, train)
    in_place = getattr(model[2], 'inplace', False)
    if in_place and way in IN_PLACE_REFUSED:
        turned_on = stock_copy(model)
        turn_on(turned_on)
        for each in (model, turned_on):
            with pytest.raises(RuntimeError, match='inplace|in-place'):
                step(each, image(), way)
    else:
        check(model, way)


@pytest.mark.parametrize('way', [_autocast, _autocast_off_inside])
@pytest.mark.parametrize('act', FEW.values(), ids=FEW)
def test_autocast(act, way):
    model = chain(act, dtype=torch.float32)
    if way is _autocast_off_inside:
        model[3:].double()
    stock = stock_copy(model)
    turn_on(stock, activations=False)
    turn_on(model)
    x = image(torch.float32)
    assert_equal_steps(step(stock, x, way), step(model, x, way), 5e-2)
    sizes = []
    for each in (stock, model):
        with saved_bytes(each) as saved:
            output = way(each, x)
            sizes.append(saved.total)
            del output
    if way is _autocast:
        assert sizes[1] < sizes[0]


# --------------------------------------------------------------------------
# What is kept, and until when
# --------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('readers', [1, 2, 5])
def test_made_once_for_all_readers(readers):

    class Many(nn.Module):

        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 3, 1)
            self.act = nn.SiLU()
            self.convs = nn.ModuleList(
                nn.Conv2d(3, 3, 1) for _ in range(readers))

        def forward(self, x):
            y = self.act(self.first(x))
            return sum(conv(y) for conv in self.convs)

    model = Many().double()
    turn_on(model)
    for _ in range(2):
        output = model(image())
        for _ in range(2):
            with Operators() as operators:
                output.sum().backward(retain_graph=True)
            assert operators.names.count('silu') == 1


def test_two_graphs_of_one_output():
    model = Reads(nn.SiLU, lambda m, y: (m.fused(y), m.deconv(y))).double()
    turn_on(model)
    first, second = model(image())
    first.sum().backward(retain_graph=True)
    second.sum().backward()
    with pytest.raises(RuntimeError, match='second time'):
        second.sum().backward()


@pytest.mark.parametrize('act', FEW.values(), ids=FEW)
def test_nothing_outlives_a_backward(act):
    model = chain(act)
    turn_on(model)

    def alive():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in
                   gc.get_objects())

    for _ in range(2):
        model(image()).sum().backward()
    before = alive()
    output = model(image())
    output.sum().backward(retain_graph=True)
    del output
    assert alive() == before
    model(image())
    assert alive() == before


def test_peak_of_a_step_falls():
    model = nn.Sequential(*[
        nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8),
                      nn.SiLU(inplace=True)) for _ in range(8)
    ]).eval()
    blocks = stock_copy(model)
    turn_on(model)
    turn_on(blocks, activations=False)
    x = torch.randn(1, 8, 64, 64, requires_grad=True)
    peaks = []
    for each in (blocks, model):
        with peak_bytes() as memory:
            each(x).sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] <= .75 * peaks[0]


def test_spared_counts_what_is_kept_less():
    model = chain(nn.SiLU)
    blocks = stock_copy(model)
    turn_on(model)
    turn_on(blocks, activations=False)
    before = spared()
    fewer = kept(blocks) - kept(model)
    assert spared() - before == fewer


# --------------------------------------------------------------------------
# Copies, compilers, tools
# --------------------------------------------------------------------------


@pytest.mark.whole_graph
@pytest.mark.parametrize('act', FEW.values(), ids=FEW)
def test_compiled_whole(act):
    model = chain(act)
    stock = stock_copy(model)
    turn_on(model)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    assert_equal_steps(step(stock, image()),
                       step(model, image(), lambda m, x: compiled(x)))


@pytest.mark.parametrize('act', FEW.values(), ids=FEW)
def test_compiled_in_part(act):
    model = chain(act)
    stock = stock_copy(model)
    turn_on(model)
    # Autograd refuses a compiled graph that changes its input in place.
    parts = [model[3], model[7]]
    if not getattr(model[2], 'inplace', False):
        parts.append(model[2])
    for part in parts:
        part.compile(backend='aot_eager')
    assert_equal_steps(step(stock, image()), step(model, image()))


@pytest.mark.parametrize('act', FEW.values(), ids=FEW)
def test_exported_and_traced(act):
    model = chain(act)
    stock = stock_copy(model)
    turn_on(model)
    x = image()
    exported = torch.export.export(model, (x, )).module()
    traced = torch.jit.trace(model, x)
    for each in (exported, traced):
        torch.testing.assert_close(each(x), stock(x))


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('copied', [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize('act', FEW.values(), ids=FEW)
def test_copies_are_in_the_mode(act, copied):
    model = chain(act)
    stock = stock_copy(model)
    turn_on(model)
    other = copied(model)
    assert_equal_steps(step(stock, image()), step(other, image()))
    assert set(activation_runs(other).values()) == {'one map'}
    assert set(activation_runs(model).values()) == {'not run'}
    assert kept(other) == kept(model)


def test_shallow_copy_uses_its_own_settings():
    model = chain(lambda: nn.Hardtanh(-1, 1))
    turn_on(model)
    other = copy.copy(model[2])
    other.max_val = .5
    x = image().requires_grad_()
    assert float(other(x * 1).max()) == .5
    assert float(model[2](x * 1).max()) == 1


def test_settings_changed_after_the_forward():
    model = chain(nn.Softplus)
    stock = stock_copy(model)

    def change(model, x):
        y = model(x)
        model[2].beta = 7
        return y

    turn_on(model)
    assert_equal_steps(step(stock, image(), change),
                       step(model, image(), change))


def test_turned_off_is_stock():
    model = chain(nn.SiLU)
    before = repr(model), {name: {*vars(module)}
                           for name, module in model.named_modules()}
    size = kept(model)
    turn_on(model)
    assert repr(model) != before[0]
    assert 'SiLU(tune=True)' in repr(model)
    turn_off(model)
    assert before == (repr(model), {name: {*vars(module)} for name, module in
                                    model.named_modules()})
    assert kept(model) == size
    assert activation_runs(model) == {}


def test_keys_types_and_buffers_stay():
    model = chain(nn.SiLU)
    stock = stock_copy(model)
    turn_on(model)
    assert [*model.state_dict()] == [*stock.state_dict()]
    assert [type(m) for m in model.modules()] == [
        type(m) for m in stock.modules()]


@pytest.mark.parametrize('options, found', [
    ({}, 2), (dict(activations=True), 2), (dict(activations=False), 0),
    (dict(mode='Eval'), 0), (dict(mode='Train'), 0), (dict(mode='Deploy'), 0),
    (dict(modules='0'), 0)
])
def test_which_modes_have_them(options, found):
    model = chain(nn.SiLU)
    if options.get('modules'):
        model = nn.Sequential(model, chain(nn.SiLU))
        options = dict(modules='0')
        found = 2
    report = turn_on(model, **options)
    assert len(report.activations) == found
    assert len(activation_runs(model)) == found


@pytest.mark.parametrize('wrong', [None, 1, 'no', 'SiLU'])
def test_wrong_argument(wrong):
    model = chain(nn.SiLU)
    before = repr(model)
    with pytest.raises(ValueError, match='`activations` must be True or'):
        turn_on(model, activations=wrong)
    assert repr(model) == before


def test_without_blocks():
    """Activations alone are worth turning on."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 3, 1))
    report = check(model.double())
    assert report.rows == []
    assert report.activations == ['1']
    assert '1 activation to keep one map' in str(report)


def test_blocks_with_a_fused_neighbour_are_fused():
    bricks = pytest.importorskip('mmcv.cnn')
    model = bricks.ConvModule(3, 4, 3, norm_cfg=dict(type='BN'),
                       act_cfg=dict(type='Swish')).double().eval()
    check(model)
    assert runs(model) == ['fused']
    assert activation_runs(model) == {'activate': 'one map'}


class Activated(nn.BatchNorm2d):
    """Normalizes, and then activates."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            self.training, self.momentum, self.eps))


def test_activation_within_a_normalization():
    model = randomize(nn.Sequential(
        nn.Conv2d(3, 4, 1), Activated(4), nn.Conv2d(4, 3, 1))).double().eval()
    check(model)
    assert runs(model) == ['fused']
    assert activation_runs(model) == {'1.act': 'one map'}


def test_modules_called_by_themselves():
    model = Reads(nn.SiLU, lambda m, y: m.fused(y)).double().eval()
    outer = nn.ModuleDict(dict(inner=model))
    stock = stock_copy(outer)
    turn_on(outer)
    assert_equal_steps(step(stock['inner'], image()),
                       step(outer['inner'], image()))
    assert activation_runs(outer)['inner.act'] == 'one map'


def test_many_threads():
    model = chain(nn.SiLU)
    stock = stock_copy(model)
    turn_on(model)
    found = {}

    def run(i):
        x = (image() + i).requires_grad_()
        model(x).pow(2).sum().backward()
        found[i] = x.grad

    threads = [threading.Thread(target=run, args=(i, )) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        x = (image() + i).requires_grad_()
        stock(x).pow(2).sum().backward()
        torch.testing.assert_close(found[i], x.grad)


def test_ema_and_parallel_wrapper():
    pytest.importorskip('mmengine')
    from mmengine.model import ExponentialMovingAverage
    model = chain(nn.SiLU)
    stock = stock_copy(model)
    turn_on(model)
    average = ExponentialMovingAverage(model)
    average.update_parameters(model)
    torch.testing.assert_close(average(image()), stock(image()))
    wrapped = nn.DataParallel(model)
    assert_equal_steps(step(stock, image()),
                       step(model, image(), lambda m, x: wrapped(x)))
