"""Ways to train against stock: what autograd, optimizers and hooks see."""
import copy

import pytest
import torch
from mmdet.models.backbones import ResNet
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_multi_avg_fn,
    update_bn,
)

from mmtune import turn_on
from mmtune.analysis import saved_bytes
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy
from tests.toy import build_runner, conv_bns, losses


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


# --------------------------------------------------------------------------
# Activation checkpointing
# --------------------------------------------------------------------------


def resnet(with_cp):
    torch.manual_seed(0)
    model = ResNet(depth=18, norm_eval=True, with_cp=with_cp)
    model.train()
    return randomize(model).double()


def kept_by(model, *inputs, **options):
    """Bytes kept for backward; the backward runs as well."""
    inputs[0].requires_grad_()
    with saved_bytes(model) as saved:
        outputs = model(*inputs, **options)
    total = saved.total
    outputs = outputs.values() if isinstance(outputs, dict) else outputs
    sum(out.sum() for out in outputs).backward()
    return total


@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')
def test_with_cp_still_checkpoints_and_fuses():
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    stock, model, without = resnet(True), resnet(True), resnet(False)
    turn_on(model)
    turn_on(without)
    assert_equal_steps(step(stock, x), step(model, x))
    assert set(runs(model)) == {'fused'}
    assert kept_by(model, x) <= kept_by(stock, x)
    assert kept_by(model, x) < 0.8 * kept_by(without, x)
    # The backward above ran each block once more.
    assert set(runs(model)) == {'fused'}


def kept_in_a_run(work_dir, mode, checkpointed):
    """A run with the neck checkpointed, and the bytes of its model."""
    hook = dict(type='mmtune.TuneModeHook', mode=mode, norm_eval=True)
    options = dict(activation_checkpointing=['neck']) if checkpointed else {}
    runner = build_runner(
        work_dir, default_hooks=dict(tune_mode=hook), **options)
    runner.train()
    kept = kept_by(runner.model, torch.randn(2, 3, 16, 16),
                   torch.tensor([0, 1]), mode='loss')
    return kept, losses(runner), runs(runner.model)


@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')
def test_activation_checkpointing_key_still_checkpoints(tmp_path):
    kept = {}
    for checkpointed in (False, True):
        for mode in ('Eval', 'Tune'):
            kept[mode, checkpointed], loss, ran = kept_in_a_run(
                tmp_path / f'{mode}{checkpointed}', mode, checkpointed)
            if mode == 'Eval':
                expected = loss
        assert loss == pytest.approx(expected, rel=1e-5)
        assert ran == ['fused'] * 3
    assert kept['Tune', True] < kept['Tune', False]
    assert kept['Tune', True] < kept['Eval', True] < kept['Eval', False]


# --------------------------------------------------------------------------
# Mixed precision
# --------------------------------------------------------------------------


def scaled_training(model, dtype, scale, steps, infinite=()):
    """Train with a GradScaler, at times with an infinite loss."""
    scaler = torch.amp.GradScaler('cpu', init_scale=scale, growth_interval=2)
    optimizer = optimizer_of(model)
    torch.manual_seed(2)
    scales, skipped = [], []
    for i in range(steps):
        optimizer.zero_grad()
        with torch.autocast('cpu', dtype):
            output = model(torch.randn(4, 3, 8, 8))
        assert output.dtype == dtype
        loss = output.float().square().mean()
        scaler.scale(loss * (float('inf') if i in infinite else 1)).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        skipped.append(all(map(torch.equal, before, model.parameters())))
        assert skipped[-1] == (not norm.isfinite())
    return scales, skipped


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_grad_scaler(dtype):
    """Scale, unscale, clip, step, skip, update."""
    stock = conv_bns(torch.float32)
    model = stock_copy(stock)
    turn_on(model)
    expected, actual = (
        scaled_training(m, dtype, 2.**12, 6, infinite=[2])
        for m in (stock, model))
    assert expected == actual
    assert [i for i in range(6) if actual[1][i]] == [2]
    assert runs(model) == ['fused'] * 2
    for one, other in zip(stock.parameters(), model.parameters()):
        error = (one - other).abs().max() / one.abs().max()
        assert error <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize('gamma', [1 / 30, 1, 30])
def test_grad_scaler_finds_a_scale(gamma):
    """From one at which half precision overflows, as stock does."""
    stock = conv_bns(torch.float32)
    with torch.no_grad():
        stock[1].weight *= gamma
        stock[4].weight *= 1 / gamma
    model = stock_copy(stock)
    turn_on(model)
    for one in (stock, model):
        skipped = scaled_training(one, torch.float16, 2.**30, 40)[1]
        assert skipped[0] and not all(skipped[30:])
        assert all(p.isfinite().all() for p in one.parameters())
    assert runs(model) == ['fused'] * 2


# --------------------------------------------------------------------------
# Averages of weights
# --------------------------------------------------------------------------

AVERAGES = {
    'SWA': {},
    'SWA with buffers': dict(use_buffers=True),
    'EMA': dict(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    'EMA with buffers': dict(
        multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
}


@pytest.mark.parametrize('options', AVERAGES.values(), ids=AVERAGES)
def test_averages_of_torch(options, x):
    stock = conv_bns()
    model = stock_copy(stock)
    turn_on(model)
    averages = []
    for one in (stock, model):
        average, optimizer = AveragedModel(one, **options), optimizer_of(one)
        for training in (False, True, False):
            step(one.train(training), x)
            optimizer.step()
            average.update_parameters(one)
        averages.append(average.eval())
    assert_equal_steps(*(step(average, x) for average in averages))
    for average in averages:
        update_bn([x, x + 1], average)
    assert_equal_steps(*(step(average, x) for average in averages))
    assert runs(averages[1]) == ['fused'] * 2


EMA_HOOKS = {
    'SWA': dict(ema_type='StochasticWeightAverage', interval=2),
    'momentum annealed': dict(ema_type='MomentumAnnealingEMA', gamma=10),
    'with buffers': dict(update_buffers=True, momentum=0.3),
    'from the second epoch': dict(begin_epoch=1),
}


@pytest.mark.parametrize('hook', EMA_HOOKS.values(), ids=EMA_HOOKS)
def test_averages_of_mmengine(hook, tmp_path):
    """Both the model and its average, as they are saved."""
    saved = {}
    for mode in ('Eval', 'Tune'):
        tune = dict(type='mmtune.TuneModeHook', mode=mode, norm_eval=True)
        runner = build_runner(
            tmp_path / mode,
            validate=True,
            default_hooks=dict(tune_mode=tune),
            custom_hooks=[
                dict(type='RecordHook'),
                dict(type='EMAHook', **hook)
            ])
        runner.train()
        saved[mode] = torch.load(tmp_path / mode / 'epoch_2.pth')
    assert runs(runner.model) == ['fused'] * 3
    for key in ('state_dict', 'ema_state_dict'):
        torch.testing.assert_close(
            saved['Tune'][key], saved['Eval'][key], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------
# Knowledge distillation
# --------------------------------------------------------------------------


class Distiller(nn.Module):
    """A student, and a teacher that learns nothing."""

    def __init__(self, build_teacher, teach_first):
        super().__init__()
        self.student = conv_bns()
        self.teacher = build_teacher(self.student)
        self.teach_first = teach_first

    def forward(self, x):
        if not self.teach_first:
            learned = self.student(x)
        with torch.no_grad():
            target = self.teacher(x)
        if self.teach_first:
            learned = self.student(x)
        return learned, learned - target


class InOneForward(nn.Module):
    """Student and teacher share a convolution inside one forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn, self.teacher_bn = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        with torch.no_grad():
            target = self.teacher_bn(self.conv(x))
        return self.bn(self.conv(x)), target


TEACHERS = {
    'a copy': lambda student: copy.deepcopy(student).requires_grad_(False),
    'the student itself': lambda student: student,
    'shared layers': lambda student: nn.Sequential(
        *student[:3], *copy.deepcopy(student[3:]).requires_grad_(False)),
    'shared convolutions, BNs of its own': lambda student: nn.Sequential(
        *(copy.deepcopy(layer) if isinstance(layer, nn.BatchNorm2d) else layer
          for layer in student)),
    'shared BN in train mode': lambda student: nn.Sequential(
        student[0], nn.BatchNorm2d(8).double(), *student[2:]).train(),
}


@pytest.mark.parametrize('apart', [False, True])
@pytest.mark.parametrize('teach_first', [False, True])
@pytest.mark.parametrize('build_teacher', TEACHERS.values(), ids=TEACHERS)
def test_teacher_under_no_grad(build_teacher, teach_first, apart, x):
    """Turned on as one model, or the two apart."""
    model = Distiller(build_teacher, teach_first)
    stock = stock_copy(model)
    for part in (model.student, model.teacher) if apart else (model, ):
        turn_on(part)
    for _ in range(2):
        assert_equal_steps(step(stock, x), step(model, x))
    assert model.student[4].training or 'fused' in runs(model.student)


def test_teacher_in_the_forward_of_the_student(x):
    torch.manual_seed(0)
    model = randomize(InOneForward()).double().eval()
    stock = stock_copy(model)
    turn_on(model)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused'] * 2


# --------------------------------------------------------------------------
# Function transforms and higher derivatives
# --------------------------------------------------------------------------


def detached(model):
    return {k: v.detach() for k, v in model.named_parameters()}


def loss_of(model, parameters, x):
    return functional_call(model, parameters, (x, )).square().mean()


def by_backward(model, x):
    parameters = {k: v.clone().requires_grad_()
                  for k, v in detached(model).items()}
    loss_of(model, parameters, x).backward()
    return {k: v.grad for k, v in parameters.items()}


def of_each_sample(model, x):
    gradient = torch.func.grad(lambda p, x: loss_of(model, p, x[None]))
    return torch.func.vmap(gradient, (None, 0))(detached(model), x)


def ensemble(model, x):
    models = [model, copy.deepcopy(model)]
    with torch.no_grad():
        models[1][0].weight.mul_(2)
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(model).to('meta')
    return torch.func.vmap(
        lambda p, b: functional_call(base, (p, b), (x, )))(
            parameters, {k: v for k, v in buffers.items()
                         if k in model.state_dict()})


def hessian(model, x):
    parameters = detached(model)

    def loss(weight):
        return loss_of(model, {**parameters, '4.weight': weight}, x)

    return torch.func.hessian(loss)(parameters['4.weight'])


TRANSFORMS = {
    'grad': lambda m, x: torch.func.grad(
        lambda p: loss_of(m, p, x))(detached(m)),
    'grad of each sample': of_each_sample,
    'an ensemble': ensemble,
    'hessian': hessian,
    'functional_call and backward': by_backward,
    'functional_call in Tune mode of half the state': lambda m, x:
        functional_call(m, {'0.weight': m[0].weight * 2,
                            '1.running_mean': m[1].running_mean + 1}, (x, )),
    'jacfwd': lambda m, x: torch.func.jacfwd(
        lambda p: loss_of(m, p, x))(detached(m)),
    'linearize': lambda m, x: torch.func.linearize(m, x)[1](x.cos()),
}


@pytest.mark.parametrize('transform', TRANSFORMS.values(), ids=TRANSFORMS)
def test_function_transforms(transform, x):
    model = conv_bns()
    stock = stock_copy(model)
    turn_on(model)
    for _ in range(2):
        expected, actual = transform(stock, x), transform(model, x)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
        assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused'] * 2


def penalty_of_input(model, x):
    gradient, = torch.autograd.grad(
        model(x).square().sum(), x, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square()


def penalty_of_parameters(model, x):
    gradients = torch.autograd.grad(
        model(x).square().sum(), list(model.parameters()), create_graph=True)
    return [gradient.square().sum() for gradient in gradients]


def step_through_a_step(model, x):
    """The loss after a step of SGD, differentiated through that step."""
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(
        loss_of(model, parameters, x), list(parameters.values()),
        create_graph=True)
    return functional_call(
        model, {k: v - 0.1 * g
                for (k, v), g in zip(parameters.items(), gradients)}, (x, ))


PENALTIES = {
    'of the input': (penalty_of_input, []),
    'of the input, convolutions frozen': (penalty_of_input, ['0', '3']),
    'of the input, BNs frozen': (penalty_of_input, ['1', '4']),
    'of the input, all frozen': (penalty_of_input, ['']),
    'of the parameters': (penalty_of_parameters, []),
    'through a step': (step_through_a_step, []),
}


@pytest.mark.parametrize(
    'penalty, frozen', PENALTIES.values(), ids=PENALTIES)
def test_double_backward(penalty, frozen, x):
    model = conv_bns()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    stock = stock_copy(model)
    turn_on(model)
    assert_equal_steps(
        step(stock, x, penalty), step(model, x, penalty), 1e-9)
    assert runs(model) == ['fused'] * 2


# --------------------------------------------------------------------------
# requires_grad toggled in mid-run
# --------------------------------------------------------------------------


def test_requires_grad_toggled_in_mid_run(x):
    phases = [
        ['1.weight', '1.bias', '4.weight', '4.bias'],
        ['0.weight', '1.weight', '4.bias'],
        ['3.bias'],
        [],
        list(dict(conv_bns().named_parameters())),
        ['0.weight'],
    ]
    model = conv_bns()
    stock = stock_copy(model)
    turn_on(model)
    optimizers = [optimizer_of(m) for m in (stock, model)]
    for learns in phases:
        for one in (stock, model):
            for name, parameter in one.named_parameters():
                parameter.requires_grad_(name in learns)
        for _ in range(2):
            assert_equal_steps(step(stock, x), step(model, x))
            for optimizer in optimizers:
                optimizer.step()
        assert runs(model) == ['fused'] * 2
    for one, other in zip(stock.parameters(), model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_hooks_of_tensors_fire(x):
    """An optimizer in the backward, as for large models."""

    def train(model):
        seen = []

        def update(parameter):
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad
            seen.append(parameter.shape)
            parameter.grad = None

        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * 2)
            parameter.register_post_accumulate_grad_hook(update)
        for _ in range(3):
            model(x).square().mean().backward()
        return len(seen), list(model.parameters())

    model = conv_bns()
    stock = stock_copy(model)
    turn_on(model)
    torch.testing.assert_close(
        train(model), train(stock), rtol=1e-10, atol=1e-12)
    assert runs(model) == ['fused'] * 2
