"""Forwards that ask what a trace has to guess."""
import math
import random

import pytest
import torch
from torch import fx, nn

from mmtune import turn_on
from mmtune.matching.tracing import trace
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy


class Block(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def pair(self, x):
        return self.bn(self.conv(x))


class LengthOfShape(Block):
    """As MMDetection's nlc_to_nchw."""

    def forward(self, x):
        assert len(x.shape) == 4
        batch, channels, height, width = x.shape
        x = x.flatten(2).transpose(1, 2)
        assert len(x.shape) == 3
        assert x.shape[1] == height * width
        x = x.transpose(1, 2).reshape(batch, channels, height, width)
        return self.pair(x)


class SizeAsNumber(Block):
    """As transformers' MobileNetV2."""

    def forward(self, x):
        width = int(x.shape[-1])
        padding = max(3 - (width % 2 or 2), 0)
        rest = math.ceil(x.size(-2) / 2) + round(float(x.shape[-1])) // 2
        return self.pair(nn.functional.pad(x, (0, padding))) * rest


class OneOfAList(Block):
    """As mmpretrain's necks."""
    gives = list

    def forward(self, inputs):
        assert isinstance(inputs, self.gives)
        assert len(inputs) == 1
        return self.pair(inputs[0])


class OneOfATuple(OneOfAList):
    gives = tuple


class Levels(Block):

    def forward(self, inputs):
        assert isinstance(inputs, (list, tuple)) and len(inputs) == 3
        return [self.pair(x) for x in inputs]


class Keywords(nn.Module):
    """As mmpretrain's EfficientNetV2."""

    class Inner(Block):

        def forward(self, x, **kwargs):
            return self.pair(x)

    def __init__(self):
        super().__init__()
        self.inner = Keywords.Inner()

    def forward(self, x, **kwargs):
        return self.inner(x, **kwargs)


class PassesKeywords(Keywords.Inner):

    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs)


class Raises(Block):

    def forward(self, x):
        if x.dim() != 4 or x.size(1) != 4:
            raise ValueError('expected maps of 4 channels')
        return self.pair(x)


class Ranges(Block):

    def forward(self, x):
        rows = [0] * x.shape[-2]
        for _ in range(x.ndim):
            x = self.pair(x)
        return x * len(rows)


class NeedsOptional(nn.Module):
    """As pytorchcv's DPN."""

    class Inner(Block):

        def forward(self, x, side=None):
            assert side is not None
            return self.pair(x) + side

    def __init__(self):
        super().__init__()
        self.inner = NeedsOptional.Inner()

    def forward(self, x):
        return self.inner(x, x)


FOUND = {
    'length of a shape': (LengthOfShape, None),
    'a size as a number': (SizeAsNumber, None),
    'one of a list': (OneOfAList, list),
    'one of a tuple': (OneOfATuple, tuple),
    'several levels': (Levels, list),
    'keywords': (Keywords, None),
    'keywords passed on': (PassesKeywords, None),
    'raises': (Raises, None),
    'an optional argument that it needs': (NeedsOptional, None),
    'ranges': (Ranges, None),
}


@pytest.mark.parametrize('build, wrap', FOUND.values(), ids=FOUND)
def test_found(build, wrap):
    torch.manual_seed(0)
    model = randomize(build()).double().eval()
    stock = stock_copy(model)
    assert not turn_on(model).left_out
    x = torch.randn(1, 4, 6, 5, dtype=torch.float64)
    if wrap is not None:
        x = wrap([x] * (3 if build is Levels else 1))
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused']


class Endless(Block):

    def forward(self, x):
        while x.sum() > 0:
            x = self.conv(x)
        while not x.sum() > 0:
            x = x + 1
        return self.pair(x)


class Unsaid(Block):

    def forward(self, x):
        assert random is None
        return self.pair(x)


class NumberOfData(Block):

    def forward(self, x):
        return self.pair(x) if float(x) else x


class SaysNothing(Block):

    def forward(self, x):
        raise RuntimeError


ERRORS = {
    'endless': (Endless, 'TraceError: a loop depends on data'),
    'a bare assertion': (Unsaid, 'AssertionError: assert random is None'),
    'a number of data': (NumberOfData,
                         'TypeError: a number is made of data'),
    'a bare error': (SaysNothing, 'RuntimeError: raise RuntimeError'),
}


@pytest.mark.parametrize('build, error', ERRORS.values(), ids=ERRORS)
def test_what_ends_a_trace_is_said_in_words(build, error):
    assert trace(build()).error == error


def test_containers_have_no_forward_to_trace():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        dict(
            pair=PassesKeywords(),
            levels=nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)])))
    row, = turn_on(model).left_out
    assert (row.bn, row.reason) == ('levels.1', 'no traced forward calls it')


def test_a_graph_module_is_its_own_graph():
    model = fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 1)))
    assert trace(model) == ([model.graph], True, None)


class KeepsStatistics(nn.Conv2d):
    """By its name and its class a convolution."""

    def __init__(self):
        super().__init__(4, 4, 1)
        self.register_buffer('running_mean', torch.zeros(4))
        self.register_buffer('running_var', torch.ones(4))

    def forward(self, x):
        return super().forward(x) / self.running_var.view(-1, 1, 1)


class Nothing(nn.Identity):

    def __init__(self):
        super().__init__()
        self.register_buffer('running_mean', torch.zeros(4))
        self.register_buffer('running_var', torch.ones(4))


@pytest.mark.parametrize('build', [KeepsStatistics, Nothing])
def test_whatever_keeps_statistics_has_a_row(build):
    model = nn.ModuleDict(dict(pair=PassesKeywords(), other=build()))
    row, = turn_on(model).left_out
    assert row.bn == 'other' and build.__name__ in row.reason
