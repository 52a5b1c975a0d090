"""Frozen normalizations of many projects, known by what they compute."""
import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmtune import turn_on
from mmtune.layers.frozen import Frozen, frozen
from tests.oracle import assert_equal_steps, runs, step, stock_copy

CHANNELS = 6


class Buffers(nn.Module):
    """What all of them hold."""

    def __init__(self, **attributes):
        super().__init__()
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            self.register_buffer(name, torch.ones(CHANNELS))
        vars(self).update(attributes)

    def affine(self, x, eps):
        scale = self.weight * (self.running_var + eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class Torchvision(Buffers):

    def forward(self, x):
        return self.affine(x, self.eps)


class Detectron2(Buffers):
    """Another way where no gradient is asked for."""

    def forward(self, x):
        if not x.requires_grad:
            return F.batch_norm(x, self.running_mean, self.running_var,
                                self.weight, self.bias, False, eps=self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        dtype = x.dtype
        return x * scale.reshape(1, -1, 1, 1).to(dtype) + shift.reshape(
            1, -1, 1, 1).to(dtype)


class Literal(Buffers):

    def forward(self, x):
        return self.affine(x, 1e-5)


class LiteralBesides(Buffers):
    """It has an eps, and does not use it."""

    def forward(self, x):
        return self.affine(x, 2e-5)


class NoEps(Buffers):

    def forward(self, x):
        return self.affine(x, 0)


class OfTheClass(Buffers):
    eps = 1e-3

    def forward(self, x):
        return self.affine(x, self.eps)


class OtherName(Buffers):

    def forward(self, x):
        return self.affine(x, self.variance_epsilon)


class Counting(Buffers):

    def __init__(self, **attributes):
        super().__init__(**attributes)
        self.register_buffer('num_batches_tracked', torch.tensor(0))

    def forward(self, x):
        return self.affine(x, self.eps)


class Described(Buffers):

    def forward(self, x):
        return self.affine(x, self.eps) * self.cfg['gain']


CERTAIN = {
    # What builds it, and the eps found, None where it is read.
    'torchvision': (lambda: Torchvision(eps=1e-5), None),
    'eps of 0': (lambda: Torchvision(eps=0.), None),
    'eps as an int': (lambda: Torchvision(eps=0), None),
    'a large int': (lambda: Torchvision(eps=1), None),
    'a tiny eps': (lambda: Torchvision(eps=1e-12), None),
    'detectron2': (lambda: Detectron2(eps=1e-5), None),
    'detectron2, eps of 0': (lambda: Detectron2(eps=0.), None),
    'literal': (Literal, 1e-5),
    'literal beside an attribute': (lambda: LiteralBesides(eps=1e-5), 2e-5),
    'none': (NoEps, 0.),
    'attribute of the class': (OfTheClass, None),
    'attribute of another name': (
        lambda: OtherName(variance_epsilon=1e-3), 1e-3),
    'num_batches_tracked': (lambda: Counting(eps=1e-5), None),
    'a dict': (lambda: Described(eps=1e-5, cfg=dict(gain=1)), None),
    'ReLU in place': (lambda: Activated(nn.ReLU(inplace=True)), None),
    'SiLU': (lambda: Activated(nn.SiLU(inplace=True)), None),
    'an activation that learns': (lambda: Activated(nn.PReLU(CHANNELS)),
                                  None),
    'a wrapper': (lambda: Activated(nn.Sequential(nn.ReLU(), nn.AvgPool2d(
        2))), None),
    'the same twice': (lambda: ActivatedTwice(nn.Softplus()), None),
    'unused attributes': (lambda: Torchvision(
        eps=1e-5, num_features=6, name='bn1', sizes=(1, [2])), None),
}


class Drops(Buffers):
    """In train mode only: what the probe of one mode does not see."""

    def forward(self, x):
        return F.dropout(self.affine(x, self.eps), .5, self.training)


class DropsInEval(Buffers):

    def forward(self, x):
        return F.dropout(self.affine(x, self.eps), .5, not self.training)


class Activated(Torchvision):
    """As timm's FrozenBatchNormAct2d."""

    def __init__(self, act, drop=nn.Identity, eps=1e-5):
        super().__init__(eps=eps)
        self.drop = drop()
        self.act = act
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class ActivatedTwice(Activated):

    def forward(self, x):
        return self.act(super().forward(x))


class OfItsSibling(Activated):
    """Asks what the modules are of, and does something else by that."""

    def forward(self, x):
        if isinstance(self.drop, nn.Identity):
            return super().forward(x) * 2
        return super().forward(x)


class InPlaceAfter(Activated):

    def forward(self, x):
        return super().forward(x).mul_(2)


class Before(Activated):

    def forward(self, x):
        return Torchvision.forward(self, self.act(x))


class Beside(Activated):

    def forward(self, x):
        y = Torchvision.forward(self, x)
        return self.act(y) * self.drop(y)


class InTrainMode(Activated):

    def forward(self, x):
        y = Torchvision.forward(self, x)
        return self.act(y) if self.training else y


class Relu(Torchvision):

    def forward(self, x):
        return super().forward(x).relu()


class Detached(Torchvision):

    def forward(self, x):
        return super().forward(x.detach())


class DetachedInPart(Torchvision):

    def forward(self, x):
        y = super().forward(x)
        return y + (x - x.detach())


class NoGradientWanted(Torchvision):
    """Something else where no gradient is."""

    def forward(self, x):
        return super().forward(x) * (1 if x.requires_grad else 2)


class Clamped(Torchvision):

    def forward(self, x):
        scale = self.weight * (self.running_var.clamp(min=0) +
                               self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class NoNumbers(Torchvision):

    def forward(self, x):
        return super().forward(x).nan_to_num()


class OutsideOfTheRoot(Torchvision):

    def forward(self, x):
        scale = self.weight / (self.running_var.sqrt() + self.eps)
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class Rounded(Torchvision):

    def forward(self, x):
        return super().forward(x).float().to(x.dtype)


class Single(Torchvision):

    def forward(self, x):
        return super().forward(x.float())


class BySize(Torchvision):

    def forward(self, x):
        y = super().forward(x)
        return y if x.shape[-1] > 1 else y * 2


class CountsCalls(Torchvision):

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Lists(Torchvision):

    def forward(self, x):
        self.seen.append(1)
        return super().forward(x)


class Updates(Torchvision):

    def forward(self, x):
        y = super().forward(x)
        self.running_mean.mul_(.9)
        return y


class OfHalf(Torchvision):

    def forward(self, x):
        return super().forward(x) / 2


class Fails(Buffers):

    def forward(self, x):
        raise RuntimeError('on purpose')


class Called(Torchvision):

    def __call__(self, x):
        return super().__call__(x) * 2


ELSE = 'computes something else, or more, than (x - running_mean)'
UNCERTAIN = {
    'drops in train mode': (Drops, ELSE),
    'drops in eval mode': (DropsInEval, ELSE),
    'asks what its modules are': (lambda eps: OfItsSibling(nn.ReLU()), ELSE),
    'in place after a module': (lambda eps: InPlaceAfter(nn.ReLU()), ELSE),
    'a module before': (lambda eps: Before(nn.ReLU()), ELSE),
    'two modules beside each other': (lambda eps: Beside(nn.ReLU()), ELSE),
    'a module in train mode': (lambda eps: InTrainMode(nn.ReLU()), ELSE),
    'relu': (Relu, ELSE),
    'detached': (Detached, ELSE),
    'another gradient': (DetachedInPart, ELSE),
    'another without gradient': (NoGradientWanted, ELSE),
    'clamped variance': (Clamped, ELSE),
    'no NaN': (NoNumbers, ELSE),
    'eps outside of the root': (OutsideOfTheRoot, ELSE),
    'rounded': (Rounded, ELSE),
    'another dtype': (Single, ELSE),
    'by the size of its input': (BySize, ELSE),
    'changes an attribute': (lambda eps: CountsCalls(eps=eps, calls=0),
                             ELSE),
    'changes a list': (lambda eps: Lists(eps=eps, seen=[]), ELSE),
    'changes a buffer': (Updates, ELSE),
    'half of it': (OfHalf, ELSE),
    'fails': (Fails, 'could not be tried (RuntimeError)'),
    'another call': (Called, 'is called in a way of its own'),
    'an object': (lambda eps: Torchvision(eps=eps, owner=object()),
                  "holds a object as 'owner'"),
    'a tensor for eps': (lambda eps: Torchvision(eps=torch.tensor(eps)),
                         "holds a Tensor as 'eps'"),
}


def randomized(norm):
    generator = torch.Generator().manual_seed(0)
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        buffer = norm._buffers[name]
        buffer.copy_(torch.rand(CHANNELS, generator=generator) + .5)
    return norm


def with_norm(build, train=True):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, CHANNELS, 3), randomized(build()),
        nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
    return model.double().train(train)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 4, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('build, eps', CERTAIN.values(), ids=CERTAIN)
def test_folded_where_it_is_the_formula(build, eps, train, x):
    model = with_norm(build, train)
    stock = stock_copy(model)
    norm = model[1]
    assert frozen(norm).eps == eps
    assert not turn_on(model).left_out
    for _ in range(2):
        assert_equal_steps(step(stock, x), step(model, x))
        assert runs(model)[0] == 'fused'
    with torch.no_grad():
        torch.testing.assert_close(model(x), stock(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('build, reason', UNCERTAIN.values(), ids=UNCERTAIN)
def test_left_alone_and_named_where_it_is_not(build, reason, train, x):
    """Also in the mode in which it happens to compute the formula."""
    model = with_norm(lambda: build(eps=1e-5), train)
    report = turn_on(model)
    row, = report.left_out
    assert (row.conv, row.bn) == ('0', '1')
    assert getattr(model[1], 'seen', []) == []
    assert type(model[1]).__name__ in row.reason and reason in row.reason
    assert len(runs(model)) == 1


def test_dropout_after_the_formula_is_as_stock(x):
    model = with_norm(lambda: Activated(nn.ReLU(), nn.Dropout))
    stock = stock_copy(model)
    turn_on(model)
    steps = []
    for part in (stock, model):
        torch.manual_seed(3)
        steps.append(step(part, x))
    assert_equal_steps(*steps)
    assert runs(model) == ['fused', 'train mode']


def test_deploy_does_not_take_what_does_more_than_normalize(x):
    model = with_norm(lambda: Activated(nn.ReLU()), train=False)
    stock = stock_copy(model)
    row, = turn_on(model, 'Deploy').left_out
    assert 'does more than normalize' in row.reason
    torch.testing.assert_close(model(x), stock(x))


def test_dropout_of_a_norm_that_was_in_eval_mode_is_kept(x):
    model = with_norm(lambda: Drops(eps=1e-5), train=False)
    stock = stock_copy(model)
    turn_on(model)
    for part in (model, stock):
        part.train()
    outputs = []
    for part in (stock, model):
        torch.manual_seed(3)
        outputs.append(part(x))
    torch.testing.assert_close(outputs[1], outputs[0])


CHANGES = {
    'eps read': (lambda: Torchvision(eps=1e-5),
                 lambda norm: setattr(norm, 'eps', .5), 'fused'),
    'eps read, an int': (lambda: Torchvision(eps=1e-5),
                         lambda norm: setattr(norm, 'eps', 1), 'fused'),
    'eps of the class': (OfTheClass,
                         lambda norm: setattr(norm, 'eps', .5), 'fused'),
    'eps that is no number': (
        lambda: Torchvision(eps=1e-5),
        lambda norm: setattr(norm, 'eps', torch.tensor(.5)), 'stock'),
    'eps of another name': (
        lambda: OtherName(variance_epsilon=1e-3),
        lambda norm: setattr(norm, 'variance_epsilon', .5), 'stock'),
    'eps that is not read': (
        lambda: LiteralBesides(eps=1e-5),
        lambda norm: setattr(norm, 'eps', .5), 'stock'),
    'an entry of a dict': (
        lambda: Described(eps=1e-5, cfg=dict(gain=1)),
        lambda norm: norm.cfg.update(gain=2), 'stock'),
    'a new attribute': (
        lambda: Torchvision(eps=1e-5),
        lambda norm: setattr(norm, 'gain', torch.ones(2)), 'stock'),
    'a part': (lambda: Torchvision(eps=1e-5),
               lambda norm: norm.add_module('act', nn.ReLU()), 'stock'),
    'a buffer': (lambda: Torchvision(eps=1e-5),
                 lambda norm: norm.running_var.mul_(2), 'fused'),
    'another activation': (lambda: Activated(nn.ReLU()),
                           lambda norm: setattr(norm, 'act', nn.SiLU()),
                           'stock'),
    'another slope': (lambda: Activated(nn.LeakyReLU(.1)),
                      lambda norm: setattr(norm.act, 'negative_slope', .5),
                      'fused'),
}


@pytest.mark.parametrize('build, change, expected', CHANGES.values(),
                         ids=CHANGES)
def test_changed_after_turn_on(build, change, expected, x):
    model = with_norm(build)
    stock = stock_copy(model)
    turn_on(model)
    for part in (model, stock):
        change(part[1])
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model)[0] == expected


def test_buffers_of_several_dtypes_run_as_stock(x):
    model = with_norm(lambda: Torchvision(eps=1e-5))
    stock = stock_copy(model)
    turn_on(model)
    for part in (model, stock):
        part[1].bias = part[1].bias.float()
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model)[0] == 'stock'


def test_changed_between_two_forwards(x):
    model = with_norm(lambda: Torchvision(eps=1e-5), train=False)
    stock = stock_copy(model)
    turn_on(model)
    with torch.no_grad():
        for eps in (1e-5, .5, 0):
            model[1].eps = stock[1].eps = eps
            torch.testing.assert_close(model(x), stock(x))


CAPPED = type(
    'Capped', (Buffers, ),
    dict(forward=lambda self, x: self.affine(x, max(self.eps, 1e-5))))


def test_eps_that_is_read_in_part(x):
    """It follows the attribute above a bound only."""
    model = with_norm(lambda: CAPPED(eps=1e-3))
    stock = stock_copy(model)
    turn_on(model)
    for eps, expected in ((1e-3, 'fused'), (1e-12, 'stock')):
        model[1].eps = stock[1].eps = eps
        assert_equal_steps(step(stock, x), step(model, x))
        assert runs(model)[0] == expected


@pytest.mark.parametrize('mode', ['Tune', 'Deploy'])
@pytest.mark.parametrize('build', [
    Literal, NoEps, lambda: Torchvision(eps=0), OfTheClass,
], ids=['literal', 'none', 'int', 'class'])
def test_modes_take_the_eps_that_is_found(mode, build, x):
    model = with_norm(build, train=False)
    expected = model(x)
    turn_on(model, mode)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)



STATES = {
    'meta by default': (lambda: torch.device('meta'), lambda norm: norm),
    'inference mode': (torch.inference_mode, lambda norm: norm),
    'no_grad': (torch.no_grad, lambda norm: norm),
    'autocast': (lambda: torch.autocast('cpu', torch.bfloat16),
                 lambda norm: norm),
    'fake tensors': (FakeTensorMode, lambda norm: norm),
    'buffers on meta': (lambda: torch.device('cpu'),
                        lambda norm: norm.to('meta')),
    'half buffers': (lambda: torch.device('cpu'), lambda norm: norm.half()),
    'bfloat16 buffers, meta by default': (
        lambda: torch.device('meta'), lambda norm: norm.bfloat16()),
    'zero buffers': (lambda: torch.device('cpu'), lambda norm: [
        buffer.zero_() for buffer in norm.buffers()] and norm),
}


@pytest.mark.parametrize('build', [
    lambda: Torchvision(eps=1e-5), lambda: Detectron2(eps=0.), Literal,
], ids=['torchvision', 'detectron2', 'literal'])
@pytest.mark.parametrize('context, change', STATES.values(), ids=STATES)
def test_found_whatever_the_caller_has_set(context, change, build):
    norm = change(build())
    with context():
        assert isinstance(frozen(norm), Frozen)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_found_whatever_the_default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        norm = Torchvision(eps=1e-5)
        assert isinstance(frozen(norm), Frozen)
    finally:
        torch.set_default_dtype(before)


def test_turn_on_where_the_default_device_is_meta(x):
    model = with_norm(lambda: Torchvision(eps=1e-5))
    stock = stock_copy(model)
    with torch.device('meta'):
        assert not turn_on(model).left_out
    assert_equal_steps(step(stock, x), step(model, x))


def test_the_probe_leaves_nothing_behind():
    norm = randomized(Described(eps=1e-5, cfg=dict(gain=1)))
    before = copy.deepcopy(vars(norm))
    buffers = dict(norm._buffers)
    model = nn.Sequential(nn.Conv2d(4, CHANNELS, 1), norm)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        turn_on(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(norm._buffers[name] is buffer
               for name, buffer in buffers.items())
    for name in ('eps', 'cfg', 'training'):
        assert vars(norm)[name] == before[name]


def test_five_dimensions_run_as_stock():
    """Where its view of four dimensions means something else."""
    model = nn.Sequential(nn.Conv3d(4, CHANNELS, 1),
                          randomized(Torchvision(eps=1e-5))).double()
    stock = stock_copy(model)
    turn_on(model)
    x = torch.randn(2, 4, CHANNELS, 3, 3, dtype=torch.float64)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['stock']


@pytest.mark.parametrize('duplicate', [
    copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))
], ids=['deepcopy', 'pickle'])
def test_copies(duplicate, x):
    model = with_norm(lambda: Torchvision(eps=1e-5))
    stock = stock_copy(model)
    turn_on(model)
    assert_equal_steps(step(stock, x), step(duplicate(model), x))


@pytest.mark.slow
def test_compiled_in_one_graph(x):
    model = with_norm(lambda: Torchvision(eps=1e-5), train=False)
    stock = stock_copy(model)
    turn_on(model)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    assert_equal_steps(step(stock, x), step(
        model, x, lambda _, x: compiled(x)))
