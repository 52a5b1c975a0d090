"""What users change on a model in Tune mode, against the same on stock.

tests/behaviours/test_convolution.py has the changes of one block between two
steps; here are those that reach further.
"""
import copy
import subprocess
import sys

import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn

from mmtune import turn_off, turn_on
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy
from tests.toy import build_runner, conv_bns, losses


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def both(model):
    stock = stock_copy(model)
    turn_on(model)
    return stock, model


def assert_same(stock, model, x):
    for _ in range(2):
        assert_equal_steps(step(stock, x), step(model, x))


# --------------------------------------------------------------------------
# Hooks of users that change what they see
# --------------------------------------------------------------------------


def grow_weight(module, args):
    module.weight.data.mul_(1.1)


HOOKS = {
    'output of a convolution': lambda m: m[0].register_forward_hook(
        lambda module, args, output: output.relu()),
    'input of a convolution': lambda m: m[3].register_forward_pre_hook(
        lambda module, args: (args[0] * 2, )),
    'input of a BN': lambda m: m[4].register_forward_pre_hook(
        lambda module, args: (args[0] + 1, )),
    'output of a BN': lambda m: m[1].register_forward_hook(
        lambda module, args, output: output * 2),
    'input of the block': lambda m: m.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 2, ), kwargs),
        with_kwargs=True),
    'output of the block': lambda m: m.register_forward_hook(
        lambda module, args, output: output.tanh()),
    'gradient into a convolution': lambda m:
        m[0].register_full_backward_pre_hook(
            lambda module, gradients: (gradients[0] * 2, )),
    'gradient out of a convolution': lambda m:
        m[3].register_full_backward_hook(
            lambda module, inputs, outputs: (inputs[0] * 2, )),
    'gradient out of a BN': lambda m: m[4].register_full_backward_hook(
        lambda module, inputs, outputs: (inputs[0] * 3, )),
    'gradient out of the block': lambda m: m.register_full_backward_hook(
        lambda module, inputs, outputs: (inputs[0] * 3, )),
    'weight, just before it is used': lambda m:
        m[3].register_forward_pre_hook(grow_weight),
}


@pytest.mark.parametrize('before', [False, True])
@pytest.mark.parametrize('register', HOOKS.values(), ids=HOOKS)
def test_hooks_that_change_values(register, before, x):
    model = conv_bns()
    if before:
        register(model)
    stock, model = both(model)
    handles = [] if before else [register(m) for m in (stock, model)]
    assert_same(stock, model, x)
    for handle in handles:
        handle.remove()
    if handles:
        assert_same(stock, model, x)
        assert runs(model) == ['fused'] * 2


# --------------------------------------------------------------------------
# Layers and parameters replaced
# --------------------------------------------------------------------------


class Stages(nn.Module):
    """Blocks in blocks, to be replaced as a whole."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv_bns(), conv_bns()
        self.last = nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))
        randomize(self).double().eval()

    def forward(self, x):
        y = self.last(self.first(x))
        return self.second(y)


def seeded(build):
    torch.manual_seed(7)
    return randomize(build()).double().eval()


def swap(one, other, index):
    one[index], other[index] = other[index], one[index]


def swap_blocks(model):
    model.first, model.second = model.second, model.first


REPLACED = {
    'convolution': lambda m: m.first.__setitem__(
        3, seeded(lambda: nn.Conv2d(8, 4, 5, padding=1, bias=False))),
    'convolution by one without a BN': lambda m: setattr(
        m, 'last', seeded(lambda: nn.Conv2d(4, 3, 1))),
    'convolution by a linear layer': lambda m: m.first.__setitem__(
        3, seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(512, 100),
                                        nn.Unflatten(1, (4, 5, 5))))),
    'BN': lambda m: m.first.__setitem__(
        1, seeded(lambda: nn.BatchNorm2d(8, eps=0.1))),
    'BN by GroupNorm': lambda m: m.first.__setitem__(
        4, seeded(lambda: nn.GroupNorm(2, 4))),
    'BN by one without statistics': lambda m: m.last.__setitem__(
        1, seeded(lambda: nn.BatchNorm2d(3, track_running_stats=False))),
    'BN by InstanceNorm': lambda m: m.last.__setitem__(
        1, seeded(lambda: nn.InstanceNorm2d(3))),
    'BNs swapped': lambda m: swap(m.first, m.second, 1),
    'convolutions swapped': lambda m: swap(m.first, m.second, 0),
    'blocks swapped': swap_blocks,
    'a block by a new one': lambda m: setattr(m, 'second', seeded(conv_bns)),
    'a block by a copy': lambda m: setattr(
        m, 'second', copy.deepcopy(m.first)),
    'a block by another that is there': lambda m: setattr(
        m, 'second', m.first),
    'a block by none': lambda m: setattr(m, 'second', nn.Identity()),
    'a BN left out': lambda m: m.first.__delitem__(4),
    'layers put in between': lambda m: m.first.insert(4, nn.ReLU()),
    'a block inside a block': lambda m: m.last.__setitem__(
        0, nn.Sequential(m.last[0])),
}


@pytest.mark.parametrize('replace', REPLACED.values(), ids=REPLACED)
def test_layers_replaced_after_turn_on(replace, x):
    stock, model = both(Stages())
    assert_same(stock, model, x)
    for one in (stock, model):
        replace(one)
    assert_same(stock, model, x)
    turn_on(model)
    assert_same(stock, model, x)
    turn_off(model)
    assert_same(stock, model, x)
    for one, other in zip(stock.modules(), model.modules()):
        assert type(one) is type(other)


def test_replaced_layers_are_fused_after_another_turn_on(x):
    stock, model = both(Stages())
    for one in (stock, model):
        one.first[0] = seeded(lambda: nn.Conv2d(3, 8, 1))
        one.first[4] = seeded(lambda: nn.BatchNorm2d(4))
        one.second = seeded(conv_bns)
    assert len(turn_on(model).rewritten) == 5
    assert_same(stock, model, x)
    assert runs(model) == ['fused'] * 5


def doubled(module, name):
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * 2))


PARAMETERS = {
    'weight': lambda m: doubled(m[0], 'weight'),
    'weight that does not learn': lambda m: setattr(
        m[0], 'weight', nn.Parameter(m[0].weight.detach(), False)),
    'bias': lambda m: doubled(m[3], 'bias'),
    'bias taken away': lambda m: setattr(m[3], 'bias', None),
    'bias given': lambda m: setattr(
        m[0], 'bias', nn.Parameter(torch.ones(8).double())),
    'gamma': lambda m: doubled(m[1], 'weight'),
    'beta': lambda m: doubled(m[1], 'bias'),
    'gamma taken away': lambda m: setattr(m[1], 'weight', None),
    'gamma and beta taken away': lambda m: setattr(
        m[1], 'weight', None) or setattr(m[1], 'bias', None),
    'gammas tied': lambda m: setattr(m[4], 'weight', m[4].bias),
    'weight, by a plain tensor': lambda m: delattr(
        m[0], 'weight') or setattr(m[0], 'weight', torch.ones(
            8, 3, 3, 3).double()),
    'weight of another shape': lambda m: setattr(
        m[3], 'weight', nn.Parameter(torch.ones(4, 8, 1, 1).double())),
    'statistics': lambda m: setattr(
        m[1], 'running_var', m[1].running_var * 2),
    'flat vector': lambda m: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()) * 2, m.parameters()),
    'tensors swapped': lambda m: torch.utils.swap_tensors(
        m[3].bias, nn.Parameter(torch.ones(4).double())),
}


@pytest.mark.parametrize('replace', PARAMETERS.values(), ids=PARAMETERS)
def test_parameters_replaced(replace, x):
    stock, model = both(conv_bns())
    assert_same(stock, model, x)
    for one in (stock, model):
        replace(one)
    assert_same(stock, model, x)
    assert runs(model) == ['fused'] * 2


# --------------------------------------------------------------------------
# Devices and dtypes
# --------------------------------------------------------------------------

CONVERSIONS = {
    'half': lambda m: m.half(),
    'bfloat16': lambda m: m.bfloat16(),
    'float': lambda m: m.float(),
    'half, one block': lambda m: m[:2].half(),
    'float and back': lambda m: m.float().double(),
    'to a dtype': lambda m: m.to(torch.bfloat16),
    'to a device': lambda m: m.to('cpu'),
    'to a memory format': lambda m: m.to(memory_format=torch.channels_last),
    'type': lambda m: m.type(torch.float32),
    'share_memory': lambda m: m.share_memory(),
}


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('convert', CONVERSIONS.values(), ids=CONVERSIONS)
def test_converted_after_turn_on(convert, overwrite, x):
    """Exactly what conversion before turn_on gives, near to stock."""
    later, before = stock_copy(conv_bns()), stock_copy(conv_bns())
    stock = stock_copy(later)
    turn_on(later)
    step(later, x)
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        for one in (stock, before, later):
            convert(one)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    turn_on(before)
    x = x.to(stock[0].weight.dtype)
    if stock[3].weight.dtype != x.dtype:
        for one in (stock, before, later):
            with pytest.raises(RuntimeError):
                one(x)
        return
    expected, actual = step(before, x), step(later, x)
    assert_equal_steps(expected, actual, 0)
    # Roundings of each gradient and of the sums over 128 pixels.
    tolerance = max(1e-10, 32 * torch.finfo(x.dtype).eps)
    assert_equal_steps(step(stock, x), actual, tolerance)
    assert runs(later) == ['fused'] * 2
    for name, buffer in later.named_buffers():
        if 'tracked' not in name:
            assert buffer.dtype == x.dtype, name


def test_moved_to_meta(x):
    """Shapes are worked out there, and a copy comes back by to_empty."""
    stock, model = both(conv_bns())
    model.to('meta')
    y = model(x.to('meta'))
    assert y.device.type == 'meta' and y.shape == stock(x).shape
    model.to_empty(device='cpu')
    model.load_state_dict(stock.state_dict())
    assert_same(stock, model, x)
    assert runs(model) == ['fused'] * 2


@pytest.mark.parametrize('assign', [False, True])
def test_built_on_meta_and_loaded_later(assign, x):
    stock = conv_bns()
    with torch.device('meta'):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8),
            nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)).double().eval()
    turn_on(model)
    if not assign:
        model.to_empty(device='cpu')
    model.load_state_dict(stock.state_dict(), assign=assign)
    assert_same(stock, model.requires_grad_(), x)
    assert runs(model) == ['fused'] * 2
    # Raises where anything is left on meta.
    assert_same(stock, model.to('cpu'), x)


READ = """
import torch
from pathlib import Path
folder = Path(__file__).parent
model = torch.load(folder / 'model.pth', weights_only=False)
x, expected = torch.load(folder / 'values.pth')
torch.testing.assert_close(model(x), expected)
from mmtune.api import latest_runs
print(*latest_runs(model).values())
"""


def test_pickle_is_read_by_another_process(tmp_path):
    stock, model = both(conv_bns())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.save(model, tmp_path / 'model.pth')
    torch.save((x, stock(x).detach()), tmp_path / 'values.pth')
    (tmp_path / 'read.py').write_text(READ)
    done = subprocess.run([sys.executable, tmp_path / 'read.py'],
                          capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ['fused'] * 2


# --------------------------------------------------------------------------
# MMCV's option and MMEngine's key at the same time
# --------------------------------------------------------------------------


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('when', ['built with it', 'before', 'after', 'off'])
def test_option_of_mmcv(when, training, x):
    """MMCV's own code runs where its option is on, once; else ours."""
    torch.manual_seed(0)
    norm = dict(type='BN')
    stock = nn.Sequential(
        ConvModule(3, 6, 3, norm_cfg=norm),
        ConvModule(6, 4, 1, norm_cfg=norm, act_cfg=None))
    randomize(stock).double().train(training)
    model = stock_copy(stock)
    if when == 'built with it':
        built = nn.Sequential(
            ConvModule(3, 6, 3, norm_cfg=norm, efficient_conv_bn_eval=True),
            ConvModule(6, 4, 1, norm_cfg=norm, act_cfg=None,
                       efficient_conv_bn_eval=True))
        built.load_state_dict(model.state_dict())
        model = built.double().train(training)
    if when == 'before':
        model[0].turn_on_efficient_conv_bn_eval()
    turn_on(model)
    if when in ('after', 'off'):
        for module in model:
            module.turn_on_efficient_conv_bn_eval()
    if when == 'off':
        step(model, x)
        for module in model:
            module.turn_on_efficient_conv_bn_eval(False)
        stock.load_state_dict(model.state_dict())
    assert_same(stock, model, x)
    if when == 'off':
        assert runs(model) == ['train mode' if training else 'fused'] * 2
    turn_off(model)
    stock.load_state_dict(model.state_dict())
    assert_same(stock, model, x)


@pytest.mark.parametrize('flexible', [False, True])
@pytest.mark.parametrize('key', ['backbone', ['backbone', 'neck']])
def test_key_of_mmengine_without_the_hook(key, flexible, tmp_path):
    """MMEngine then rewrites a model that is in Tune mode already."""
    toy = dict(type='ToyClassifier')
    stock = build_runner(tmp_path / 'stock', flexible, validate=True)
    stock.train()
    tuned = build_runner(
        tmp_path / 'tuned',
        flexible,
        validate=True,
        model=dict(type='mmtune.TuneModeModel', architecture=toy),
        efficient_conv_bn_eval=key)
    tuned.train()
    assert losses(tuned) == pytest.approx(losses(stock), rel=1e-5)
    for one, other in zip(stock.model.state_dict().values(),
                          tuned.model.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # FlexibleRunner knows no such key.
    rewritten = 'not run' if not flexible else 'fused'
    assert runs(tuned.model)[:2] == [rewritten] * 2
    turn_off(tuned.model)
    batch = dict(inputs=torch.randn(2, 3, 8, 8), labels=torch.zeros(2).long())
    stock.model.load_state_dict(tuned.model.state_dict())
    assert torch.equal(
        *(one.eval().test_step(batch) for one in (stock.model, tuned.model)))


def test_turned_on_after_the_rewrite_of_mmengine(x):
    from mmengine.model.efficient_conv_bn_eval import (
        turn_on_efficient_conv_bn_eval,
    )
    stock = Stages()
    model = stock_copy(stock)
    turn_on_efficient_conv_bn_eval(model, ['first'])
    report = turn_on(model)
    assert [row.bn for row in report.left_out] == ['first.1', 'first.4']
    assert_same(stock, model, x)
    assert runs(model) == ['fused'] * 3
