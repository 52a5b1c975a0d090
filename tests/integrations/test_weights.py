"""Weights that are made from others, or only later, against stock."""
import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from mmtune import turn_off, turn_on
from tests.oracle import assert_equal_steps, randomize, runs, step
from tests.toy import conv_bns


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def assert_same(stock, model, x):
    for _ in range(2):
        assert_equal_steps(step(stock, x), step(model, x))



class Halved(nn.Module):
    """A parametrization of a user's."""

    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return weight * 2


MADE = {
    'weight_norm': parametrizations.weight_norm,
    'spectral_norm': parametrizations.spectral_norm,
    'orthogonal': parametrizations.orthogonal,
    'of the user': lambda conv: parametrize.register_parametrization(
        conv, 'weight', Halved()),
    'two of them': lambda conv: parametrize.register_parametrization(
        parametrizations.weight_norm(conv), 'weight', Halved()),
    'old weight_norm': nn.utils.weight_norm,
    'old spectral_norm': nn.utils.spectral_norm,
    'pruned': lambda conv: prune.l1_unstructured(conv, 'weight', 0.5),
    'pruned by channels': lambda conv: prune.ln_structured(
        conv, 'weight', 0.25, n=2, dim=0),
    'pruned twice': lambda conv: prune.l1_unstructured(
        prune.l1_unstructured(conv, 'weight', 0.5), 'weight', 0.5),
}


def make(model, wrap):
    """Wrap every convolution; some ways to do so draw numbers."""
    torch.manual_seed(5)
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            wrap(layer)
    return model


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('before', [False, True])
@pytest.mark.parametrize('wrap', MADE.values(), ids=MADE)
def test_made_weights(wrap, before, training, x):
    """With buffers: spectral_norm moves its own in train mode."""
    stock, model = conv_bns(), conv_bns()
    if not before:
        turn_on(model)
    for one in (stock, model):
        make(one, wrap)
        for layer in one:
            layer.train(training and isinstance(layer, nn.Conv2d))
    if before:
        turn_on(model)
    assert_same(stock, model, x)
    assert runs(model) == ['fused'] * 2


UNMADE = {
    'weight_norm': (parametrizations.weight_norm,
                    lambda conv: parametrize.remove_parametrizations(
                        conv, 'weight')),
    'old weight_norm': (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    'old spectral_norm': (nn.utils.spectral_norm,
                          nn.utils.remove_spectral_norm),
    'pruned': (lambda conv: prune.l1_unstructured(conv, 'weight', 0.5),
               lambda conv: prune.remove(conv, 'weight')),
}


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('turned_on', ['before', 'between'])
@pytest.mark.parametrize('wrap, unwrap', UNMADE.values(), ids=UNMADE)
def test_made_weights_made_permanent(wrap, unwrap, turned_on, x):
    stock, model = conv_bns(), conv_bns()
    if turned_on == 'before':
        turn_on(model)
    for one in (stock, model):
        make(one, wrap)
    if turned_on == 'between':
        turn_on(model)
    assert_same(stock, model, x)
    for one in (stock, model):
        make(one, unwrap)
    assert_same(stock, model, x)
    assert runs(model) == ['fused'] * 2
    turn_off(model)
    assert_same(stock, model, x)


def test_parametrizations_that_are_cached(x):
    stock, model = conv_bns(), conv_bns()
    for one in (stock, model):
        make(one, parametrizations.weight_norm)
    turn_on(model)
    with parametrize.cached():
        results = [step(one, x, lambda m, x: [m(x), m(x * 2)])
                   for one in (stock, model)]
    assert_equal_steps(*results)


# --------------------------------------------------------------------------
# Lazy modules
# --------------------------------------------------------------------------

LAZY = {
    'convolution': lambda: (nn.LazyConv2d(8, 3), nn.BatchNorm2d(8)),
    'BN': lambda: (nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d()),
    'both': lambda: (nn.LazyConv2d(8, 3, bias=False), nn.LazyBatchNorm2d()),
    'BN that is not affine': lambda: (
        nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d(affine=False)),
}


def both_initialized(layers, x):
    """Stock after its first forward, and Tune mode turned on before it."""
    models = []
    for tuned in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*layers(), nn.ReLU(), nn.Conv2d(8, 4, 1),
                              nn.BatchNorm2d(4)).double().eval()
        if tuned:
            turn_on(model)
        torch.manual_seed(1)
        model(x)
        models.append(randomize(model))
    return models


@pytest.mark.parametrize('layers', LAZY.values(), ids=LAZY)
def test_lazy_modules_turned_on_before_the_first_forward(layers, x):
    stock, model = both_initialized(layers, x)
    for one, other in zip(stock, model):
        assert isinstance(other, type(one))
        assert type(other).__name__ == type(one).__name__
    assert_same(stock, model, x)
    assert runs(model) == ['fused'] * 2
    other = copy.deepcopy(model)
    turn_off(model)
    assert [type(m) for m in model] == [type(m) for m in stock]
    for one in (model, other):
        assert_same(stock, one, x)


@pytest.mark.parametrize('layers', LAZY.values(), ids=LAZY)
def test_lazy_modules_loaded_instead_of_run(layers, x):
    """A state_dict initializes as well as a forward does."""
    stock, _ = both_initialized(layers, x)
    model = nn.Sequential(*layers(), nn.ReLU(), nn.Conv2d(8, 4, 1),
                          nn.BatchNorm2d(4)).double().eval()
    turn_on(model)
    model.load_state_dict(stock.state_dict())
    assert_same(stock, model, x)
    assert runs(model) == ['fused'] * 2
