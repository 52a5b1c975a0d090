"""Saved-tensor hooks of a model in Tune mode, beside those of others."""
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from mmtune import turn_on
from mmtune.behaviours import saved
from mmtune.behaviours.activation import activation_runs
from mmtune.behaviours.remade import spared
from mmtune.behaviours.saved import current_scope, observer
from tests.oracle import assert_equal_steps, step, stock_copy


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1)),
        nn.Mish(), nn.Conv2d(4, 2, 1)).double()


def image():
    return torch.randn(2, 3, 5, 5, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(1))


def top_hooks():
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def tensors_given(model, look=lambda function: function):
    """What hooks around a forward are given, as sizes and sums."""
    given = []

    def pack(tensor):
        given.append((tensor.shape, float(tensor.detach().sum())))
        return tensor

    with saved_tensors_hooks(look(pack), lambda tensor: tensor):
        output = model(image())
    output.sum().backward()
    return sorted(given)


def test_others_are_given_what_stock_gives():
    model = chain()
    stock = stock_copy(model)
    turn_on(model)
    assert tensors_given(model) == tensors_given(stock)
    assert set(activation_runs(model).values()) == {'stock'}


def test_stock_where_torch_does_not_tell_which_hooks_are_set(monkeypatch):
    monkeypatch.setattr(saved, '_top_hooks', None)
    model = chain()
    stock = stock_copy(model)
    turn_on(model)
    assert_equal_steps(step(stock, image()), step(model, image()))
    assert tensors_given(model, observer) == tensors_given(stock)
    assert set(activation_runs(model).values()) == {'stock'}


@pytest.mark.one_map
def test_observers_are_given_what_is_kept():
    model = chain()
    stock = stock_copy(model)
    turn_on(model)
    kept = {*tensors_given(model, observer)}
    assert len(kept) == len({*tensors_given(stock)}) - 2
    assert set(activation_runs(model).values()) == {'one map'}


class Fails(nn.Module):

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.one_map
@pytest.mark.parametrize('depth', [0, 1])
@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_no_hooks_are_left_after_an_error(error, depth):
    fails = Fails(error)
    model = nn.Sequential(chain(), fails)
    if depth:
        model[0].insert(1, fails)
    stock = stock_copy(model)
    for module in (fails, stock[1], stock[0][1]):
        module.error = None
    turn_on(model)
    fails.error = error
    for _ in range(2):
        with pytest.raises(error):
            model(image())
    fails.error = None
    assert_equal_steps(step(stock, image()), step(model, image()))
    assert top_hooks() is None
    assert current_scope() is None
    assert set(activation_runs(model).values()) == {'one map'}


class LeavesHooks(nn.Module):
    """Enters hooks in its forward, and leaves them there."""

    def forward(self, x):
        self.hooks = saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2)
        self.hooks.__enter__()
        return x


@pytest.mark.one_map
def test_hooks_that_a_forward_leaves_stay():
    model = nn.Sequential(chain(), LeavesHooks())
    turn_on(model)
    model(image())
    pack, _ = top_hooks()
    assert float(pack(torch.ones(1))) == 2
    model[1].hooks.__exit__()
    assert top_hooks() is None


@pytest.mark.one_map
def test_one_scope_for_modules_within_each_other():
    seen = []
    model = chain()
    turn_on(model)
    for module in model.modules():
        module.register_forward_pre_hook(
            lambda module, args: seen.append(current_scope()))
    model(image())
    assert len(seen) == 7
    assert seen[0] is not None
    assert all(scope is seen[0] for scope in seen)
    assert current_scope() is None


def test_a_graph_does_not_keep_the_model():
    model = chain()
    turn_on(model)
    output = model(image())
    outer = weakref.ref(model)
    del model
    gc.collect()
    assert outer() is None
    output.sum().backward()


@pytest.mark.one_map
def test_spared_counts_what_is_kept_less():
    model = chain()
    turn_on(model)
    before = spared()
    with torch.no_grad():
        model(image())
    assert spared() == before
    model(image())
    # Of two activations a map of 2 x 4 x 5 x 5 each.
    assert spared() - before == 2 * 200 * 8
