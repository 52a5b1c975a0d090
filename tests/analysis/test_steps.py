"""What a step computes, and what it takes."""
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from mmtune.analysis import steps
from mmtune.analysis.modes import put_in_mode
from mmtune.analysis.steps import Step, difference
from mmtune.analysis.workloads import Workload, image_workload
from tests.toy import conv_bns

MIB = 2**20


class Scale(nn.Module):
    """exp(weight * x), of a mebibyte each."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1, 512, 512), .5))

    def forward(self, x):
        return (self.weight * x).exp()


class Updater:
    """Backward and a step, of any optimizer."""

    def __init__(self, model, optimizer):
        self.optimizer = optimizer(model.parameters(), lr=1.)

    def update_params(self, loss):
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def momentum(parameters, lr):
    return torch.optim.SGD(parameters, lr, momentum=.9)


def scale_step(optimizer=momentum, grad_to='params'):
    images = torch.full((1, 1, 512, 512), 2.)
    workload = Workload(images, lambda model, x: model(x).sum(),
                        lambda model: Updater(model, optimizer))
    return Step(Scale(), workload, grad_to)


def net_step(grad_to='params', amp=False, mode='Eval', batch_size=2):
    model = conv_bns(torch.float32)
    put_in_mode(model, mode)
    return Step(model, image_workload((16, 16), batch_size), grad_to, amp)


@pytest.mark.parametrize('optimizer, state', [
    (torch.optim.SGD, 0),
    (momentum, MIB),
    # Adam counts its steps in a tensor of one float.
    (torch.optim.Adam, 2 * MIB + 4),
])
def test_memory_by_hand(optimizer, state):
    memory = scale_step(optimizer).memory()
    # The images, for the weight's gradient; and what exp gave.
    assert memory.kept == 2 * MIB
    # The weight, the images, and what the optimizer keeps.
    assert memory.resident == 2 * MIB + state
    assert memory.total == memory.resident + memory.peak
    # The product and its exponential; then this, its gradient, and that of
    # the product. The steps of optimizers have buffers of their own.
    assert 2 * MIB <= memory.peak <= 3 * MIB + 64


def test_memory_by_hand_where_the_input_learns():
    memory = scale_step(grad_to='input').memory()
    assert memory.kept == MIB
    assert memory.resident == 2 * MIB
    assert 2 * MIB <= memory.peak <= 3 * MIB + 64


@pytest.mark.parametrize('optimizer', [
    torch.optim.SGD, momentum, torch.optim.AdamW
])
def test_steps_are_alike(optimizer):
    step = scale_step(optimizer)
    before = step.model.weight.detach().clone()
    found = [step.memory()]
    step.run()
    found.append(step.memory())
    assert found[0] == found[1]
    assert torch.equal(step.model.weight, before)
    assert step.model.weight.grad is None


def test_the_optimizer_has_its_state_from_the_start():
    step = scale_step()
    assert step.memory().resident == 3 * MIB


def test_what_is_frozen_has_no_state():
    model = conv_bns(torch.float32)
    model[0].requires_grad_(False)
    step = Step(model, Workload(
        torch.ones(1, 3, 8, 8), lambda model, x: model(x).sum(),
        lambda model: Updater(model, momentum)))
    tensors = [*model.parameters(), *model.buffers(), torch.ones(1, 3, 8, 8),
               *(p for p in model.parameters() if p.requires_grad)]
    assert step.memory().resident == sum(t.nbytes for t in tensors)


def test_dropout_is_the_same_in_every_step():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Dropout(), nn.Linear(784, 5))
    step = Step(model, image_workload((16, 16), 2))
    losses = {step.gradients()[0] for _ in range(3)}
    assert len(losses) == 1


def test_gradients_by_hand():
    step = scale_step()
    loss, gradients = step.gradients()
    e = torch.tensor(1.).exp().item()
    assert loss == pytest.approx(512 * 512 * e)
    assert gradients.keys() == {'weight'}
    torch.testing.assert_close(gradients['weight'],
                               torch.full((1, 1, 512, 512), 2 * e))
    assert step.model.weight.grad is None


@pytest.mark.parametrize('size', [1e-5, 1., 1e4])
def test_gradients_in_float16_neither_vanish_nor_overflow(size):
    """As on a GPU; without a scaled loss those of 1e-5 would all be 0."""
    workload = image_workload((16, 16), 2)
    step = Step(
        conv_bns(torch.float32).eval(),
        replace(workload, loss=lambda *args: size * workload.loss(*args)))
    loss, exact = step.gradients()
    step.dtype = torch.float16
    half_loss, half = step.gradients()
    assert half_loss == pytest.approx(loss, rel=.01)
    assert difference(half, exact) < .01
    assert all(leaf.grad is None for leaf in step.leaves.values())


def test_gradients_that_are_infinite_stay_so():
    images = torch.ones(1, 1, 512, 512)
    step = Step(Scale(), Workload(images, lambda model, x: model(
        x * torch.inf).sum(), lambda model: Updater(model, momentum)))
    step.dtype = torch.float16
    loss, gradients = step.gradients()
    assert loss == torch.inf
    assert not gradients['weight'].isfinite().any()


def test_gradients_of_the_input_by_hand():
    step = scale_step(grad_to='input')
    _, gradients = step.gradients()
    expected = torch.full((1, 1, 512, 512), .5 * torch.tensor(1.).exp())
    torch.testing.assert_close(gradients, dict(images=expected))
    assert not step.model.weight.requires_grad


def test_steps_on_the_input_are_alike():
    step = net_step('input')
    first = step.gradients()
    step.run()
    again = step.gradients()
    assert first[0] == again[0]
    assert difference(again[1], first[1]) == 0


@pytest.mark.parametrize('grad_to', ['params', 'input'])
def test_tune_keeps_less_and_learns_the_same(grad_to):
    stock, tuned = net_step(grad_to), net_step(grad_to, mode='Tune')
    assert tuned.memory().kept < stock.memory().kept
    (loss, gradients), (expected, stock_gradients) = (
        tuned.gradients(), stock.gradients())
    assert loss == pytest.approx(expected)
    assert 0 < difference(gradients, stock_gradients) < 1e-4


def test_autocast_keeps_halves():
    step, full = net_step(amp=True), net_step()
    assert step.dtype == torch.bfloat16 and full.dtype is None
    # The mean of the squares is taken in float32, and the images are given in
    # it; the maps are as large as they would be as float16.
    assert .5 < step.memory().kept / full.memory().kept < .8
    loss, gradients = step.gradients()
    assert gradients['0.weight'].dtype == torch.float32
    expected, stock = full.gradients()
    assert loss == pytest.approx(expected, rel=.02)
    assert 1e-6 < difference(gradients, stock) < .1


@pytest.mark.parametrize('amp', [False, True])
def test_products_without_kernels_of_bfloat16(amp, monkeypatch):
    """They are computed in float32, but take and give what they would."""

    class Net(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.linear = nn.Linear(8, 4)
            self.last = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            x = self.conv(x).relu().mean(dim=(2, 3))
            return self.last(self.linear(x))

    def measure(has_kernels):
        monkeypatch.setattr(steps, 'has_bfloat16_kernels',
                            lambda: has_kernels)
        torch.manual_seed(0)
        step = Step(Net(), image_workload((32, 32), 2), amp=amp)
        return step.memory(), step.gradients()

    memory, (loss, gradients) = measure(False)
    expected_memory, (expected, stock) = measure(True)
    assert memory == expected_memory
    assert loss == pytest.approx(expected, rel=1e-3)
    assert {name: g.dtype for name, g in gradients.items()} == {
        name: g.dtype for name, g in stock.items()
    }
    assert difference(gradients, stock) < (1e-2 if amp else 1e-6)


class Align(nn.Module):
    """A kernel of MMCV, on what a convolution gives."""

    def __init__(self):
        from mmcv.ops import RoIAlign
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.align = RoIAlign(3)
        self.dtypes = []

    def forward(self, x):
        rois = torch.tensor([[0, 1., 1., 9., 9.]])
        maps = self.conv(x)
        found = self.align(maps, rois.to(maps.dtype))
        self.dtypes.append(found.dtype)
        return found


def test_kernels_of_mmcv_take_bfloat16():
    import mmcv._ext as extension
    kernels = dict(vars(extension))
    step = Step(Align(), image_workload((16, 16), 1), amp=True)
    full = Step(Align(), image_workload((16, 16), 1))
    loss, gradients = step.gradients()
    expected, stock = full.gradients()
    assert step.model.dtypes == [torch.bfloat16]
    assert loss == pytest.approx(expected, rel=.02)
    assert difference(gradients, stock) < .05
    assert vars(extension) == kernels


def test_what_bfloat16_kernels_compute_on_is_not_counted():

    def peak(amp):
        step = Step(Align(), image_workload((64, 64), 4), amp=amp)
        return step.memory().peak

    assert peak(True) < peak(False)


@pytest.mark.parametrize('grad_to, frozen, message', [
    ('inputs', False, "one of params, input, but got 'inputs'"),
    ('params', True, "no parameter.*use grad_to='input'"),
])
def test_steps_that_cannot_be_taken(grad_to, frozen, message):
    model = conv_bns(torch.float32).requires_grad_(not frozen)
    with pytest.raises(ValueError, match=message):
        Step(model, image_workload((16, 16), 2), grad_to)


A = dict(a=torch.tensor([3., 0.]), b=torch.tensor([[4.]]))


@pytest.mark.parametrize('found, expected', [
    (A, 0),
    (tree_map(lambda t: 2 * t, A), 1),
    (dict(A, a=torch.tensor([3., 1.])), .2),
    (dict(A, b=torch.tensor([[4.]], dtype=torch.float16)), 0),
])
def test_difference(found, expected):
    assert difference(found, A) == pytest.approx(expected)


@pytest.mark.parametrize('found, stock, message', [
    (dict(a=A['a']), A, 'only one side has b; compare'),
    (A, dict(a=A['a']), 'only one side has b; compare'),
    (A, tree_map(torch.zeros_like, A), '0 everywhere'),
])
def test_what_cannot_be_compared(found, stock, message):
    with pytest.raises(ValueError, match=message):
        difference(found, stock)
