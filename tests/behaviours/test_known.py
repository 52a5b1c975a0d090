"""A pair that was checked once is not checked again, until anything differs.

Every change here comes after steps in which the pairs became known.
"""
import contextlib
import copy
import pickle
import threading
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from mmtune import native, turn_off, turn_on
from mmtune.behaviours import normalization
from mmtune.behaviours.known import Memory
from tests.oracle import assert_equal_steps, randomize, runs, step

pytestmark = pytest.mark.skipif(
    native.node() is None, reason='nothing is known without the native node')


class Block(nn.Module):
    between = None

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Sequential(
            nn.ConvTranspose2d(4, 3, 2, bias=False), nn.BatchNorm2d(3))

    def forward(self, x):
        y = self.conv(x)
        if self.between is not None:
            self.between()
        return self.head(self.bn(y).relu())


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 3, 6, 6, dtype=torch.float64)


@pytest.fixture
def pair(x):
    """A stock block, and the same in Tune mode whose pairs are known."""
    torch.manual_seed(0)
    stock = randomize(Block()).double().eval()
    tuned = copy.deepcopy(stock)
    turn_on(tuned)
    for model in (stock, tuned):
        step(model, x)
        step(model, x)
    assert is_known(tuned) and is_known(tuned.head)
    return stock, tuned


@pytest.fixture
def checks(monkeypatch):
    """Counts the full checks."""
    counted = []
    check = normalization.foldable_pair

    def counting(*args):
        counted.append(args)
        return check(*args)

    monkeypatch.setattr(normalization, 'foldable_pair', counting)
    return counted


def is_known(block):
    return len(block._tune_block.known) == 1


def test_the_second_step_checks_nothing(pair, checks, x):
    stock, tuned = pair
    for batch in (x, x[:1], torch.cat([x, x], 2)):
        assert_equal_steps(step(stock, batch), step(tuned, batch))
        assert not checks
        assert runs(tuned) == ['fused', 'fused']
    for change in (nn.Module.train, nn.Module.eval):
        for model in pair:
            change(model.conv), change(model.head[0])
        step(tuned, x)
        assert len(checks) == 2
        assert_equal_steps(step(stock, x), step(tuned, x))
        assert len(checks) == 2
        checks.clear()


def new_parameter(path):
    def change(model):
        owner, _, name = path.rpartition('.')
        layer = model.get_submodule(owner)
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach() * 2))
    return change


def hook(path, register, function):
    return lambda model: getattr(model.get_submodule(path), register)(function)


def method(path, name, wrap):
    def change(model):
        layer = model.get_submodule(path)
        setattr(layer, name, wrap(getattr(layer, name)))
    return change


def attribute(path, value):
    def change(model):
        owner, _, name = path.rpartition('.')
        setattr(model.get_submodule(owner), name, copy.deepcopy(value))
    return change


class Double(nn.Module):

    def forward(self, weight):
        return weight * 2


def circular(model):
    model.conv.padding_mode = 'circular'
    model.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


@torch.no_grad()
def scale_in_place(model):
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(1.5)


def scale_data(model):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data * 1.5


CHANGES = {
    'stride': attribute('conv.stride', (2, 2)),
    'stride as a list': attribute('conv.stride', [2, 2]),
    'padding': attribute('conv.padding', (0, 2)),
    'padding same': attribute('conv.padding', 'same'),
    'dilation': attribute('conv.dilation', (2, 1)),
    'circular padding': circular,
    'output padding': attribute('head.0.stride', (3, 3)),
    'eps': attribute('bn.eps', 1.),
    'train mode': lambda m: m.bn.train(),
    'weight': new_parameter('conv.weight'),
    'bias': new_parameter('conv.bias'),
    'no bias': attribute('conv.bias', None),
    'gamma': new_parameter('bn.weight'),
    'no gamma': attribute('bn.weight', None),
    'a mean': attribute('bn.running_mean', torch.ones(4).double()),
    'no statistics': lambda m: (setattr(m.bn, 'running_mean', None),
                                setattr(m.bn, 'running_var', None)),
    'in place': scale_in_place,
    'by data': scale_data,
    'frozen': lambda m: m.requires_grad_(False),
    'frozen weight': lambda m: m.conv.weight.requires_grad_(False),
    'a parametrization': lambda m: parametrize.register_parametrization(
        m.conv, 'weight', Double()),
    'another layer': attribute('bn', randomize(nn.BatchNorm2d(4)).double()),
    'another convolution': attribute(
        'conv', randomize(nn.Conv2d(3, 4, 1)).double()),
    'a layer within': lambda m: m.head.__setitem__(1, nn.Identity()),
    'a pre-hook': hook('conv', 'register_forward_pre_hook',
                       lambda module, args: (args[0] * 2, )),
    'a hook': hook('conv', 'register_forward_hook',
                   lambda module, args, y: y * 2),
    "the norm's pre-hook": hook('bn', 'register_forward_pre_hook',
                                lambda module, args: (args[0] * 2, )),
    "the norm's hook": hook('bn', 'register_forward_hook',
                            lambda module, args, y: y * 2),
    'a backward hook': hook(
        'conv', 'register_full_backward_hook',
        lambda module, grads, _: tuple(g * 2 for g in grads)),
    "the norm's backward hook": hook(
        'bn', 'register_full_backward_hook',
        lambda module, grads, _: tuple(g * 2 for g in grads)),
    'a method': method('conv', '_conv_forward',
                       lambda old: lambda *a: old(*a) * 2),
    'a forward': method('conv', 'forward', lambda old: lambda y: old(y) * 2),
    "the norm's forward": method('bn', 'forward',
                                 lambda old: lambda y: old(y) * 2),
    'turned off': turn_off,
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_changes_between_two_steps(pair, change, x):
    stock, tuned = pair
    with contextlib.suppress(ValueError):  # stock has nothing to turn off
        change(stock)
    change(tuned)
    for _ in range(2):
        assert_equal_steps(step(stock, x), step(tuned, x))


# Stock has run its convolution by then.
IN_BETWEEN = {
    name: CHANGES[name]
    for name in ('eps', 'train mode', 'gamma', 'no gamma', 'a mean',
                 "the norm's hook", "the norm's forward", 'weight', 'stride',
                 'no bias', 'another layer', "the norm's pre-hook")
}


@pytest.mark.parametrize('change', IN_BETWEEN.values(), ids=IN_BETWEEN)
def test_changes_between_the_two_calls(pair, change, x):
    for model in pair:
        model.between = lambda model=model: change(model)
    results = []
    for model in pair:
        results.append(step(model, x))
        model.between = None
    assert_equal_steps(*results)
    assert_equal_steps(*[step(model, x) for model in pair])


def test_a_change_in_place_between_the_two_calls(pair, x):
    _, tuned = pair
    tuned.between = lambda: tuned.conv.weight.data.mul_(1)
    step(tuned, x)  # leaves no trace
    with torch.no_grad():
        tuned.between = lambda: tuned.conv.weight.mul_(2)
        with pytest.raises(RuntimeError, match='changed in place'):
            tuned(x)


def double(old):
    return lambda *args, **kwargs: old(*args, **kwargs) * 2


PATCHES = {
    'conv2d': (F, 'conv2d'),
    'batch_norm': (F, 'batch_norm'),
    'torch.batch_norm': (torch, 'batch_norm'),
    'Conv2d.forward': (nn.Conv2d, 'forward'),
    'Conv2d._conv_forward': (nn.Conv2d, '_conv_forward'),
    'ConvTranspose2d.forward': (nn.ConvTranspose2d, 'forward'),
    'BatchNorm2d.forward': (nn.BatchNorm2d, 'forward'),
    'Module.__call__': (nn.Module, '__call__'),
}


@pytest.mark.parametrize('owner, name', PATCHES.values(), ids=PATCHES)
def test_code_patched_between_two_steps(pair, owner, name, x):
    stock, tuned = pair
    # Not by setattr: what is inherited has to be so again.
    with mock.patch.object(owner, name, double(getattr(owner, name))):
        assert_equal_steps(step(stock, x), step(tuned, x))
    assert_equal_steps(step(stock, x), step(tuned, x))
    assert runs(tuned) == ['fused', 'fused']


class Doubling(TorchFunctionMode):

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return y * 2 if func in (F.conv2d, torch.conv2d) else y


@contextlib.contextmanager
def global_hook():
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: y * 2 if isinstance(module, nn.Conv2d) else y)
    try:
        yield
    finally:
        handle.remove()


MODES = {
    'no gradient': torch.no_grad,
    'inference': torch.inference_mode,
    'autocast': lambda: torch.autocast('cpu', torch.bfloat16),
    'a function mode': Doubling,
    'a global hook': global_hook,
}


@pytest.mark.parametrize('mode', MODES.values(), ids=MODES)
def test_modes(pair, mode, x):
    for _ in range(2):
        results = []
        for model in pair:
            with mode():
                results.append(model(x))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
        assert_equal_steps(*[step(model, x) for model in pair])


def test_transforms_and_calls(pair, x):
    stock, tuned = pair
    for run in (
            lambda m: vmap(lambda one: m(one[None]))(x),
            lambda m: torch.func.jvp(m, (x, ), (torch.ones_like(x), ))[1],
            lambda m: torch.func.grad(lambda one: m(one).sum())(x),
            lambda m: torch.jit.trace(m, x)(x),
            lambda m: functional_call(
                m, {n: p * 2 for n, p in m.named_parameters()}, (x, )),
            lambda m: torch.utils.checkpoint.checkpoint(
                m, x, use_reentrant=False),
            lambda m: copy.copy(m)(x),
            lambda m: m.conv(x),
            lambda m: m.conv.forward(x),
            lambda m: copy.copy(m.conv)(x)):
        for _ in range(2):
            torch.testing.assert_close(run(tuned), run(stock), rtol=1e-12,
                                       atol=1e-12)


WRONG = {
    'channels': lambda x: x[:, :2],
    'dtype': lambda x: x.float(),
    'dimensions': lambda x: x[0, 0],
    'not a tensor': lambda x: None,
}


@pytest.mark.parametrize('make', WRONG.values(), ids=WRONG)
def test_wrong_inputs_raise_as_stock_does(pair, make, x):
    errors = []
    for model in pair:
        with pytest.raises((RuntimeError, TypeError)) as caught:
            model(make(x))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
    assert_equal_steps(*[step(model, x) for model in pair])


def test_without_a_batch(pair, x):
    results = []
    for model in pair:
        try:
            results.append(model(x[0]))
        except ValueError as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_copies_know_nothing_yet(pair, checks, x):
    stock, tuned = pair
    for copied in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert not copied._tune_block.known
        copied.bn.eps = stock.bn.eps = 1.
        assert_equal_steps(step(stock, x), step(copied, x))
        assert len(checks) == 2
        stock.bn.eps = tuned.bn.eps
        checks.clear()
    step(tuned, x)
    assert not checks
    memory = Memory(a=1)
    assert copy.deepcopy(memory) == pickle.loads(pickle.dumps(memory)) == {}


def test_threads(pair, x):
    stock, tuned = pair
    expected = stock(x)
    results = []

    def work():
        for _ in range(20):
            results.append(tuned(x))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 60
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_one_convolution_and_two_norms(x):

    class Shared(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.second(self.conv(self.first(self.conv(x))))

    stock = randomize(Shared()).double().eval()
    tuned = copy.deepcopy(stock)
    turn_on(tuned)
    for _ in range(3):
        assert_equal_steps(step(stock, x), step(tuned, x))
        assert runs(tuned) == ['fused', 'fused']


def test_a_convolution_that_is_given_its_own_promise(x):

    class Twice(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.once = True

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y if self.once else self.conv.forward(y))

    stock = randomize(Twice()).double().eval()
    tuned = copy.deepcopy(stock)
    turn_on(tuned)
    for once in (True, True, False, True):
        stock.once = tuned.once = once
        assert_equal_steps(step(stock, x), step(tuned, x))
