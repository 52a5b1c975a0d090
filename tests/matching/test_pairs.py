import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from mmtune import turn_on
from mmtune.matching.pairs import find_pairs
from tests.oracle import stock_copy


class Base(nn.Module):

    def __init__(self, conv=None, bn=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 4, 1)
        self.bn = bn or nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


class Subclass(nn.Conv2d):
    """Inherits all that computes."""


class Scaled(nn.Conv2d):

    def forward(self, x):
        return super().forward(x) * 2


class ScaledInside(nn.Conv2d):

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class OddNorm(nn.BatchNorm2d):

    def forward(self, x):
        return super().forward(x * 2)


class ReluBetween(Base):

    def forward(self, x):
        return self.bn(self.conv(x).relu())


class OutputUsedTwice(Base):

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class OutputReturned(Base):

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y), y


class SomethingBetween(Base):

    def forward(self, x):
        y = self.conv(x)
        x.add_(1)
        return self.bn(y)


class OnInput(Base):

    def forward(self, x):
        return self.bn(x)


class Uncalled(Base):

    def forward(self, x):
        return x


class ThroughModule(Base):

    def __init__(self):
        super().__init__()
        self.wrapped = nn.Sequential(nn.ReLU())

    def forward(self, x):
        return self.bn(self.wrapped(x))


class LoopOnData(Base):

    def forward(self, x):
        for _ in x:
            x = self.bn(self.conv(x))
        return x


class Unpacked(Base):

    def forward(self, x):
        return self.bn(self.conv(x)).view(*x.shape[:1], len(x), -1)


class EndsOneWay(Base):

    def forward(self, x):
        while not x.sum() > 0:
            x = x + 1
        return self.bn(self.conv(x))


class PartlyTraced(Base):

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x * float(x)


class ConvsFirst(Base):

    def forward(self, x):
        y, _ = self.conv(x), self.conv(x)
        return self.bn(y)


class NumberOfData(Base):

    def forward(self, x):
        return self.bn(self.conv(x)) if float(x) else x


class EndlessOnData(Base):

    def forward(self, x):
        while not x.sum() > 0:
            x = x + 1
        while x.mean() > 0:
            x = x - 1
        return self.bn(self.conv(x))


class ReplacedForward(Base):

    def __init__(self):
        super().__init__()
        self.conv.forward = lambda x: F.relu(x)


class WithArguments(Base):

    def forward(self, x, norm=True, *, scale=None, **kwargs):
        x = self.conv(x)
        return self.bn(x) if norm and scale is None else x


class BranchOnData(Base):

    def forward(self, x):
        if x.sum() > 0:
            x = self.bn(self.conv(x))
        return x


class BranchOnDataNot(Base):

    def forward(self, x):
        return x if x.sum() > 0 else self.bn(self.conv(x))


class Properties(Base):

    @property
    def norm(self):
        return self.bn

    def forward(self, x):
        return self.norm(self.conv(x))


class Lists(nn.Module):

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))
        self.bns = nn.ModuleDict(dict(a=nn.BatchNorm2d(3),
                                      b=nn.BatchNorm2d(3)))

    def forward(self, x):
        for conv, bn in zip(self.convs, self.bns.values()):
            x = bn(conv(x))
        return x


FOUND = {
    'loop on data': LoopOnData,
    'unpacked data': Unpacked,
    'one way of a loop ends': EndsOneWay,
    'before the trace ends': PartlyTraced,
    'another conv between': ConvsFirst,
    'plain': Base,
    '1d': lambda: Base(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)),
    '3d': lambda: Base(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4)),
    'SyncBatchNorm': lambda: Base(bn=nn.SyncBatchNorm(4)),
    'not affine': lambda: Base(bn=nn.BatchNorm2d(4, affine=False)),
    'subclass': lambda: Base(Subclass(3, 4, 1)),
    'arguments': WithArguments,
    'properties': Properties,
    'Sequential': lambda: nn.Sequential(nn.Conv2d(3, 4, 1),
                                        nn.BatchNorm2d(4)),
    'branch on data': BranchOnData,
    'other branch on data': BranchOnDataNot,
}

LEFT_OUT = {
    'forward overridden': (lambda: Base(Scaled(3, 4, 1)),
                           'Scaled is not a convolution that mmtune knows'),
    '_conv_forward overridden': (lambda: Base(ScaledInside(3, 4, 1)),
                                 'ScaledInside is not a convolution'),
    'forward replaced': (ReplacedForward, 'is replaced on the instance'),
    'BN overridden': (lambda: Base(bn=OddNorm(4)),
                      'OddNorm overrides the forward'),
    'no statistics': (lambda: Base(
        bn=nn.BatchNorm2d(4, track_running_stats=False)),
                      'no running statistics'),
    'channels': (lambda: Base(bn=nn.BatchNorm2d(5)),
                 '4 output channels, the BN 5'),
    'relu between': (ReluBetween, 'its input comes from `relu`'),
    'used twice': (OutputUsedTwice, 'also goes to `add`'),
    'returned': (OutputReturned, "also goes to the block's output"),
    'something between': (SomethingBetween, '`add_` runs between'),
    'on the input': (OnInput, "comes from the argument 'x'"),
    'through a module': (ThroughModule,
                         "comes from the module 'wrapped' (Sequential)"),
    'never called': (Uncalled, 'no traced forward calls it'),
    'number of data': (NumberOfData, 'cannot be traced (TypeError: '),
    'endless on data': (EndlessOnData, 'cannot be traced (TraceError: '),
}


@pytest.mark.parametrize('build', FOUND.values(), ids=FOUND)
def test_found(build):
    pairs, left_out = find_pairs(model := build(), [model])
    assert len(pairs) == 1 and not left_out
    names = {module: name for name, module in model.named_modules()}
    conv, norm = (m for m in model.modules() if m is not model)
    assert pairs[0][:3] == ('', names[conv], names[norm])


def test_found_in_containers():
    model = nn.Sequential(Lists(), nn.ModuleList([Base()]))
    pairs, _ = find_pairs(model, [model[0]])
    assert [p[:3] for p in pairs] == [('0', '0.convs.0', '0.bns.a'),
                                      ('0', '0.convs.1', '0.bns.b')]


@pytest.mark.parametrize('build, reason', LEFT_OUT.values(), ids=LEFT_OUT)
def test_left_out_with_its_reason(build, reason):
    model = build()
    pairs, left_out = find_pairs(model, [model])
    assert not pairs
    assert [row.norm for row in left_out] == ['bn']
    assert reason in left_out[0].reason


def test_only_pairs_on_a_sole_way_may_be_folded_for_good():
    class Reused(Base):

        def forward(self, x):
            return self.bn(self.conv(x)) + self.conv(x)

    model = nn.ModuleList([Base(), BranchOnData(), Reused()])
    pairs, _ = find_pairs(model, [model])
    assert [pair.sole for pair in pairs] == [True, False, False]


class Stateful(Base):
    """Everything that a trace could leave behind."""

    def __init__(self):
        super().__init__()
        self.register_buffer('count', torch.zeros(()))
        self.seen = []
        self.last = None

    def forward(self, x):
        self.count += 1
        self.seen.append(x)
        self.last = x
        self.conv.last = x
        torch.rand(1), random.random(), np.random.rand()
        self.child = nn.ReLU()
        weight, self.conv.weight = self.conv.weight, None
        self.conv.weight = weight
        return self.bn(self.conv(x))


def test_finding_changes_nothing():
    model = Stateful()
    stock = stock_copy(model)
    weight, state = model.conv.weight, torch.get_rng_state()
    random.seed(0), np.random.seed(0)
    expected = random.random(), np.random.rand()
    random.seed(0), np.random.seed(0)
    find_pairs(model, [model])
    assert torch.equal(torch.get_rng_state(), state)
    assert (random.random(), np.random.rand()) == expected
    assert model.count == 0 and model.seen == [] and model.last is None
    assert model.conv.weight is weight and not hasattr(model.conv, 'last')
    assert repr(model) == repr(stock)
    assert not any(
        isinstance(value, fx.Proxy) for module in model.modules()
        for value in vars(module).values())


def test_a_detector_is_not_traced():
    class Detector(nn.Module):
        traced = False

        def __init__(self):
            super().__init__()
            self.backbone = Base()

        def forward(self, x):
            type(self).traced = True
            return self.backbone(x)

    model = Detector()
    assert len(find_pairs(model, [model]).pairs) == 1
    assert not Detector.traced


class Mine(nn.Module):
    """A normalization by its name alone."""

    def __init__(self, channels=4):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x / x.norm(dim=1, keepdim=True)


def named(name, base=Mine):
    return type(name, (base, ), {})


class AffineChannel(nn.Module):
    """Caffe's frozen BatchNorm, after its statistics were folded."""

    def __init__(self, as_buffers=False):
        super().__init__()
        for name in ('weight', 'bias'):
            if as_buffers:
                self.register_buffer(name, torch.ones(4))
            else:
                setattr(self, name, nn.Parameter(torch.ones(4)))

    def forward(self, x):
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class KeepsStatistics(nn.Module):
    """Of no class and no name that says so."""

    def __init__(self):
        super().__init__()
        self.register_buffer('running_mean', torch.zeros(4))
        self.register_buffer('running_var', torch.ones(4))

    def forward(self, x):
        return (x - self.running_mean[:, None, None]
                ) / self.running_var[:, None, None].sqrt()


class Clipped(KeepsStatistics):
    """The buffers of a frozen one, and another formula."""

    def __init__(self):
        super().__init__()
        self.register_buffer('weight', torch.ones(4))
        self.register_buffer('bias', torch.zeros(4))

    def forward(self, x):
        return super().forward(x).clip(-1, 1)


class NoStatistics(nn.GroupNorm):

    def forward(self, x):
        return super().forward(x) + 1


FROM_THE_INPUT = 'computes its statistics from the batch at hand'
NO_RUNNING = 'keeps no running statistics'
UNKNOWN = 'is not a normalization that mmtune knows'
NORMALIZATIONS = {
    'GroupNorm': (lambda: nn.GroupNorm(2, 4), FROM_THE_INPUT),
    'LayerNorm': (lambda: nn.LayerNorm([4, 5, 5]), FROM_THE_INPUT),
    'LayerNorm without weights': (
        lambda: nn.LayerNorm([4, 5, 5], elementwise_affine=False),
        FROM_THE_INPUT),
    'RMSNorm': (lambda: nn.RMSNorm([4, 5, 5]), FROM_THE_INPUT),
    'LocalResponseNorm': (lambda: nn.LocalResponseNorm(2), FROM_THE_INPUT),
    'InstanceNorm': (lambda: nn.InstanceNorm2d(4, affine=True),
                     FROM_THE_INPUT),
    'parametrized': (lambda: nn.utils.parametrizations.weight_norm(
        nn.GroupNorm(2, 4), dim=None), FROM_THE_INPUT),
    'scripted': (lambda: torch.jit.script(nn.GroupNorm(2, 4)), NO_RUNNING),
    'scripted BatchNorm': (lambda: torch.jit.script(nn.BatchNorm2d(4)),
                           UNKNOWN),
    'scripted, another formula': (lambda: torch.jit.trace(
        Clipped(), torch.ones(1, 4, 2, 2)), 'was generated for this instance'),
    'forward overridden': (lambda: NoStatistics(2, 4), NO_RUNNING),
    'by name': (named('L2Norm'), NO_RUNNING),
    'by a lower-case name': (named('my_layernorm'), NO_RUNNING),
    'by a long name': (named('LocalNormalization'), NO_RUNNING),
    'AffineChannel': (AffineChannel, NO_RUNNING),
    'AffineChannel of buffers': (lambda: AffineChannel(True), NO_RUNNING),
    'AffineChannel of another name': (named('Scale', AffineChannel),
                                      NO_RUNNING),
    'running statistics': (KeepsStatistics, UNKNOWN),
    'frozen, another formula': (Clipped, 'Clipped computes something else'),
    'BatchNorm without statistics': (
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        'no running statistics'),
}


@pytest.mark.parametrize('mode', ['Tune', 'Train', 'Eval', 'Deploy'])
@pytest.mark.parametrize(
    'build, reason', NORMALIZATIONS.values(), ids=NORMALIZATIONS)
def test_every_normalization_has_a_row(build, reason, mode):
    """After a convolution, after something else, and called by nobody."""
    odd = build()
    model = nn.ModuleDict(
        dict(
            pair=Base(),
            after_conv=Base(bn=odd),
            after_relu=nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), build()),
            uncalled=Uncalled(bn=build())))
    report = turn_on(model, mode)
    rows = {row.bn: row for row in report.rows}
    assert rows.keys() == {
        'pair.bn', 'after_conv.bn', 'after_relu.2', 'uncalled.bn'
    }
    assert rows.pop('pair.bn').mode == mode
    assert rows['after_conv.bn'].conv == 'after_conv.conv'
    for row in rows.values():
        if mode in ('Train', 'Eval') and isinstance(odd, nn.BatchNorm2d):
            assert (row.mode, row.reason) == (mode, '')
        else:
            assert row.mode == 'stock' and reason in row.reason
    assert len(report.summary().splitlines()) == 1


class NormedConv2d(nn.Conv2d):
    pass


class PreNorm(nn.Module):
    """It holds a normalization, and is none."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(x)


class ConvNormAct(Base):
    pass


NO_NORMALIZATIONS = {
    'container of a pair': ConvNormAct,
    'container of a norm': lambda: PreNorm(),
    'weight_norm': lambda: nn.utils.parametrizations.weight_norm(
        nn.Conv2d(3, 4, 1)),
    'spectral_norm': lambda: nn.utils.parametrizations.spectral_norm(
        nn.Linear(3, 4)),
    'convolution of that name': lambda: NormedConv2d(3, 4, 1),
    'linear of that name': lambda: named('NormedLinear', nn.Linear)(3, 4),
    'normed by a product': named('NormedLayer'),
    'of surface normals': named('NormalHead'),
    'of images': named('Normalize'),
    'identity': named('NoNorm', nn.Identity),
    'PReLU': lambda: nn.PReLU(4),
    'Embedding': lambda: nn.Embedding(4, 4),
}


@pytest.mark.parametrize(
    'build', NO_NORMALIZATIONS.values(), ids=NO_NORMALIZATIONS)
def test_what_is_no_normalization_has_no_row(build):
    model = nn.ModuleDict(dict(pair=Base(), other=build()))
    rows = turn_on(model).rows
    real = [name for name, module in model.named_modules()
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm))]
    assert sorted(row.bn for row in rows) == sorted(real)


@pytest.mark.parametrize('mode', ['Tune', 'Train', 'Eval', 'Deploy'])
def test_no_mode_is_for_normalizations_of_their_input_alone(mode):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    with pytest.raises(ValueError, match='found 1 GroupNorm; 1 x GroupNorm c'):
        turn_on(model, mode)


class ConvOfDetectron2(nn.Conv2d):
    """It holds its normalization and activation."""

    def __init__(self, *args, norm=None, activation=None, **options):
        super().__init__(*args, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        if not torch.jit.is_scripting() and x.numel() == 0 and self.training:
            assert not isinstance(self.norm, nn.SyncBatchNorm)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding,
                     self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


@pytest.mark.parametrize('norm', [
    nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.GroupNorm(2, 4), None
], ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize('activation', [None, F.relu, nn.ReLU()])
def test_a_convolution_that_holds_its_norm(norm, activation):
    conv = ConvOfDetectron2(3, 4, 1, norm=norm, activation=activation)
    model = nn.ModuleDict(dict(pair=Base(), stem=conv)).eval()
    report = turn_on(model)
    assert [row.bn for row in report.rewritten] == ['pair.bn']
    expected = {None: [], nn.GroupNorm: [FROM_THE_INPUT]}.get(
        norm and type(norm), ['its input comes from `conv2d`'])
    assert [row.bn for row in report.left_out] == ['stem.norm'] * len(expected)
    for row, reason in zip(report.left_out, expected):
        assert reason in row.reason
