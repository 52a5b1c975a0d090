"""The derivation in docs/en/deploy.md, by numbers."""
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmtune import turn_on
from mmtune.analysis import (
    best_lr,
    block_scales,
    diagnose,
    lr_limit,
    quantiles,
    shares,
    step_ratios,
)
from mmtune.functional.fold import fold, norm_coefficients
from tests.oracle import randomize


def two_blocks(bias=False):
    """Two blocks in eval mode whose scales lie between 0.3 and 3."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=bias), nn.BatchNorm2d(4)).double()
    randomize(model)
    with torch.no_grad():
        for norm in (model[1], model[4]):
            signs = torch.ones(norm.num_features).double()
            signs[::3] = -1
            norm.weight.copy_(
                signs * torch.logspace(-.5, .5, norm.num_features).double()
                * norm.running_var.sqrt())
            norm.weight.requires_grad_(False)
    return model.eval()


def coefficients(model):
    """gamma / sqrt(var + eps) of the convolutions 0 and 3, with its sign."""
    return {
        i: (model[i + 1].weight
            / (model[i + 1].running_var + model[i + 1].eps).sqrt()).detach()
        for i in (0, 3)
    }


def folded(model):
    """w' and b' of both blocks, from a model in Deploy mode or not."""
    tensors = []
    for i in (0, 3):
        conv, norm = model[i], model[i + 1]
        if not isinstance(norm, _BatchNorm):
            tensors += [conv.weight, conv.bias]
            continue
        tensors += fold(
            conv.weight, conv.bias, norm.weight, norm.bias,
            *norm_coefficients(norm.running_mean, norm.running_var, norm.eps),
            (-1, 1, 1, 1))
    return [tensor.detach().clone() for tensor in tensors]


def train(model, make_optimizer, steps=60, after_step=None):
    """The folded weights after each step on fixed random data."""
    optimizer = make_optimizer(model)
    generator = torch.Generator().manual_seed(1)
    path = []
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator).double()
        target = torch.randn(4, 4, 4, 4, generator=generator).double()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        if after_step is not None:
            after_step(before)
        path.append(folded(model))
    return path


def sgd(momentum=0., nesterov=False, weight_decay=0., lr=.01):
    """SGD that decays convolutions' weights alone."""

    def make(model):
        weights = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        return torch.optim.SGD(
            [dict(params=weights, weight_decay=weight_decay),
             dict(params=others)],
            lr=lr,
            momentum=momentum,
            nesterov=nesterov)

    return make


def deploy(model, weight_factor=None, bias_factor=None):
    """A copy in Deploy mode whose gradients are multiplied per channel."""
    copied = copy.deepcopy(model)
    turn_on(copied, 'Deploy')
    for i, coeff in coefficients(model).items():
        for parameter, factor in ((copied[i].weight, weight_factor),
                                  (copied[i].bias, bias_factor)):
            if factor is not None:
                by = factor(coeff).view(-1, *[1] * (parameter.dim() - 1))
                parameter.register_hook(lambda grad, by=by: grad * by)
    return copied


def distance(path, other):
    """The largest relative difference of two paths' last tensors."""
    return max(
        ((a - b).norm() / b.norm()).item()
        for a, b in zip(path[-1], other[-1]))


OPTIONS = [
    dict(),
    dict(momentum=.9),
    dict(momentum=.9, nesterov=True),
    dict(weight_decay=.1),
    dict(momentum=.9, weight_decay=.1),
]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_deploy_with_its_gradient_scaled_follows_tune(options):
    model = two_blocks()
    tuned = copy.deepcopy(model)
    turn_on(tuned, 'Tune')
    expected = train(tuned, sgd(**options))
    scaled = train(deploy(model, lambda k: k**2), sgd(**options))
    for step, tensors in zip(scaled, expected):
        torch.testing.assert_close(step, tensors, rtol=1e-9, atol=1e-12)
    # Else anything would do.
    assert distance(train(deploy(model), sgd(**options)), expected) > .01
    assert distance(
        train(deploy(model, lambda k: k.abs()), sgd(**options)),
        expected) > .01


@pytest.mark.parametrize('beta_learns, factor', [
    (True, lambda k: 1 + k**2),
    (False, lambda k: k**2),
])
def test_the_bias_of_a_convolution_with_one(beta_learns, factor):
    model = two_blocks(bias=True)
    for norm in (model[1], model[4]):
        norm.bias.requires_grad_(beta_learns)
    tuned = copy.deepcopy(model)
    turn_on(tuned, 'Tune')
    expected = train(tuned, sgd(momentum=.9))
    followed = train(
        deploy(model, lambda k: k**2, factor), sgd(momentum=.9))
    assert distance(followed, expected) < 1e-9
    other = train(deploy(model, lambda k: k**2), sgd(momentum=.9))
    assert distance(other, expected) > .01


def test_weight_decay_of_biases_is_not_the_same():
    """beta decays to zero in Tune, b' does in Deploy."""
    def decay_all(model):
        return torch.optim.SGD(model.parameters(), lr=.01, weight_decay=.1)

    model = two_blocks()
    expected = train(copy.deepcopy(model), decay_all)
    scaled = train(deploy(model, lambda k: k**2), decay_all)
    assert distance(scaled, expected) > 1e-3


@pytest.mark.parametrize('decay', [0., .1])
def test_adam_follows_with_its_learning_rate_scaled(decay):
    lr = .01

    def adam(model):
        weights = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        # eps would count where gradients are small.
        return torch.optim.AdamW(
            [dict(params=weights, weight_decay=decay),
             dict(params=others, weight_decay=0.)],
            lr=lr,
            eps=1e-30)

    model = two_blocks()
    expected = train(copy.deepcopy(model), adam)
    deployed = deploy(model)
    coeffs = coefficients(model)

    @torch.no_grad()
    def scale_step(before):
        names = [name for name, _ in deployed.named_parameters()]
        for i, coeff in coeffs.items():
            # The decay of AdamW is no part of what is scaled.
            old = before[names.index(f'{i}.weight')] * (1 - lr * decay)
            weight = deployed[i].weight
            weight.copy_(old + (weight - old) * coeff.abs().view(-1, 1, 1, 1))

    followed = train(deployed, adam, after_step=scale_step)
    assert distance(followed, expected) < 1e-9
    # To scale the gradient does nothing at all.
    plain = train(deploy(model), adam)
    assert distance(train(deploy(model, lambda k: k**2), adam), plain) < 1e-9
    assert distance(plain, expected) > .01


@pytest.mark.parametrize('name, optimizer', [
    ('SGD', sgd(lr=.1)),
    ('Adam', lambda m: torch.optim.Adam(m.parameters(), lr=.1, eps=1e-30)),
])
def test_step_ratios_are_those_of_the_first_step(name, optimizer):
    model = two_blocks()
    start = folded(model)
    steps = {}
    for mode, copied in (('Tune', copy.deepcopy(model)),
                         ('Deploy', deploy(model))):
        after, = train(copied, optimizer, steps=1)
        steps[mode] = [a - b for a, b in zip(after, start)]
    for place, coeff in zip((0, 2), coefficients(model).values()):
        found = (steps['Deploy'][place].flatten(1).norm(dim=1)
                 / steps['Tune'][place].flatten(1).norm(dim=1))
        torch.testing.assert_close(
            found, step_ratios(coeff, name), rtol=1e-9, atol=0)
    for place in (1, 3):
        torch.testing.assert_close(steps['Deploy'][place],
                                   steps['Tune'][place])


def test_what_learning_gamma_adds_to_the_step():
    """``coeff^2 G + rstd^2 u <u, G>`` with u = (w, b - mean), to first order
    in the learning rate; so Tune steps farther, never less far."""
    model = two_blocks()
    for norm in (model[1], model[4]):
        norm.weight.requires_grad_(True)
    lr = 1e-7
    start = folded(model)
    after, = train(copy.deepcopy(model), sgd(lr=lr), steps=1)
    deployed, = train(deploy(model), sgd(lr=lr), steps=1)
    gradients = [(a - b) / lr for a, b in zip(start, deployed)]
    steps = [(a - b) / lr for a, b in zip(start, after)]
    for place, (i, coeff) in zip((0, 2), coefficients(model).items()):
        conv, norm = model[i], model[i + 1]
        w = conv.weight.detach()
        rstd = (norm.running_var + norm.eps).rsqrt()
        grad_w, grad_b = gradients[place:place + 2]
        dot = (w * grad_w).sum((1, 2, 3)) - norm.running_mean * grad_b
        column = (-1, 1, 1, 1)
        expected_w = (coeff**2).view(column) * grad_w + (
            rstd**2 * dot).view(column) * w
        expected_b = grad_b - rstd**2 * dot * norm.running_mean
        torch.testing.assert_close(
            steps[place], expected_w, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(
            steps[place + 1], expected_b, rtol=1e-4, atol=1e-7)
        # What it adds points along the gradient.
        along = (steps[place] * grad_w).sum() + (
            steps[place + 1] * grad_b).sum()
        fixed = ((coeff**2).view(column) * grad_w**2).sum() + (
            grad_b**2).sum()
        assert along > fixed


@pytest.mark.parametrize('factor', [1., 10.])
@pytest.mark.parametrize('size_of_scales', [1., 100.])
@pytest.mark.parametrize('seed', range(5))
def test_up_to_the_limit_deploy_is_stable_where_tune_is(
        seed, size_of_scales, factor):
    """Near a minimum with any curvature, with gamma fixed or learning."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).double()

    channels, size, others = 5, 3, 4
    coeff = size_of_scales * normal(channels)
    rstd, u = normal(channels), normal(channels, size)
    half = normal(channels * size + others, channels * size + others)
    curvature = half @ half.T
    for gamma_learns in (False, True):
        # What multiplies the gradient of the folded weights in Tune's step.
        blocks = [
            k**2 * torch.eye(size).double()
            + gamma_learns * r**2 * torch.outer(v, v)
            for k, r, v in zip(coeff, rstd, u)
        ]
        tune = torch.block_diag(*blocks, torch.eye(others).double())
        root = torch.linalg.cholesky(tune)
        # Gradient descent is stable up to 2 / this.
        sharpest_tune = torch.linalg.eigvalsh(root.T @ curvature @ root)[-1]
        sharpest_deploy = torch.linalg.eigvalsh(curvature)[-1]
        limit = lr_limit(coeff, factor)
        assert limit * sharpest_deploy <= factor * sharpest_tune * (1 + 1e-9)


def test_deploy_diverges_at_tunes_learning_rate_and_not_at_the_limit():
    """The paper's Mechanism 1: large inputs, so a large variance, so small
    scales; without them the weights are steep to learn."""
    torch.manual_seed(0)
    x = 10 * torch.randn(64, 2, 1, 1).double()
    target = torch.randn(64, 3, 1, 1).double()
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)).double().eval()
    model[1].running_var.fill_(100)
    model[1].weight.requires_grad_(False)
    scales, = scales_of(model)

    def last_loss(mode, lr):
        copied = copy.deepcopy(model)
        turn_on(copied, mode)
        optimizer = torch.optim.SGD(copied.parameters(), lr=lr)
        for _ in range(100):
            optimizer.zero_grad()
            loss = (copied(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    limit = lr_limit(scales.coeff, 1.)
    assert limit == pytest.approx(.01, rel=1e-6)
    start = last_loss('Tune', 0.)
    assert last_loss('Tune', .5) < start
    assert not last_loss('Deploy', .5) < 1e6
    assert last_loss('Deploy', .5 * limit) < start


COEFF = torch.tensor([1e-3, .1, .2, .5, 1, 2, 3, 4, 5, 30],
                     dtype=torch.float64)


def test_step_ratios():
    coeff = torch.tensor([-.1, 0., 2.]).double()
    expected = torch.tensor([100., math.inf, .25]).double()
    torch.testing.assert_close(step_ratios(coeff), expected)
    expected = torch.tensor([10., math.inf, .5]).double()
    torch.testing.assert_close(step_ratios(coeff, 'Adam'), expected)


def test_shares():
    # The ratios are 1e6, 100, 25, 4, 1, 1/4, 1/9, 1/16, 1/25, 1/900.
    assert shares(COEFF, 10.) == pytest.approx((.3, .4, .3))
    assert shares(COEFF, 5.) == pytest.approx((.4, .3, .3))
    assert shares(COEFF, 10., lr=3.) == pytest.approx((.1, .5, .4))
    assert shares(COEFF, 10., 'Adam') == pytest.approx((.1, .8, .1))


@pytest.mark.parametrize('optimizer', ['SGD', 'Adam'])
@pytest.mark.parametrize('factor', [1., 2., 10.])
@pytest.mark.parametrize('share', [1., .9, .75, .5])
def test_up_to_the_limit_as_many_channels_obey(optimizer, factor, share):
    limit = lr_limit(COEFF, factor, optimizer, share)
    inside, outside = (
        shares(COEFF, factor, optimizer, limit * by).faster
        for by in (1 - 1e-9, 1 + 1e-9))
    assert inside <= 1 - share + 1e-9
    # Beyond it, one too many; or else what has no scale steps too far.
    assert outside > 1 - share + 1e-9 or limit == factor


@pytest.mark.parametrize('tenths', range(1, 10))
def test_rounding_exempts_no_channel_less(tenths):
    for channels in range(1, 100):
        coeff = torch.arange(1, channels + 1).double() / channels
        limit = lr_limit(coeff, 1., 'Adam', 1 - tenths / 10)
        assert round(limit * channels) == 1 + channels * tenths // 10


def test_limit_of_large_scales():
    """What has no scale would step too far."""
    assert lr_limit(torch.tensor([2., 3.]), 10.) == 10


def test_limit_of_a_channel_without_scale():
    coeff = torch.tensor([0., 1., 1., 1.]).double()
    assert lr_limit(coeff, 10.) == 0
    assert lr_limit(coeff, 10., share=.75) == 10


@pytest.mark.parametrize('optimizer', ['SGD', 'Adam'])
@pytest.mark.parametrize('factor', [1., 1.5, 3., 10., 100.])
@pytest.mark.parametrize('seed', range(5))
def test_no_learning_rate_is_better_than_the_best(seed, factor, optimizer):
    generator = torch.Generator().manual_seed(seed)
    coeff = torch.randn(50, generator=generator).double().mul(2).exp()
    coeff[seed] = 0
    lr, share = best_lr(coeff, factor, optimizer)
    assert 1 / factor <= lr * (1 + 1e-9) and lr <= factor * (1 + 1e-9)
    wide = factor * (1 + 1e-8)
    assert shares(coeff, wide, optimizer, lr).within == pytest.approx(share)
    for other in torch.logspace(-math.log10(factor), math.log10(factor), 500):
        found = shares(coeff, factor, optimizer, other.item()).within
        assert found <= share + 1e-9


@pytest.mark.parametrize('coeff, factor, lr', [
    ([.5], 10, .5),  # [1 / 40, 2.5] would do, but 1/10 is the least
    ([1], 10, 1),
    ([.1, .2], 1.5, 2 / 3),  # out of reach: as good as any other
    ([.1, .1, 2], 10, .1),
])
def test_best_learning_rate_is_in_the_middle(coeff, factor, lr):
    coeff = torch.tensor(coeff, dtype=torch.float64)
    assert best_lr(coeff, factor)[0] == pytest.approx(lr)


@pytest.mark.parametrize('factor', [1.1, 1.3, 2., 3., 7., 10., 11.])
def test_rounding_leaves_no_channel_outside(factor):
    for scale in (factor, 1 / factor):
        coeff = torch.tensor([scale], dtype=torch.float64)
        lr, share = best_lr(coeff, factor)
        assert share == 1 and lr == pytest.approx(scale)


def test_all_scales_zero():
    found = diagnose(torch.zeros(3).double(), 10.)
    assert found['zeros'] == 3 and found['best']['share'] == 0
    assert {row['lr'] for row in found['limits']} == {0.}
    assert found['at_same_lr'] == dict(slower=0., within=0., faster=1.)


def test_quantiles_are_scales_that_occur():
    assert quantiles(torch.arange(201.).flip(0)) == {
        'min': 0, '1%': 2, 'median': 100, '99%': 198, 'max': 200
    }
    assert set(quantiles(torch.tensor([3.])).values()) == {3}


def test_diagnosis():
    found = diagnose(COEFF, 10.)
    assert found['channels'] == 10 and found['zeros'] == 0
    assert found['coeff'] == quantiles(COEFF)
    assert found['at_same_lr'] == shares(COEFF, 10.)._asdict()
    assert [row['share'] for row in found['limits']] == [1, .999, .99, .9, .5]
    assert found['limits'][0]['lr'] == pytest.approx(1e-5)
    assert found['limits'][3]['lr'] == pytest.approx(.1)
    assert tuple(found['best'].values()) == best_lr(COEFF, 10.)[::-1]


@pytest.mark.parametrize('call', [
    lambda: shares(COEFF, .5),
    lambda: lr_limit(COEFF, float('nan')),
    lambda: best_lr(COEFF, 0.),
    lambda: diagnose(COEFF, -2.),
])
def test_factors_below_one_are_refused(call):
    with pytest.raises(ValueError, match='`factor` must be at least 1, but'):
        call()


@pytest.mark.parametrize('call', [step_ratios, lambda *a: lr_limit(
    COEFF, 2., 'Lion'), lambda *a: best_lr(COEFF, 2., 'Lion')])
def test_unknown_optimizers_are_refused(call):
    with pytest.raises(ValueError, match="one of SGD, Adam, but got 'Lion'"):
        call(COEFF, 'Lion')


def scales_of(model, mode='Deploy', **options):
    return block_scales(model, turn_on(copy.deepcopy(model), mode, **options))


def test_scales_of_blocks():
    model = two_blocks()
    model[1].weight.requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = scales_of(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert (first.conv, first.bn) == ('0', '1')
    assert (second.conv, second.bn) == ('3', '4')
    for scale, coeff in zip((first, second), coefficients(model).values()):
        assert (coeff < 0).any()
        torch.testing.assert_close(scale.coeff, coeff.abs())
        assert scale.reason == ''
    assert first.gamma_learns and not second.gamma_learns


def test_eps_counts():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=.25, affine=False))
    model[1].running_var.zero_()
    scale, = scales_of(model)
    assert scale.coeff.tolist() == [2.] * 4
    assert not scale.gamma_learns


def test_half_precision_statistics_keep_small_variances():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].running_var.fill_(1e-3)
    scale, = scales_of(model.half())
    expected = (model[1].running_var.double() + 1e-5).rsqrt()
    torch.testing.assert_close(scale.coeff, expected)


def test_blocks_that_deploy_leaves_out_are_not_there():
    model = two_blocks()
    model[0].register_forward_hook(lambda *_: None)
    scale, = scales_of(model)
    assert scale.bn == '4'
    assert [s.bn for s in scales_of(model, 'Tune')] == ['1', '4']


def freeze(conv, norm):
    conv.weight.requires_grad_(False)


def break_variance(conv, norm):
    norm.running_var[1] = -1


def never_train(conv, norm):
    norm.running_mean.zero_()
    norm.running_var.fill_(1)


@pytest.mark.parametrize('change, reason', [
    (freeze, 'its weight does not learn'),
    (break_variance, 'its scales are not finite'),
    (never_train, 'its statistics are those of a new BatchNorm'),
])
def test_why_scales_do_not_count(change, reason):
    model = two_blocks()
    change(model[0], model[1])
    first, second = scales_of(model)
    assert first.reason == reason
    assert second.reason == ''


def test_folded_models_are_refused():
    model = two_blocks()
    report = turn_on(model, 'Deploy')
    with pytest.raises(ValueError, match='is folded into'):
        block_scales(model, report)
