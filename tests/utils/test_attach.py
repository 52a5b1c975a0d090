"""What a model in Tune mode has in common with the stock one: all but memory.

Classes, buffers and code stay the user's, and whatever a tool or a user does
to them works as on the stock model.
"""
import collections.abc
import copy
import inspect
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from mmtune import turn_off, turn_on
from mmtune.api import latest_runs
from tests.oracle import assert_equal_steps, randomize, runs, step


class Block(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.up_bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.up_bn(self.up(self.bn(self.conv(x)).relu()))


def make_block(kind=Block):
    torch.manual_seed(0)
    return randomize(kind()).double().eval()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 3, 6, 6, dtype=torch.float64)


def layers(model):
    return [m for m in model.modules()
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d))]


# --------------------------------------------------------------------------
# Code of the user's on the way
# --------------------------------------------------------------------------


def wrap(name, wrapper):
    """A change that wraps a method of some layers on the instance."""

    def change(model):
        for module in model.modules():
            if type(module).__name__ in name.partition('.')[0].split('|'):
                method = name.rpartition('.')[2]
                setattr(module, method, wrapper(getattr(module, method)))

    return change


def cast(value):
    """As MMCV's fp16 helpers do: containers are made anew."""
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, collections.abc.Iterable):
        return type(value)(cast(item) for item in value)
    return value


def circular(model):
    """Tiled textures: as if each convolution padded in a circle."""

    def conv_forward(self, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), 'circular'), weight, bias)

    model.conv._conv_forward = types.MethodType(conv_forward, model.conv)


INSTANCE = {
    'a norm that looks at the type': wrap(
        'BatchNorm2d.forward', lambda old: lambda y: old(
            y * 2 if isinstance(y, torch.Tensor) else y)),
    'a norm that casts': wrap(
        'BatchNorm2d.forward', lambda old: lambda *a: old(*cast(a))),
    'a norm in a checkpoint': wrap(
        'BatchNorm2d.forward',
        lambda old: lambda y: checkpoint(old, y, use_reentrant=False)),
    'a norm that casts its result': wrap(
        'BatchNorm2d.forward', lambda old: lambda y: old(y).float().double()),
    'a convolution that scales': wrap(
        'Conv2d.forward', lambda old: lambda x: old(x) * 2),
    'a convolution that pads': circular,
    'a convolution below its forward': wrap(
        'Conv2d._conv_forward', lambda old: lambda x, w, b: old(x, w * 2, b)),
    'a transposed convolution': wrap(
        'ConvTranspose2d._output_padding', lambda old: lambda *a: [1, 1]),
    'a norm below its forward': wrap(
        'BatchNorm2d._check_input_dim', lambda old: lambda y: y.mul_(2)),
    'a norm above its forward': wrap(
        'BatchNorm2d._call_impl', lambda old: lambda y: old(y * 2)),
    'a block': wrap('Block.forward', lambda old: lambda x: old(x * 2) * 2),
}


@pytest.mark.parametrize('change', INSTANCE.values(), ids=INSTANCE)
@pytest.mark.parametrize('first', ['change', 'turn_on'])
def test_methods_replaced_on_the_instance(change, first, x):
    stock, tuned = make_block(), make_block()
    change(stock)
    if first == 'change':
        change(tuned)
        try:
            report = turn_on(tuned)
        except ValueError as error:
            assert 'replaced on the instance' in str(error)
            return
        assert any('is replaced' in row.reason for row in report.left_out)
    else:
        turn_on(tuned)
        change(tuned)
    assert_equal_steps(step(stock, x), step(tuned, x))
    assert runs(tuned).count('fused') < 2 or change is INSTANCE['a block']
    turn_off(tuned)
    assert_equal_steps(step(stock, x), step(tuned, x))


def test_a_method_taken_back_fuses_again(x):
    stock, tuned = make_block(), make_block()
    circular(tuned)
    turn_on(tuned)
    tuned(x)
    assert runs(tuned) == ['stock', 'fused']
    del tuned.conv._conv_forward
    assert_equal_steps(step(stock, x), step(tuned, x))
    assert runs(tuned) == ['fused', 'fused']


def doubled(old):
    if old is Block.forward:
        return lambda self, x: old(self, x) * 2
    return lambda *args, **kwargs: old(*args, **kwargs) * 2


CLASSES = {
    'every module': (nn.Module, '__call__'),
    'block': (Block, 'forward'),
    'convolution': (nn.Conv2d, 'forward'),
    'convolution below its forward': (nn.Conv2d, '_conv_forward'),
    'transposed convolution': (nn.ConvTranspose2d, 'forward'),
    'norm': (nn.modules.batchnorm._BatchNorm, 'forward'),
    'function of the convolution': (F, 'conv2d'),
    'function of the transposed convolution': (F, 'conv_transpose2d'),
    'function of the norm': (F, 'batch_norm'),
}


@pytest.mark.parametrize('owner, name', CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize('first', ['change', 'turn_on'])
def test_code_replaced_on_the_class(owner, name, first, monkeypatch, x):
    """As a notebook does that runs a cell again, or a monkey patch."""
    stock, tuned, earlier = make_block(), make_block(), make_block()
    plain = step(stock, x)
    turn_on(earlier)
    if first == 'turn_on':
        turn_on(tuned)
    monkeypatch.setattr(owner, name, doubled(getattr(owner, name)))
    if first == 'change':
        report = turn_on(tuned)
        if owner not in (Block, nn.Module):
            assert any('is replaced' in row.reason for row in report.left_out)
    expected = step(stock, x)
    assert not torch.equal(expected['output 0'], plain['output 0'])
    assert_equal_steps(expected, step(tuned, x))
    assert_equal_steps(expected, step(earlier, x))
    monkeypatch.undo()
    assert_equal_steps(plain, step(tuned, x))
    assert_equal_steps(plain, step(earlier, x))
    assert runs(earlier) == ['fused', 'fused']


class Doubling(TorchFunctionMode):
    """Sees what runs between the two, as code of the user's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        return output * 2 if func is torch.conv2d else output


def test_function_modes_see_what_stock_shows(x):
    stock, tuned = make_block(), make_block()
    turn_on(tuned)
    with Doubling():
        assert_equal_steps(step(stock, x), step(tuned, x))
    with torch.device('cpu'):
        assert_equal_steps(step(stock, x), step(tuned, x))
    assert runs(tuned) == ['fused', 'fused']


class Asking(Block):
    """Asks between the two what a promise has to answer as a tensor does."""

    def forward(self, x):
        y = self.conv(x)
        return self.up_bn(self.up(self.bn(self.ask(y)).relu()))


def plus_one(y: torch.Tensor) -> torch.Tensor:
    return y + 1


ASK = {
    'type': lambda self, y: y * 2 if isinstance(y, torch.Tensor) else y,
    'is_tensor': lambda self, y: y * 2 if torch.is_tensor(y) else y,
    'no list': lambda self, y: y[0] if isinstance(y, (list, tuple)) else y,
    'as_tensor': lambda self, y: torch.as_tensor(y) * 2,
    'method of the class': lambda self, y: torch.Tensor.add(y, 1),
    'new tensor': lambda self, y: y + torch.zeros_like(y) + y.new_zeros(1),
    'match': lambda self, y: y.mul(2) if type(y).__name__ else y,
}


@pytest.mark.parametrize('ask', ASK.values(), ids=ASK)
def test_a_promise_is_a_tensor_to_whoever_asks(ask, monkeypatch, x):
    monkeypatch.setattr(Asking, 'ask', lambda self, y: y, raising=False)
    stock, tuned = make_block(Asking), make_block(Asking)
    turn_on(tuned)
    assert_equal_steps(step(stock, x), step(tuned, x))
    assert runs(tuned) == ['fused', 'fused']
    # A way that the trace did not see.
    monkeypatch.setattr(Asking, 'ask', ask)
    assert_equal_steps(step(stock, x), step(tuned, x))


def without_functions(self, y):
    with torch._C.DisableTorchFunctionSubclass():
        return y + 1


@pytest.mark.parametrize('below, message', [
    (without_functions, "output of 'conv' went into code"),
    ('script', 'TorchScript interpreter'),  # which drops the message
])
@pytest.mark.filterwarnings('ignore:.*script')
def test_code_below_python_is_an_error(below, message, monkeypatch, x):
    if below == 'script':
        scripted = torch.jit.script(plus_one)
        below = lambda self, y: scripted(y)  # noqa: E731
    monkeypatch.setattr(Asking, 'ask', lambda self, y: y, raising=False)
    tuned = make_block(Asking)
    turn_on(tuned)
    monkeypatch.setattr(Asking, 'ask', below)
    with pytest.raises(RuntimeError, match=message):
        tuned(x)


# --------------------------------------------------------------------------
# Classes
# --------------------------------------------------------------------------


def test_classes_are_what_they_were(x):
    tuned = make_block()
    before = [type(m) for m in tuned.modules()]
    turn_on(tuned, norm_eval=True)
    assert [type(m) for m in tuned.modules()] == before
    other = copy.deepcopy(tuned)
    assert [type(m) for m in other.modules()] == before
    assert inspect.signature(tuned.conv.forward) == inspect.signature(
        nn.Conv2d(3, 4, 3).forward)


class Registered(nn.Module):
    """Allows one class of each name, and counts them."""

    names: list = []

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__name__ in Registered.names:
            raise ValueError(f'{cls.__name__} is registered already')
        Registered.names.append(cls.__name__)


class RegisteredConv(nn.Conv2d, Registered):
    pass


class Meta(type):
    made = 0

    def __init__(cls, *args):
        super().__init__(*args)
        Meta.made += 1


class RegisteredBlock(Block, Registered, metaclass=Meta):

    def __init__(self):
        super().__init__()
        self.conv = RegisteredConv(3, 4, 3, padding=1)

    def forward(self, x):
        return self.bn(self.conv(x))


def test_no_class_is_made(x):
    stock, tuned = make_block(RegisteredBlock), make_block(RegisteredBlock)
    names, made = list(Registered.names), Meta.made
    subclasses = len(RegisteredConv.__subclasses__())
    turn_on(tuned)
    assert_equal_steps(step(stock, x), step(tuned, x))
    assert runs(tuned) == ['fused']
    assert Registered.names == names and Meta.made == made
    assert len(RegisteredConv.__subclasses__()) == subclasses


def by_exact_type(model):

    def init(module):
        if type(module) == nn.Conv2d:  # noqa: E721
            nn.init.constant_(module.weight, .5)
        table = {nn.BatchNorm2d: lambda m: nn.init.constant_(m.weight, 2)}
        table.get(type(module), lambda m: None)(module)

    return model.apply(init)


def qat(model):
    model = model.float().train()
    model.qconfig = quantization.get_default_qat_qconfig('fbgemm')
    return quantization.prepare_qat(model).eval()


def fused(model):
    return quantization.fuse_modules(model, ['conv', 'bn'])


def fused_fx(model):
    return quantize_fx.fuse_fx(model)


def prepared_fx(model):
    mapping = quantization.get_default_qconfig_mapping('fbgemm')
    return quantize_fx.prepare_fx(
        model.float(), mapping,
        (torch.randn(2, 3, 6, 6), ))


TOOLS = [by_exact_type, qat, fused, fused_fx, prepared_fx]


@pytest.mark.parametrize('tool', TOOLS)
@pytest.mark.filterwarnings('ignore')
def test_tools_that_ask_for_exact_types(tool, x):
    stock, tuned = make_block(), make_block()
    turn_on(tuned)
    torch.manual_seed(0)
    stock = tool(stock)
    torch.manual_seed(0)
    tuned = tool(tuned)
    assert ([(name, type(m).__qualname__) for name, m in stock.named_modules()
             ] == [(name, type(m).__qualname__)
                   for name, m in tuned.named_modules()])
    x = x.to(next(tuned.parameters()))
    for _ in range(2):
        assert_equal_steps(step(stock, x), step(tuned, x), 1e-5)


@pytest.mark.filterwarnings('ignore')
def test_script_says_what_to_do(x):
    tuned = make_block()
    turn_on(tuned)
    with pytest.raises(AttributeError, match='call mmtune.turn_off'):
        torch.jit.script(tuned)
    with pytest.raises(AttributeError, match='call mmtune.turn_off'):
        torch.jit.script(tuned.conv)
    turn_off(tuned)
    torch.jit.script(tuned)


# --------------------------------------------------------------------------
# Copies
# --------------------------------------------------------------------------


def test_a_shallow_copy_runs_with_its_own_settings(x):
    stock, tuned = make_block(), make_block()
    turn_on(tuned)
    outputs = []
    for model in (stock, tuned):
        dilated = copy.copy(model.conv)
        dilated.dilation = dilated.padding = (2, 2)
        model.conv, plain = dilated, model.conv
        outputs.append((model(x), plain(x), dilated(x), model.conv.forward(x)
                        if model is stock else dilated(x)))
        model.conv = plain
    for expected, actual in zip(*outputs):
        torch.testing.assert_close(actual, expected)


def replicate(model):
    """What ``DataParallel`` does on each device, on this one."""
    replicas = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            # No parameter, since it has a history.
            setattr(replica, name,
                    None if parameter is None else parameter.clone())
    return replicas[model]


class OtherEntry(Block):

    def other_forward(self, x):
        return self.bn(self.conv(x))


def test_replicas_of_data_parallel_fuse_and_learn(x):
    stock, tuned = make_block(OtherEntry), make_block(OtherEntry)
    turn_on(tuned)
    expected = step(stock, x, lambda model, x: replicate(model)(x))
    assert_equal_steps(
        expected, step(tuned, x, lambda model, x: replicate(model)(x)))
    assert runs(tuned) == ['fused', 'fused']
    other = replicate(tuned)
    with torch.no_grad():
        other.conv.weight.zero_()
    expected = (other.bn.bias - other.bn.running_mean * other.bn.weight /
                (other.bn.running_var + other.bn.eps).sqrt())
    actual = other.other_forward(x) - (other.conv.bias * other.bn.weight / (
        other.bn.running_var + other.bn.eps).sqrt()).view(-1, 1, 1)
    assert torch.allclose(actual, expected.view(-1, 1, 1).expand_as(actual))


@pytest.mark.parametrize('part', ['conv', 'bn'])
@pytest.mark.parametrize('duplicate', [
    copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))
])
def test_copies_of_a_layer_are_stock_alone(part, duplicate, x):
    stock, tuned = make_block(), make_block()
    turn_on(tuned)
    x = x if part == 'conv' else torch.cat([x, x[:, :1]], 1)
    layer = duplicate(getattr(tuned, part))
    torch.testing.assert_close(layer(x), getattr(stock, part)(x))
    assert type(layer.forward(x)) is torch.Tensor


# --------------------------------------------------------------------------
# Buffers
# --------------------------------------------------------------------------


class Twins(nn.Module):
    """As MoCo and BYOL hold an average of their backbone inside."""

    def __init__(self, average):
        super().__init__()
        self.backbone = make_block()
        self.target = average(self.backbone)

    def forward(self, x):
        with torch.no_grad():
            target = self.target(x)
        return self.backbone(x) - target

    def update(self):
        for p in self.backbone.parameters():
            p.data.mul_(1.1)
        self.backbone.bn.running_mean.add_(1)
        self.target.update_parameters(self.backbone)


AVERAGES = {
    'AveragedModel': AveragedModel,
    'AveragedModel with buffers': lambda m: AveragedModel(m, use_buffers=True),
    'ExponentialMovingAverage': ExponentialMovingAverage,
    'ExponentialMovingAverage with buffers':
    lambda m: ExponentialMovingAverage(m, update_buffers=True),
}


@pytest.mark.parametrize('average', AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize('on', ['before', 'inside', 'after', 'off again'])
def test_averages_pair_buffers_as_in_stock(average, on, x):
    models = []
    for tune in (False, True):
        model = Twins(average)
        if tune and on == 'before':
            model = Twins.__new__(Twins)
            nn.Module.__init__(model)
            model.backbone = make_block()
            turn_on(model.backbone)
            model.target = average(model.backbone)
        elif tune:
            turn_on(model, modules='backbone' if on == 'inside' else None)
        if tune and on == 'off again':
            turn_off(model)
        model.update()
        step(model, x)
        model.update()
        models.append(model)
    assert_equal_steps(step(models[0], x), step(models[1], x))


def test_functional_call_by_the_state_dict(x):
    stock, tuned = make_block(), make_block()
    turn_on(tuned)
    for model in (stock, tuned):
        state = {k: v * 2 for k, v in model.state_dict().items()}
        model.result = torch.func.functional_call(
            model, state, (x, ), strict=True)
    torch.testing.assert_close(tuned.result, stock.result)
    assert ([name for name, _ in tuned.named_buffers()] == [
        name for name, _ in stock.named_buffers()])


# --------------------------------------------------------------------------
# Layers replaced
# --------------------------------------------------------------------------


def sync(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def copied_norms(model):
    model.bn, model.up_bn = copy.deepcopy(model.bn), copy.deepcopy(model.up_bn)
    return model


def copied_convs(model):
    model.conv = copy.deepcopy(model.conv)
    model.up = copy.deepcopy(model.up)
    return model


@pytest.mark.parametrize('exchange', [copied_norms, copied_convs])
def test_copies_in_the_place_of_layers_fuse(exchange, x):
    stock, tuned = make_block(), make_block()
    turn_on(tuned)
    assert_equal_steps(step(stock, x), step(exchange(tuned), x))
    assert runs(tuned) == ['fused', 'fused']


def plain(model):
    """As MMEngine's ``revert_sync_batchnorm`` makes new norms."""
    for name in ('bn', 'up_bn'):
        old = getattr(model, name)
        new = nn.BatchNorm2d(old.num_features).double()
        new.load_state_dict(old.state_dict())
        new.training = old.training
        setattr(model, name, new)
    return model


@pytest.mark.parametrize('exchange', [sync, plain])
def test_layers_replaced_after_turn_on_are_named(exchange, x):
    stock, tuned = exchange(make_block()), make_block()
    turn_on(tuned)
    tuned = exchange(tuned)
    with pytest.warns(UserWarning, match='replaced after mmtune.turn_on'):
        result = step(tuned, x)
    assert_equal_steps(step(stock, x), result)
    assert latest_runs(tuned) == {'bn': 'replaced', 'up_bn': 'replaced'}
    turn_on(tuned)
    assert_equal_steps(step(stock, x), step(tuned, x))
    assert runs(tuned) == ['fused', 'fused']


@pytest.mark.parametrize('exchange', [sync, plain])
@pytest.mark.parametrize('mode', ['Tune', 'Eval'])
def test_held_norms_that_are_replaced_stay_held(exchange, mode, x):
    stock, tuned = make_block(), make_block()
    turn_on(tuned, mode, norm_eval=True)
    tuned = exchange(tuned)
    tuned.train()
    expected = step(stock, x)
    with pytest.warns(UserWarning, match='are held in eval mode'):
        result = step(tuned, x)
    assert_equal_steps(expected, result)
    tuned.train()
    assert_equal_steps(expected, step(tuned, x))
    turn_off(tuned)
    assert tuned.bn.training
    stock.bn.train(), stock.up_bn.train()
    if exchange is not sync:  # which trains on a GPU alone
        assert_equal_steps(step(stock, x), step(tuned, x))


def test_a_part_turned_off_is_no_replacement(x, recwarn):
    stock, tuned = make_block(), make_block()
    turn_on(tuned, norm_eval=True)
    turn_off(tuned.up), turn_off(tuned.bn)
    assert_equal_steps(step(stock, x), step(tuned, x))
    assert not [w for w in recwarn if 'mmtune' in str(w.message)]
    assert latest_runs(tuned) == {'up_bn': 'stock'}


# --------------------------------------------------------------------------
# What a user observes
# --------------------------------------------------------------------------


def keeping(found):
    """Grad-CAM and its like: wants the gradient of what a norm is given."""

    def hook(module, inputs, output):
        inputs[0].retain_grad()
        found.append(inputs[0])

    return hook


@pytest.mark.parametrize('first', ['hook', 'turn_on'])
def test_a_hook_of_the_norm_sees_what_stock_shows(first, x):
    found = []
    for tune in (False, True):
        model = make_block()
        if tune and first == 'turn_on':
            turn_on(model)
        model.bn.register_forward_hook(keeping(found))
        model.bn.register_forward_hook(
            lambda module, inputs, output: inputs[0].register_hook(
                lambda grad: grad * 2) and None)
        if tune and first == 'hook':
            turn_on(model)
        step(model, x)
    assert type(found[1]) is torch.Tensor
    torch.testing.assert_close(found[1].grad, found[0].grad)
    assert runs(model) == ['stock', 'fused']


def test_keywords_that_hooks_see_are_the_users(x):
    seen = []
    model = make_block()
    turn_on(model)
    for layer in (model.conv, model.bn):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs),
            with_kwargs=True)
        layer.register_forward_hook(
            lambda module, args, kwargs, output: seen.append(kwargs),
            with_kwargs=True)
    model(x)
    assert seen == [{}] * 4


class Late(Block):
    """Goes another way than the one that was traced."""

    late = False

    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        return self.other(y, z) if self.late else z


@pytest.mark.parametrize('ask', [
    lambda y, z: y.retain_grad() or z,
    lambda y, z: y.register_hook(lambda grad: grad) and z,
    lambda y, z: torch.autograd.grad(z.sum(), y)[0],
])
def test_the_gradient_of_a_promise_is_an_error(ask, x):
    model = make_block(Late)
    turn_on(model)
    model.other, model.late = ask, True
    with pytest.raises(RuntimeError, match="gradient of the output of 'conv'"):
        model(x)


class Interrupted(Block):
    error = None

    def forward(self, x):
        y = self.conv(x)
        if self.error is not None:
            raise self.error
        return self.bn(y)


@pytest.mark.parametrize('error', [KeyboardInterrupt, GeneratorExit,
                                   ValueError])
def test_a_forward_that_is_interrupted_leaves_nothing(error, x):
    stock, model = make_block(Interrupted), make_block(Interrupted)
    turn_on(model)
    model.error = error()
    with pytest.raises(error):
        model(x)
    model.error = None
    assert type(model.conv(x)) is torch.Tensor
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused']


def test_hooks_taken_away_by_their_dict(x):
    stock, model = make_block(), make_block()
    turn_on(model)
    for module in model.modules():
        module._forward_hooks = collections.OrderedDict()
    for _ in range(2):
        assert_equal_steps(step(stock, x), step(model, x))
    assert type(model.conv(x)) is torch.Tensor


def test_a_convolution_called_in_backward_gives_a_tensor(x):
    model = make_block()
    turn_on(model)
    model(x)
    found = []
    y = x.clone().requires_grad_()
    z = model(y)
    z.register_hook(lambda grad: found.append(model.conv(x)) and None)
    z.sum().backward()
    before = F.conv2d(x, model.conv.weight, model.conv.bias, padding=1)
    with torch.no_grad():
        model.conv.weight.zero_()
    torch.testing.assert_close(found[0] + 0, before)


def test_errors_of_the_convolution_come_from_it(x):
    model = make_block(Falling)
    turn_on(model)
    padded = torch.cat([x[:, :2], torch.zeros_like(x[:, :1])], 1)
    torch.testing.assert_close(model(x[:, :2]), model(padded))
    assert runs(model) == ['fused']


class Falling(Block):
    """Tries something else where the convolution fails."""

    def forward(self, x):
        try:
            y = self.conv(x)
        except RuntimeError:
            y = self.conv(torch.cat([x, torch.zeros_like(x[:, :1])], 1))
        return self.bn(y)


SETTINGS = {
    'integers': lambda m: vars(m.conv).update(stride=1, padding=1),
    'one number': lambda m: vars(m.conv).update(stride=(2, ), padding=[1]),
    'dilation': lambda m: vars(m.conv).update(dilation=2),
    'transposed': lambda m: vars(m.up).update(stride=3, output_padding=1),
    'weight in its dict': lambda m: vars(m.conv).update(
        weight=torch.ones(4, 3, 3, 3).double()),
    'gamma in its dict': lambda m: vars(m.bn).update(
        weight=torch.full((4, ), 3.).double()),
}


@pytest.mark.parametrize('change', SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize('first', ['change', 'turn_on'])
def test_settings_of_a_layer(change, first, x):
    stock, model = make_block(), make_block()
    change(stock)
    if first == 'change':
        change(model)
    turn_on(model)
    change(model)
    assert_equal_steps(step(stock, x), step(model, x))


def test_wrong_keywords_are_refused_as_in_stock(x):
    model = make_block()
    turn_on(model)
    with pytest.raises(TypeError, match='inputs'):
        model.conv(inputs=x)
    with pytest.raises(TypeError, match='y'):
        model.bn(y=model.conv(x))


@pytest.mark.parametrize('move', [
    lambda layer, name, value: setattr(layer, name, value),
    lambda layer, name, value: layer._buffers.__setitem__(name, value),
])
def test_code_that_moves_all_buffers(move, x):
    stock, model = make_block(), make_block()
    turn_on(model)
    for layer in model.modules():
        for name, value in list(layer.named_buffers(recurse=False)):
            move(layer, name, value.clone())
    assert list(model.state_dict()) == list(stock.state_dict())
    assert_equal_steps(step(stock, x), step(model, x))
    turn_off(model)
    assert list(model.state_dict()) == list(stock.state_dict())


class Doubled(torch.Tensor):
    """Doubles what convolutions give."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a
                for a in args]
        output = func(*args, **(kwargs or {}))
        return output * 2 if func is torch.conv2d else output


@pytest.mark.parametrize('part', ['input', 'weight'])
def test_tensors_that_follow_what_is_done_to_them(part, x):
    stock, model = make_block(), make_block()
    turn_on(model)
    outputs = []
    for one in (stock, model):
        given = x.as_subclass(Doubled) if part == 'input' else x
        if part == 'weight':
            weight = one.conv.weight.detach().as_subclass(Doubled)
            del one.conv.weight
            one.conv.weight = weight
        outputs.append(one(given))
    torch.testing.assert_close(outputs[1], outputs[0])


def test_a_method_that_outlives_its_module_says_so():
    model = make_block(OtherEntry)
    turn_on(model)
    method = model.other_forward
    del model
    with pytest.raises(RuntimeError, match='keep the module in a variable'):
        method(None)


class Checked(nn.BatchNorm2d):

    def _check_input_dim(self, input):
        if input.size(1) != self.num_features:
            raise ValueError(f'expected {self.num_features} channels')


class ChecksNumbers(nn.BatchNorm2d):

    def _check_input_dim(self, input):
        if not input.isfinite().all():
            raise ValueError('expected numbers')


def test_a_norm_that_checks_the_numbers_of_its_input_is_left_out(x):
    stock, model = make_block(), make_block()
    for one in (stock, model):
        one.bn = randomize(ChecksNumbers(4)).double().eval()
    report = turn_on(model)
    assert 'overrides `_check_input_dim`' in report.left_out[0].reason
    assert_equal_steps(step(stock, x), step(model, x))


def test_a_norm_that_checks_the_shape_of_its_input_still_does(x):
    stock, model = make_block(), make_block()
    for one in (stock, model):
        one.bn = randomize(Checked(4)).double().eval()
    turn_on(model)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused', 'fused']
    model.conv = nn.Conv2d(3, 5, 1).double()
    turn_on(model)
    with pytest.raises(ValueError, match='expected 4 channels'):
        model(x)


class Sizes(nn.Module):
    """Checkpoints its block, whatever the size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return checkpoint(
            lambda x: self.bn(self.conv(x)).relu(), x, use_reentrant=False)


@pytest.mark.small_maps
@pytest.mark.parametrize('sizes', [(160, 8), (8, 160), (8, 160, 8)])
def test_checkpoints_of_small_and_large_maps_in_one_step(sizes):
    models = make_block(Sizes), make_block(Sizes)
    turn_on(models[1])
    inputs = [torch.randn(1, 3, size, size).double() for size in sizes]

    def call(model, inputs):
        return [model(x) for x in inputs]

    stock, tuned = (step(model, tuple(inputs), call) for model in models)
    assert_equal_steps(stock, tuned)


class CheckpointedNorm(Block):

    def forward(self, x):
        return checkpoint(self.bn, self.conv(x), use_reentrant=True)


def test_a_norm_in_a_reentrant_checkpoint_of_its_own_is_stock(x):
    stock, model = make_block(CheckpointedNorm), make_block(CheckpointedNorm)
    with pytest.raises(ValueError, match='inside an autograd function'):
        turn_on(model)
    assert_equal_steps(step(stock, x), step(model, x))


def test_output_size_by_name_and_by_place(x):

    class Up(Block):
        place = False

        def forward(self, x):
            y = self.bn(self.conv(x))
            if self.place:
                return self.up_bn(self.up(y, [13, 12]))
            return self.up_bn(self.up(y, output_size=[13, 12]))

    for place in (False, True):
        stock, model = make_block(Up), make_block(Up)
        stock.place = model.place = place
        turn_on(model)
        assert_equal_steps(step(stock, x), step(model, x))
        assert runs(model) == ['fused', 'fused']


class Absolute(nn.BatchNorm2d):
    """Finds another weight than the one that it has."""

    def __getattr__(self, name):
        value = super().__getattr__(name)
        return value.abs() if name == 'weight' else value


def test_parameters_that_are_found_in_another_way(x):
    stock, model = make_block(), make_block()
    values = torch.tensor([-2., -1., 1., 2.], dtype=torch.float64)
    for one in (stock, model):
        one.bn = randomize(Absolute(4)).double().eval()
        one.bn._parameters['weight'] = nn.Parameter(values.clone())
    turn_on(model)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused', 'fused']
