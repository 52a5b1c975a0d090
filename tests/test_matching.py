import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from mmtune.matching import find_pairs
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
        return super().forward(x) + 1


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
