"""Layers that end in F.batch_norm or F.conv2d in their own way."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmtune import turn_off, turn_on
from mmtune.behaviours.deferred import DeferredConv
from mmtune.layers.calls import calls_batch_norm, convolves
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy


class BatchNormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: BatchNorm's forward, written out, and more."""

    def __init__(self, channels, act=None, drop=None):
        super().__init__(channels)
        self.drop = drop or nn.Identity()
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x):
        torch._assert(x.ndim == 4, f'expected 4D input (got {x.ndim}D input)')
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        use_batch = self.training or self.running_mean is None
        x = F.batch_norm(
            x, self.running_mean
            if not self.training or self.track_running_stats else None,
            self.running_var
            if not self.training or self.track_running_stats else None,
            self.weight, self.bias, use_batch, momentum, self.eps)
        return self.act(self.drop(x))


class Split(nn.BatchNorm2d):
    """As timm's SplitBatchNorm2d: something else in train mode only."""

    def forward(self, x):
        if self.training:
            first, second = x.split(1)
            return torch.cat((super().forward(first),
                              super().forward(second)))
        return super().forward(x)


class SyncAct(nn.SyncBatchNorm):
    """As timm's SyncBatchNormAct."""

    def forward(self, x):
        x = super().forward(x)
        if hasattr(self, 'act'):
            x = self.act(x)
        return x


class ABN(nn.Module):
    """As inplace_abn's ABN: no BatchNorm by its class."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-3
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer('running_mean', torch.full((channels, ), .3))
        self.register_buffer('running_var', torch.full((channels, ), .7))

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight,
                         self.bias, self.training, .1, self.eps)
        return F.leaky_relu(x, .1)


class Residual(nn.BatchNorm2d):
    """Reads its input after it is normalized."""

    def forward(self, x):
        return super().forward(x) + x.mean()


class Twice(nn.BatchNorm2d):

    def forward(self, x):
        return super().forward(x) * super().forward(x)


class Doubles(nn.BatchNorm2d):

    def forward(self, x):
        return super().forward(x * 2)


class OtherStatistics(nn.BatchNorm2d):

    def forward(self, x):
        return F.batch_norm(x, self.running_mean + 1, self.running_var,
                            self.weight, self.bias, False, 0, self.eps)


class OtherEps(nn.BatchNorm2d):

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var,
                            self.weight, self.bias, False, 0, 1e-3)


class OfTheBatch(nn.BatchNorm2d):
    """Whatever its mode."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var,
                            self.weight, self.bias, True, .1, self.eps)


class Counts(nn.BatchNorm2d):

    def __init__(self, channels):
        super().__init__(channels)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape)
        return super().forward(x).relu()


NORMS = {
    'as timm': BatchNormAct,
    'an activation that learns': lambda c: BatchNormAct(c, nn.PReLU(c)),
    'its own dropout': lambda c: BatchNormAct(c, drop=nn.Dropout2d()),
    'split in train mode': Split,
    'synchronized': SyncAct,
    'no BatchNorm by its class': ABN,
    'reads its input afterwards': Residual,
    'twice': Twice,
    'counts': Counts,
}
OTHER_NORMS = {
    'another input': Doubles,
    'other statistics': OtherStatistics,
    'another eps': OtherEps,
    'statistics of the batch': OfTheBatch,
}


class SameConv(nn.Conv2d):
    """As timm's Conv2dSame and efficientnet-pytorch's dynamic padding."""

    def forward(self, x):
        sides = []
        for size, kernel, stride, dilation in zip(
                x.shape[:1:-1], self.weight.shape[:1:-1], self.stride[::-1],
                self.dilation[::-1]):
            total = max((math.ceil(size / stride) - 1) * stride +
                        (kernel - 1) * dilation + 1 - size, 0)
            sides += [total // 2, total - total // 2]
        if any(sides):
            x = F.pad(x, sides)
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0),
                        self.dilation, self.groups)


class StaticSameConv(nn.Conv2d):
    """As efficientnet-pytorch's Conv2dStaticSamePadding."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.static_padding = nn.ZeroPad2d((0, 1, 1, 2))

    def forward(self, x):
        return F.conv2d(
            self.static_padding(x), self.weight, self.bias, self.stride,
            self.padding, self.dilation, self.groups)


class PaddedConv(StaticSameConv):
    """As transformers' Conv2dSamePadding."""

    def forward(self, x):
        return self._conv_forward(self.static_padding(x), self.weight,
                                  self.bias)


class WithNorm(nn.Conv2d):
    """As detectron2's Conv2d without a normalization."""
    norm = None

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding,
                     self.dilation, self.groups)
        return x if self.norm is None else self.norm(x)


class OneDimension(nn.Conv1d):

    def forward(self, x):
        return torch.conv1d(F.pad(x, (2, 0)), self.weight, bias=self.bias)


class Squares(nn.Conv2d):

    def forward(self, x):
        return F.conv2d(x, self.weight**2, self.bias)


class DoublesOutput(nn.Conv2d):

    def forward(self, x):
        return super().forward(x) * 2


class IgnoresBias(nn.Conv2d):

    def forward(self, x):
        return F.conv2d(x, self.weight)


class UsesWeightTwice(nn.Conv2d):

    def forward(self, x):
        return F.conv2d(F.conv2d(x, self.weight, self.bias), self.weight,
                        self.bias)


class CountsCalls(nn.Conv2d):
    count = 0

    def forward(self, x):
        self.count += 1
        return super().forward(x)


CONVS = {
    'same': lambda: SameConv(4, 6, 3, stride=2),
    'same, no bias': lambda: SameConv(4, 6, (5, 2), bias=False),
    'same, groups': lambda: SameConv(4, 6, 3, groups=2, dilation=2),
    'static': lambda: StaticSameConv(4, 6, 3, stride=2),
    'static, _conv_forward': lambda: PaddedConv(4, 6, 3),
    'with no norm of its own': lambda: WithNorm(4, 6, 3, padding=1),
    'one dimension': lambda: OneDimension(4, 6, 3),
}
OTHER_CONVS = {
    'another weight': lambda: Squares(4, 6, 3),
    'another output': lambda: DoublesOutput(4, 6, 3),
    'another bias': lambda: IgnoresBias(4, 6, 3),
    'twice': lambda: UsesWeightTwice(4, 4, 3),
    'changes an attribute': lambda: CountsCalls(4, 6, 3),
    'by its kernel alone': lambda: nn.utils.parametrizations.weight_norm(
        SameConv(4, 6, 3)),
}


class Block(nn.Module):

    def __init__(self, conv, norm):
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, x):
        return self.norm(self.conv(x))


def pair(conv=None, norm=None):
    torch.manual_seed(0)
    conv = conv or nn.Conv2d(4, 6, 3)
    if norm is None:
        norm = (nn.BatchNorm1d if conv.weight.dim() == 3 else nn.BatchNorm2d)(
            conv.out_channels)
    return randomize(Block(conv, norm)).double().eval()


def inputs(model, seed=1):
    torch.manual_seed(seed)
    return torch.randn(2, 4, *[8, 7][:model.conv.weight.dim() - 2]).double()


def assert_as_stock(model, expected):
    stock = stock_copy(model)
    turn_on(model)
    x = inputs(model)
    for _ in range(2):
        steps = []
        for one in (stock, model):
            torch.manual_seed(2)
            steps.append(step(one, x))
        assert_equal_steps(*steps)
    assert runs(model) == [expected]
    return stock


@pytest.mark.parametrize('build', NORMS.values(), ids=NORMS)
def test_norms_that_do_more(build):
    model = pair(norm=build(6))
    assert calls_batch_norm(model.norm)
    if hasattr(model.norm, 'drop'):
        model.norm.drop.train()
    stock = assert_as_stock(model, 'fused')
    x = inputs(model)
    for one in (model, stock):
        one.train()
    torch.manual_seed(4)
    expected = step(stock, x)
    torch.manual_seed(4)
    assert_equal_steps(expected, step(model, x))
    assert runs(model) == ['train mode']
    turn_off(model)
    assert_equal_steps(step(stock.eval(), x), step(model.eval(), x))


@pytest.mark.parametrize('build', OTHER_NORMS.values(), ids=OTHER_NORMS)
def test_norms_that_do_something_else_first(build):
    model = pair(norm=build(6))
    stock = stock_copy(model)
    assert not calls_batch_norm(model.norm)
    with pytest.raises(ValueError, match=type(model.norm).__name__):
        turn_on(model)
    x = inputs(model)
    assert_equal_steps(step(stock, x), step(model, x))


def test_finding_a_norm_changes_nothing():
    model = pair(norm=Counts(6))
    turn_on(model)
    assert model.norm.seen == []
    model(inputs(model))
    assert len(model.norm.seen) == 1


def test_the_norm_of_a_flag_that_changes():
    """What was found once is not believed at the next call."""

    class Flagged(nn.BatchNorm2d):
        doubles = False

        def forward(self, x):
            return super().forward(x * 2 if self.doubles else x)

    model = pair(norm=Flagged(6))
    stock = assert_as_stock(model, 'fused')
    model.norm.doubles = stock.norm.doubles = True
    x = inputs(model)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['stock']


@pytest.mark.parametrize('hooked', ['norm', 'norm before', 'conv', 'act'])
def test_hooks(hooked):
    """They see what they would see of the stock modules."""
    models = pair(norm=BatchNormAct(6)), pair(norm=BatchNormAct(6))
    seen = [], []
    for model, values in zip(models, seen):
        if hooked == 'norm before':
            model.norm.register_forward_pre_hook(
                lambda _, args, values=values: values.append(args[0].sum()))
        else:
            part = model.norm.act if hooked == 'act' else getattr(
                model, hooked)
            part.register_forward_hook(
                lambda _, args, y, values=values: values.append(
                    args[0].sum() + y.sum()))
    turn_on(models[1])
    x = inputs(models[0])
    assert_equal_steps(step(models[0], x), step(models[1], x))
    torch.testing.assert_close(*seen)
    assert runs(models[1]) == ['fused' if hooked == 'act' else 'stock']


@pytest.mark.parametrize('reentrant', [True, False])
def test_norms_that_do_more_in_a_checkpoint(reentrant):

    class Checkpointed(Block):

        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    model = randomize(Checkpointed(nn.Conv2d(4, 6, 3), BatchNormAct(
        6))).double().eval()
    assert_as_stock(model, 'fused')


@pytest.mark.whole_graph
def test_norms_that_do_more_are_stock_when_compiled():
    model = pair(norm=BatchNormAct(6))
    turn_on(model)
    x = inputs(model)
    expected = model(x)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_deploy_leaves_out_norms_that_do_more():
    with pytest.raises(ValueError, match='does more than normalize'):
        turn_on(pair(norm=BatchNormAct(6)), 'Deploy')


@pytest.mark.parametrize('build', CONVS.values(), ids=CONVS)
def test_convolutions_that_pad_by_themselves(build):
    model = pair(build())
    assert convolves(model.conv)
    stock = assert_as_stock(model, 'fused')
    x = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), stock(x))
    expected = stock.requires_grad_(False), model.requires_grad_(False)
    assert_equal_steps(*(step(one, x) for one in expected))
    # Used by itself it is what it was.
    torch.testing.assert_close(model.conv(x), stock.conv(x))


@pytest.mark.parametrize('build', CONVS.values(), ids=CONVS)
def test_convolutions_that_pad_by_themselves_deployed(build):
    model = pair(build())
    stock = stock_copy(model)
    assert not turn_on(model, 'Deploy').left_out
    torch.testing.assert_close(model(inputs(model)), stock(inputs(stock)))


@pytest.mark.parametrize('build', OTHER_CONVS.values(), ids=OTHER_CONVS)
def test_convolutions_that_compute_something_else(build):
    model = pair(build())
    stock = stock_copy(model)
    assert not convolves(model.conv)
    with pytest.raises(ValueError, match='is not a convolution that mmtune'):
        turn_on(model)
    x = inputs(model)
    assert_equal_steps(step(stock, x), step(model, x))


def test_the_convolution_of_a_flag_that_changes():
    model = pair(WithNorm(4, 6, 3))
    stock = assert_as_stock(model, 'fused')
    for one in (model, stock):
        one.conv.norm = torch.tanh
    x = inputs(model)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['stock']


def test_convolution_and_norm_of_their_own():
    model = pair(SameConv(4, 6, 3, stride=2), BatchNormAct(6))
    assert_as_stock(model, 'fused')


@pytest.mark.parametrize('act', [nn.ReLU(inplace=True), nn.PReLU(6)])
def test_the_convolution_does_not_run_by_itself(act, monkeypatch):
    model = pair(SameConv(4, 6, 3), BatchNormAct(6, act))
    turn_on(model)
    monkeypatch.setattr(DeferredConv, 'tensor', None)
    model(inputs(model))
    assert runs(model) == ['fused']
