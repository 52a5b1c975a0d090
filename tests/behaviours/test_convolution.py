"""Exactness for whatever a forward does between and around a pair."""
import contextlib
import copy
import gc
import io
import itertools
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from mmtune import native, turn_off, turn_on
from mmtune.analysis import saved_bytes
from mmtune.behaviours.deferred import settle
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy


class Block(nn.Module):
    """Conv and BN, with what happens to them decided by ``self.way``."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.other_bn = nn.BatchNorm2d(4)
        self.way = 'plain'

    def forward(self, x):
        return getattr(self, self.way)(x)

    def plain(self, x):
        return self.bn(self.conv(x)).relu()

    def conv_twice(self, x):
        return self.bn(self.conv(x)) + self.conv(x).sigmoid()

    def output_twice(self, x):
        y = self.conv(x)
        return self.bn(y) * y.tanh()

    def output_after_bn(self, x):
        y = self.conv(x)
        z = self.bn(y)
        y = y.relu()
        return y + z

    def bn_twice(self, x):
        return self.bn(self.bn(self.conv(x)))

    def two_norms(self, x):
        y = self.conv(x)
        return self.bn(y) + self.other_bn(y)

    def bn_skipped(self, x):
        return self.conv(x)

    def bn_skipped_in_tuple(self, x):
        return [self.conv(x), dict(y=self.conv(x))['y']]

    def bn_on_something_else(self, x):
        return self.bn(self.conv(x).relu())

    def bn_on_input(self, x):
        return self.bn(x.repeat(1, 2, 1, 1)[:, :4]) + self.conv(x)

    def changed_in_place(self, x):
        y = self.conv(x)
        y += 1
        return self.bn(y)

    def changed_in_place_by_method(self, x):
        y = self.conv(x)
        y.mul_(2)
        return self.bn(y)

    def operators(self, x):
        y = self.conv(x)
        shape, count = y.shape, len(y)
        y = 1 - y[:, 1:] / count + (y @ y.transpose(2, 3))[:, 1:]
        return -y, torch.cat([self.conv(x), y], 1), y.new_ones(shape) * y.sum()

    def functions(self, x):
        y = self.conv(x)
        return F.relu(y), torch.stack([y, y]), torch.where(y > 0, y, y.exp())

    def no_grad_between(self, x):
        with torch.no_grad():
            y = self.conv(x)
        return self.bn(y) + x.sum()

    def no_grad_norm(self, x):
        y = self.conv(x)
        with torch.no_grad():
            z = self.bn(y)
        return y + z

    def peeked_without_grad(self, x):
        y = self.conv(x)
        with torch.no_grad():
            scale = y.abs().mean()
        return self.bn(y) * scale

    def weight_replaced(self, x):
        y = self.conv(x)
        weight = self.conv.weight
        del self.conv.weight
        self.conv.weight = weight * 2
        z = self.bn(y)
        del self.conv.weight
        self.conv.weight = weight
        return z

    def frozen_conv(self, x):
        return self.bn(self.conv(x.detach())) + x.mean()

    def checkpointed(self, x):
        return checkpoint(self.plain, x, use_reentrant=False)

    def checkpointed_reentrant(self, x):
        return checkpoint(self.plain, x, use_reentrant=True)

    def called_by_name(self, x):
        return self.bn(input=self.conv(input=x))

    def without_batch(self, x):
        return self.conv(x[0]).relu()


WAYS = [name for name in vars(Block) if not name.startswith('__')
        and name != 'forward']
FUSED = {
    'plain', 'conv_twice', 'bn_twice', 'two_norms', 'checkpointed',
    'checkpointed_reentrant', 'called_by_name', 'frozen_conv',
    'output_after_bn', 'weight_replaced', 'output_twice'
}


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 3, 6, 6, dtype=torch.float64)


def make_block(way='plain'):
    torch.manual_seed(0)
    block = randomize(Block()).double().eval()
    block.way = way
    return block


@pytest.mark.parametrize('way', WAYS)
def test_any_control_flow_after_turn_on(way, x):
    block = make_block()
    stock = stock_copy(block)
    turn_on(block)
    block.way = stock.way = way
    assert_equal_steps(step(stock, x), step(block, x))
    # `bn_twice` ends with a call on a plain tensor.
    fused = way in FUSED - {'bn_twice'}
    assert (runs(block)[0] == 'fused') == fused
    for leaf in settle([block(x)]):
        assert 'DeferredConv' not in repr(type(leaf))


@pytest.mark.parametrize('way', WAYS)
def test_any_control_flow_before_turn_on(way, x):
    block = make_block(way)
    stock = stock_copy(block)
    try:
        turn_on(block)
    except ValueError as error:
        assert 'nothing to put into Tune mode' in str(error)
    assert_equal_steps(step(stock, x), step(block, x))


@pytest.mark.parametrize('way', ['plain', 'conv_twice', 'two_norms'])
@pytest.mark.parametrize('training', [False, True])
def test_train_and_eval_switched_in_mid_run(way, training, x):
    block = make_block(way)
    stock = stock_copy(block)
    if way == 'two_norms':
        block.way = 'plain'
    turn_on(block)
    block.way = way
    for mode in (training, not training, training):
        for model in (stock, block):
            model.train(mode)
        assert_equal_steps(step(stock, x), step(block, x))
        expected = 'train mode' if mode else 'fused'
        assert runs(block)[0] == expected


@pytest.mark.parametrize('where', ['conv', 'bn', 'block'])
@pytest.mark.parametrize('register', [
    'register_forward_hook', 'register_forward_pre_hook',
    'register_full_backward_hook', 'register_full_backward_pre_hook'
])
def test_hooks_of_users_see_what_stock_shows(where, register, x):

    def attach(model):
        seen = []

        def hook(module, *values):
            for value in values:
                items = value if isinstance(value, tuple) else (value, )
                seen.extend(item.detach().clone() for item in items
                            if item is not None)

        module = model if where == 'block' else getattr(model, where)
        getattr(module, register)(hook)
        return seen

    block = make_block()
    stock = stock_copy(block)
    turn_on(block)
    expected, actual = attach(stock), attach(block)
    assert_equal_steps(step(stock, x), step(block, x))
    assert len(expected) == len(actual) > 0
    for one, other in zip(expected, actual):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_global_hooks_see_what_stock_shows(x):
    block = make_block()
    turn_on(block)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(type(output)))
    try:
        block(x)
    finally:
        handle.remove()
    assert seen and all(kind is torch.Tensor for kind in seen)


@pytest.mark.parametrize('change', [
    lambda m: m.bn.running_var.data.mul_(3),
    lambda m: m.bn.running_mean.data.copy_(torch.ones(4)),
    lambda m: m.bn.weight.data.copy_(torch.ones(4)),
    lambda m: m.conv.weight.data.mul_(0.5),
    lambda m: m.load_state_dict(
        {k: v * 2 for k, v in m.state_dict().items()}),
    lambda m: m.train() and m(torch.ones(2, 3, 6, 6).double()) is m.eval(),
    lambda m: m.float().double(),
    lambda m: setattr(m.bn, 'eps', 0.5),
    lambda m: setattr(m.conv, 'weight',
                      nn.Parameter(m.conv.weight.detach() * 2)),
    lambda m: setattr(m.bn, 'running_var', m.bn.running_var + 1),
    lambda m: m.conv.weight.requires_grad_(False),
    lambda m: m.bn.requires_grad_(False),
    lambda m: m.requires_grad_(False),
    lambda m: setattr(m, 'bn', nn.Identity()),
    lambda m: setattr(m, 'bn', copy.deepcopy(m.other_bn)),
    lambda m: setattr(m, 'conv', nn.Conv2d(3, 4, 1).double().requires_grad_(
        False)),
    lambda m: setattr(m.bn, 'running_mean', None) or setattr(
        m.bn, 'running_var', None),
])
def test_changes_between_two_steps(change, x):
    block = make_block()
    stock = stock_copy(block)
    turn_on(block)
    step(block, x)
    for model in (stock, block):
        torch.manual_seed(1)
        change(model)
    assert_equal_steps(step(stock, x), step(block, x))
    conv, bn = block.conv, block.bn
    if hasattr(conv, 'weight_coeff') and runs(block)[:1] == ['fused']:
        torch.testing.assert_close(
            conv.weight_coeff.flatten(),
            (bn.running_var + bn.eps).rsqrt())
        torch.testing.assert_close(conv.bias_delta, -bn.running_mean)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('whole', [True, False])
def test_half_precision_models(dtype, whole, x):
    block = make_block().float()
    (block if whole else block.conv).to(dtype)
    exact = make_block()
    exact.load_state_dict(block.state_dict())
    stock = stock_copy(block)
    turn_on(block)
    exact, stock, tuned = (
        step(model, x.to(model.conv.weight.dtype))
        for model in (exact, stock, block))
    assert runs(block)[0] == 'fused'
    for key in exact:
        if exact[key] is None or 'tracked' in key:
            continue
        assert tuned[key].dtype == stock[key].dtype
        scale = exact[key].abs().max()
        error = (tuned[key].double() - exact[key]).abs().max() / scale
        assert error <= 8 * torch.finfo(dtype).eps, key
    coefficient = block.conv.weight_coeff
    assert coefficient.dtype == block.bn.running_var.dtype


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_no_less_exact_than_stock(dtype):
    """Root of the mean square of the error against float64."""

    def call(model, x):
        with torch.autocast('cpu', dtype):
            y = model(x)
        assert y.dtype == dtype
        return y.float()

    squares = {}
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)).eval()
        stock, exact = stock_copy(randomize(model, seed)), stock_copy(model)
        turn_on(model)
        x = torch.randn(4, 64, 16, 16).to(dtype).float()
        exact = step(exact.double(), x.double())
        stock, tuned = step(stock, x, call), step(model, x, call)
        assert runs(model) == ['fused']
        for key, value in exact.items():
            if 'buffer' in key:
                continue
            assert tuned[key].dtype == torch.float32
            squares.setdefault(key, []).append([
                (step[key] - value).square().mean() for step in (stock, tuned)
            ])
    for key, errors in squares.items():
        stock_error, error = torch.tensor(errors).sum(0).sqrt()
        assert error <= 1.1 * stock_error, key


def test_fold_under_autocast_is_not_rounded_to_half():
    """A scale that half precision would round shows in the result."""
    block = make_block().float()
    with torch.no_grad():
        block.conv.weight.fill_(1.)
        block.conv.bias.zero_()
        block.bn.weight.fill_(1 + 2**-6)
        block.bn.bias.zero_()
        block.bn.running_mean.zero_()
        block.bn.running_var.fill_((1 + 2**-6)**2)
        block.bn.eps = 0.
    turn_on(block)
    with torch.autocast('cpu', torch.bfloat16):
        y = block(torch.ones(1, 3, 5, 5))
    assert runs(block)[0] == 'fused'
    assert y[0, 0, 2, 2] == 27


def test_mismatch_of_dtypes_raises_as_stock_does(x):
    block = make_block()
    stock = stock_copy(block)
    turn_on(block)
    for model in (stock, block):
        with pytest.raises(RuntimeError):
            model(x.float())
        with pytest.raises((RuntimeError, ValueError)):
            model(x[0])
        with pytest.raises(RuntimeError):
            model(x[:, :2])


def test_input_changed_in_place_before_the_norm(x):
    """Stock used the values from before: so must we, or say that we can't."""

    class Late(Block):

        def late(self, x):
            x = x.clone()
            y = self.conv(x)
            x.add_(1)
            return self.bn(y)

    torch.manual_seed(0)
    block = randomize(Late()).double().eval()
    turn_on(block)
    block.way = 'late'
    with torch.no_grad(), pytest.raises(
            RuntimeError, match="'conv' was changed"):
        block(x)


def test_promise_into_an_autograd_function_is_an_error(x):

    class Double(torch.autograd.Function):

        @staticmethod
        def forward(ctx, y):
            return y * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    class Custom(Block):

        def custom(self, x):
            return self.bn(Double.apply(self.conv(x)))

    torch.manual_seed(0)
    block = randomize(Custom()).double().eval()
    turn_on(block)
    block.way = 'custom'
    with pytest.raises(RuntimeError, match='`torch.autograd.Function`'):
        block(x)


def test_conv_called_from_outside_returns_a_tensor(x):
    block = make_block()
    turn_on(block)
    assert type(block.conv(x)) is torch.Tensor
    with pytest.raises(RuntimeError):
        block(x[:, :1])
    assert type(block.conv(x)) is torch.Tensor


def test_checkpoint_still_drops_what_it_dropped(x):
    block = make_block()
    turn_on(block)
    with saved_bytes(block) as plain:
        y = block(x)
    plain_total = plain.total
    block.way = 'checkpointed'
    with saved_bytes(block) as saved:
        z = block(x)
    assert saved.total <= x.numel() * 8 < plain_total
    torch.testing.assert_close(y, z)


def test_inference_mode(x):
    block = make_block()
    stock = stock_copy(block)
    turn_on(block)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), stock(x))
        torch.testing.assert_close(block(x.clone()), stock(x.clone()))
    assert runs(block)[0] == 'fused'
    assert_equal_steps(step(stock, x), step(block, x))


@pytest.mark.parametrize('duplicate', [
    copy.deepcopy,
    lambda model: pickle.loads(pickle.dumps(model)),
    lambda model: torch.load(_saved(model), weights_only=False),
])
def test_copies_work_and_share_nothing(duplicate, x):
    block = make_block()
    stock = stock_copy(block)
    turn_on(block)
    other = duplicate(block)
    assert_equal_steps(step(stock, x), step(other, x))
    assert runs(other)[0] == 'fused' and runs(block)[0] == 'not run'
    with torch.no_grad():
        other.conv.weight.zero_()
    assert_equal_steps(step(stock, x), step(block, x))
    turn_off(other)
    assert 'tune=True' in repr(block) and 'tune=True' not in repr(other)


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


class Parts(nn.Module):
    """Two blocks that share a convolution, and a plain one."""

    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(3, 3, 3, padding=1)
        self.a = nn.Sequential(conv, nn.BatchNorm2d(3))
        self.b = nn.Sequential(conv, nn.BatchNorm2d(3))
        self.c = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        return self.c(self.b(self.a(x)))


PART_CALLS = {
    'turn a block off': lambda m: turn_off(m.b),
    'turn a convolution off': lambda m: turn_off(m.a[0]),
    'turn a BN off': lambda m: turn_off(m.c[1]),
    'another mode for a block': lambda m: turn_on(m, 'Eval', modules='b'),
    'on again from inside': lambda m: turn_on(m.b),
    'off through a slice': lambda m: turn_off(m.c[:1]),
    'overlapping roots': lambda m: turn_on(m, modules=['b', 'b.1', 'c'][::2]),
    'a new layer at the end': lambda m: m.c.append(nn.ReLU()),
    'BN replaced in a block': lambda m: m.c.__setitem__(1, nn.Identity()),
}


@pytest.mark.parametrize('call', PART_CALLS.values(), ids=PART_CALLS)
def test_parts(call, x):
    torch.manual_seed(0)
    model = randomize(Parts()).double().eval()
    turn_on(model)
    call(model)
    stock = stock_copy(model)
    turn_off(stock)
    assert_equal_steps(step(stock, x), step(model, x))


def test_two_models_share_a_layer(x):
    torch.manual_seed(0)
    first = randomize(Parts()).double().eval()
    second = nn.Sequential(first.c[0], nn.BatchNorm2d(3)).double().eval()
    stock = stock_copy(second)
    turn_on(first)
    turn_on(second)
    turn_off(first)
    assert_equal_steps(step(stock, x), step(second, x))


class Changing(Block):
    """Changes the convolution between its call and that of its BN."""

    def settings(self, x):
        self.conv.stride = (2, 2)
        y = self.conv(x)
        self.conv.stride = (1, 1)
        return self.bn(y)

    def branches(self, x):
        outputs = []
        for dilation in (1, 2):
            self.conv.dilation = self.conv.padding = (dilation, dilation)
            outputs.append(self.conv(x))
        return [self.bn(y) for y in outputs]

    def kept(self, x):
        self.feature = self.conv(x)
        return self.bn(self.feature)

    def in_an_object(self, x):
        return type('Result', (), dict(y=self.conv(x)))()

    def conv_checkpointed(self, x):
        return self.bn(checkpoint(self.conv, x, use_reentrant=True))

    def conv_checkpointed_not_reentrant(self, x):
        return self.bn(checkpoint(self.conv, x, use_reentrant=False))


@pytest.mark.parametrize('before', [False, True])
@pytest.mark.parametrize('way', [
    'settings', 'branches', 'conv_checkpointed',
    'conv_checkpointed_not_reentrant'
])
def test_convolution_as_it_was_when_called(way, before, x):
    torch.manual_seed(0)
    block = randomize(Changing()).double().eval()
    block.way = way if before else 'plain'
    stock = stock_copy(block)
    try:
        turn_on(block)
    except ValueError as error:
        assert before and 'nothing to put' in str(error)
    block.way = stock.way = way
    for _ in range(2):
        assert_equal_steps(step(stock, x), step(block, x))


@pytest.mark.parametrize('change', [
    lambda conv: setattr(conv.weight, 'data', conv.weight.data * 2),
    lambda conv: conv.weight.mul_(1.01),
    lambda conv: conv.bias.add_(1),
])
def test_parameter_changed_before_the_norm_is_an_error(change, x):

    class Late(Block):

        def late(self, x):
            y = self.conv(x)
            with torch.no_grad():
                change(self.conv)
            return self.bn(y)

    block = randomize(Late()).double().eval()
    turn_on(block)
    block.way = 'late'
    with pytest.raises(RuntimeError, match="'conv' was changed"):
        block(x)


@pytest.mark.parametrize('way, find', [
    ('kept', lambda block, output: block.feature),
    ('in_an_object', lambda block, output: output.y),
])
def test_no_promise_outlives_its_block(way, find, x):
    torch.manual_seed(0)
    block = randomize(Changing()).double().eval()
    turn_on(block)
    block.way = way
    expected = F.conv2d(x, block.conv.weight, block.conv.bias, padding=1)
    left = find(block, block(x))
    with torch.no_grad():
        block.conv.weight.zero_()
    assert torch.equal(left + 0, expected)


def test_reentrant_checkpoint_of_a_pair_fuses_from_the_second_run(x):
    block = make_block()
    turn_on(block)
    block.way = 'checkpointed_reentrant'
    step(block, x)
    with torch.no_grad():
        block(x)
    assert runs(block)[0] == 'fused'


def test_threads():
    block = make_block()
    stock = stock_copy(block)
    turn_on(block)
    inputs = torch.randn(8, 2, 3, 6, 6, dtype=torch.float64)
    expected = [stock(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for actual, value in zip(pool.map(block, inputs), expected):
                torch.testing.assert_close(actual, value)
    assert type(block.conv(inputs[0])) is torch.Tensor


@pytest.mark.parametrize('transform', [
    lambda m, x: torch.vmap(m)(x[None]),
    lambda m, x: torch.func.jvp(m, (x, ), (x.cos(), )),
    lambda m, x: torch.func.grad(lambda x: m(x).square().sum())(x),
    lambda m, x: torch.func.jacrev(m)(x[:1, :, :2, :2]),
    lambda m, x: torch.func.functional_call(
        m, {k: v * 2 for k, v in m.state_dict().items()}, (x, )),
    lambda m, x: torch.autograd.functional.jacobian(
        lambda x: m(x).sum(1), x[:1, :, :2, :2], vectorize=True),
    lambda m, x: torch.jit.trace(m, x)(x),
    lambda m, x: torch.fx.symbolic_trace(m)(x),
])
def test_transforms(transform, x):
    block = make_block()
    stock = stock_copy(block)
    turn_on(block)
    expected, actual = transform(stock, x), transform(block, x)
    torch.testing.assert_close(actual, expected)
    assert_equal_steps(step(stock, x), step(block, x))


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('segments', [2, 4])
def test_checkpoint_sequential(reentrant, segments, x):
    torch.manual_seed(0)
    model = randomize(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4))).double().eval()
    stock = stock_copy(model)
    turn_on(model)
    model(x)

    def call(model, x):
        return checkpoint_sequential(
            model, segments, x, use_reentrant=reentrant)

    assert_equal_steps(step(stock, x, call), step(model, x, call))


def test_parts_compiled(x):
    block = make_block()
    stock = stock_copy(block)
    turn_on(block)
    block.conv.compile(backend='eager')
    assert_equal_steps(step(stock, x), step(block, x))


def test_buffers_survive_inference_mode(x):
    block = make_block()
    turn_on(block)
    with torch.inference_mode():
        block(x)
    assert not block.conv.weight_coeff.is_inference()
    block.conv.weight_coeff.add_(0)


MODES_OF_THE_CALLER = {
    'inference': torch.inference_mode,
    'no_grad': torch.no_grad,
    'inference in no_grad': lambda: contexts(
        torch.no_grad(), torch.inference_mode()),
    'grad in inference': lambda: contexts(
        torch.inference_mode(), torch.enable_grad()),
}


@contextlib.contextmanager
def contexts(*managers):
    with contextlib.ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager)
        yield


@pytest.mark.parametrize(
    'context', MODES_OF_THE_CALLER.values(), ids=MODES_OF_THE_CALLER)
@pytest.mark.parametrize('mode, norm_eval', [
    ('Tune', None), ('Tune', True), ('Eval', None), ('Deploy', None)
])
@pytest.mark.parametrize('bias', [True, False])
def test_turned_on_in_a_mode_of_the_caller(context, mode, norm_eval, bias, x):
    """What is made there serves in training, as if made outside."""

    def build():
        torch.manual_seed(0)
        return randomize(
            nn.Sequential(
                nn.Conv2d(3, 4, 3, bias=bias),
                nn.BatchNorm2d(4, affine=bias))).double().eval()

    outside, inside = build(), build()
    turn_on(outside, mode, norm_eval=norm_eval)
    with context():
        turn_on(inside, mode, norm_eval=norm_eval)
    for tensor in itertools.chain(inside.parameters(), inside.buffers()):
        assert not tensor.is_inference()
    for _ in range(2):
        expected, actual = step(outside, x), step(inside, x)
        assert_equal_steps(expected, actual, 0)
    assert runs(inside) == (['fused'] if mode == 'Tune' else [])


def test_channels_removed_before_a_call_in_inference_mode(x):
    """What a call makes anew serves in training too."""
    block = make_block()
    stock = stock_copy(block)
    turn_on(block)
    for part in (block, stock):
        for owner, name in ((part.conv, 'weight'), (part.conv, 'bias'),
                            (part.bn, 'weight'), (part.bn, 'bias')):
            kept = getattr(owner, name).detach()[:3]
            setattr(owner, name, nn.Parameter(kept))
        part.bn.running_mean = part.bn.running_mean[:3]
        part.bn.running_var = part.bn.running_var[:3]
    with torch.inference_mode():
        block(x)
    assert_equal_steps(step(stock, x), step(block, x))
    assert runs(block) == ['fused']


def test_a_rewritten_model_is_freed_without_the_collector(x):
    block = make_block()
    turn_on(block)
    step(block, x)
    reference = weakref.ref(block.conv)
    gc.disable()
    try:
        del block
        assert reference() is None
    finally:
        gc.enable()


def test_parametrizations(x):
    from torch.nn.utils import parametrizations
    for before in (True, False):
        block = make_block()
        if before:
            parametrizations.weight_norm(block.conv)
        stock = stock_copy(block)
        turn_on(block)
        if not before:
            for model in (stock, block):
                parametrizations.weight_norm(model.conv)
        assert_equal_steps(step(stock, x), step(block, x))
        assert runs(block)[0] == 'fused'
        turn_on(block)
        assert_equal_steps(step(stock, x), step(block, x))
        turn_off(block)
        assert_equal_steps(step(stock, x), step(block, x))


@pytest.mark.parametrize('wrap', [
    nn.utils.weight_norm, nn.utils.spectral_norm,
    lambda conv: prune.l1_unstructured(conv, 'weight', 0.5)
])
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_weights_made_by_a_pre_hook(wrap, x):
    block = make_block()
    wrap(block.conv)
    stock = Block().double().eval()
    wrap(stock.conv)
    stock.load_state_dict(block.state_dict())
    turn_on(block)
    assert_equal_steps(step(stock, x), step(block, x))
    assert runs(block)[0] == 'fused'


def test_a_block_that_restricts_its_attributes(x):

    class Strict(Block):

        def __setattr__(self, name, value):
            if name.startswith('_tune'):
                raise AttributeError(name)
            super().__setattr__(name, value)

    block = randomize(Strict()).double().eval()
    stock = stock_copy(block)
    turn_on(block)
    assert_equal_steps(step(stock, x), step(block, x))
    assert runs(block)[0] == 'fused'


def test_settings_of_a_parametrized_convolution_changed_in_between(x):
    torch.manual_seed(0)
    block = randomize(Changing()).double().eval()
    nn.utils.parametrizations.weight_norm(block.conv)
    stock = stock_copy(block)
    turn_on(block)
    block.way = stock.way = 'branches'
    assert_equal_steps(step(stock, x), step(block, x))


# Channels in, channels out, kernel, stride and the size of the input: around
# SMALL_MAP elements of output, and around SMALL_SHARE of the weight.
SIZES = {
    'smallest map': (8, 8, 1, 1, 4, 'small'),
    'below': (8, 8, 1, 1, 90, 'small'),
    'at least': (8, 8, 1, 1, 91, 'fused'),
    'fewer channels out': (32, 8, 1, 1, 80, 'small'),
    'more channels out': (8, 32, 1, 1, 46, 'fused'),
    'stride': (8, 8, 1, 2, 180, 'small'),
    'large weight': (128, 1024, 3, 1, 11, 'small'),
    'large weight, large map': (128, 1024, 3, 1, 12, 'fused'),
}


@pytest.fixture
def in_python(monkeypatch):
    """Without the native node, whose folds are cheap for any map."""
    monkeypatch.setattr(native, 'node', lambda: None)


def pair_of_size(in_channels, out_channels, kernel, stride, size):
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, stride, padding=kernel // 2)
    model = randomize(nn.Sequential(conv, nn.BatchNorm2d(out_channels)))
    model.double().eval()
    return model, torch.randn(1, in_channels, size, size, dtype=torch.float64)


@pytest.mark.small_maps
@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_small_maps_run_as_stock(sizes, in_python):
    *sizes, expected = sizes
    model, x = pair_of_size(*sizes)
    stock = stock_copy(model)
    turn_on(model)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == [expected]
    model.train(), stock.train()
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['train mode']


@pytest.mark.small_maps
@pytest.mark.parametrize('learns', [True, False])
@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_no_map_is_small_for_the_native_node(sizes, learns):
    if native.node() is None:
        pytest.skip('runs without the native node')
    model, x = pair_of_size(*sizes[:-1])
    model.requires_grad_(learns)
    stock = stock_copy(model)
    turn_on(model)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused']
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x), stock(x), rtol=1e-10,
                                       atol=1e-10)
            assert runs(model) == ['fused']
    model.train(), stock.train()
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['train mode']


@pytest.mark.small_maps
def test_small_and_large_maps_in_turn(in_python):
    model = randomize(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).double().eval()
    stock = stock_copy(model)
    turn_on(model)
    for size, expected in ((8, 'small'), (96, 'fused'), (8, 'small')):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        assert_equal_steps(step(stock, x), step(model, x))
        assert runs(model) == [expected]


def shared_between_blocks():
    conv = nn.Conv2d(3, 3, 1)
    return nn.Sequential(*(nn.Sequential(conv, nn.BatchNorm2d(3))
                           for _ in range(3)))


def pair_in_two_blocks():
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    return nn.Sequential(nn.Sequential(conv, norm), nn.ReLU(),
                         nn.Sequential(conv, norm))


class OtherEntry(nn.Module):
    """Calls a block by another method than its forward."""

    class Block(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.bn = nn.BatchNorm2d(3)

        @staticmethod
        def forward_nothing(x):
            return x

        def forward_conv(self, x):
            return self.conv(self.forward_nothing(x))

        def forward(self, x):
            return self.bn(self.forward_conv(x))

        def rfp_forward(self, x, feature):
            return self.bn(self.conv(x)) + feature

    def __init__(self):
        super().__init__()
        self.block = self.Block()

    def forward(self, x):
        return self.block.rfp_forward(self.block(x), x)


@pytest.mark.parametrize('build, count, calls', [
    (shared_between_blocks, 3, 3), (pair_in_two_blocks, 1, 2),
    (OtherEntry, 1, 2)])
def test_every_way_to_a_pair_is_fused(build, count, calls, x):
    """By the nodes of autograd: a norm that ran as stock leaves its own."""
    torch.manual_seed(0)
    model = randomize(build()).double().eval()
    stock = stock_copy(model)
    turn_on(model)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused'] * count
    assert norm_nodes(stock(x)) == calls
    assert norm_nodes(model(x)) == 0


def norm_nodes(output):
    """How many BatchNorms autograd is to go back through."""
    seen, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [parent for parent, _ in node.next_functions]
    return sum('BatchNorm' in node.name() for node in seen)
