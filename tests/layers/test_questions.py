"""Questions between a convolution and its normalization."""
import math

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import build_conv_layer
from mmcv.ops import DeformConv2d
from torch import nn

from mmtune import turn_on
from mmtune.behaviours.deferred import DeferredConv
from tests.layers.test_calls import SameConv
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy

X = (2, 4, 9, 8)
CONVS = {
    'plain': (lambda: nn.Conv2d(4, 6, 3), X),
    'geometry': (lambda: nn.Conv2d(
        4, 6, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2)), X),
    'same': (lambda: nn.Conv2d(4, 6, (4, 3), padding='same', dilation=2), X),
    'valid': (lambda: nn.Conv2d(4, 6, 3, padding='valid'), X),
    'reflect': (lambda: nn.Conv2d(
        4, 6, 3, padding=2, padding_mode='reflect'), X),
    'groups': (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), X),
    '1d': (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    '3d': (lambda: nn.Conv3d(4, 6, 2, padding=1), (1, 4, 3, 4, 5)),
    'transposed': (lambda: nn.ConvTranspose2d(
        4, 6, 3, stride=3, padding=1, output_padding=(1, 2), dilation=2), X),
    'transposed, groups': (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), X),
    'linear': (lambda: nn.Linear(4, 6), (5, 4)),
    'adaptive': (lambda: build_conv_layer(
        dict(type='Conv2dAdaptivePadding'), 4, 6, 3, stride=2), X),
    'weight standardization': (lambda: build_conv_layer(
        dict(type='ConvWS'), 4, 6, 3, padding=1), X),
}
# Of which the shape is not known, but for the dimensions.
SHAPELESS = {
    'deformable': (lambda: DeformConv2d(4, 6, 3, padding=1), X),
    'of its own': (lambda: SameConv(4, 6, 3, stride=2), X),
}
QUESTIONS = {
    'shape': lambda y: y.shape,
    'a size': lambda y: y.shape[-1],
    'size()': lambda y: y.size(),
    'size(1)': lambda y: y.size(1),
    'size by name': lambda y: y.size(dim=-1),
    'len': len,
    'numel': lambda y: y.numel(),
    'torch.numel': torch.numel,
    'dtype': lambda y: y.dtype,
    'device': lambda y: y.device,
    'is_floating_point': lambda y: y.is_floating_point(),
}
DIMENSIONS = {
    'dim': lambda y: y.dim(),
    'ndim': lambda y: y.ndim,
    'ndimension': lambda y: y.ndimension(),
}


class Asks(nn.Module):

    def __init__(self, conv, question, channels=6):
        super().__init__()
        self.conv = conv
        dimensions = max(conv.weight.dim() - 2, 1)
        self.bn = (nn.BatchNorm1d, nn.BatchNorm2d,
                   nn.BatchNorm3d)[dimensions - 1](channels)
        self.question = question

    def forward(self, x):
        y = self.conv(x)
        self.answer = self.question(y)
        return self.bn(y)


def asking(build, question):
    torch.manual_seed(0)
    model = randomize(Asks(build(), question)).double().eval()
    stock = stock_copy(model)
    turn_on(model)
    return model, stock


@pytest.mark.parametrize(
    'question', [*QUESTIONS.values(), *DIMENSIONS.values()],
    ids=[*QUESTIONS, *DIMENSIONS])
@pytest.mark.parametrize('build, shape', CONVS.values(), ids=CONVS)
def test_answered_without_running(build, shape, question, monkeypatch):
    model, stock = asking(build, question)
    monkeypatch.setattr(DeferredConv, 'tensor', None)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), stock(x))
    assert model.answer == stock.answer
    assert type(model.answer) is type(stock.answer)
    assert runs(model) == ['fused']


@pytest.mark.parametrize('question', DIMENSIONS.values(), ids=DIMENSIONS)
def test_dimensions_of_a_convolution_of_its_own(question, monkeypatch):
    build, shape = SHAPELESS['of its own']
    model, stock = asking(build, question)
    monkeypatch.setattr(DeferredConv, 'tensor', None)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), stock(x))
    assert model.answer == stock.answer


def test_the_convolution_runs_where_the_answer_is_not_known():
    build, shape = SHAPELESS['of its own']
    model, stock = asking(build, lambda y: y.shape)
    x = torch.randn(shape, dtype=torch.float64)
    assert_equal_steps(step(stock, x), step(model, x))
    assert model.answer == stock.answer
    assert runs(model) == ['stock']


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_dtype_under_autocast(dtype):
    model, stock = asking(lambda: nn.Conv2d(4, 6, 3), lambda y: y.dtype)
    for one in (model, stock):
        one.float()
    x = torch.randn(X)
    with torch.autocast('cpu', torch.bfloat16,
                        enabled=dtype == torch.bfloat16):
        model(x), stock(x)
    assert model.answer == stock.answer == dtype
    assert runs(model) == ['fused']


def test_after_the_input_was_changed():
    """As for every other use of the output."""

    class Changes(Asks):

        def forward(self, x):
            y = self.conv(x)
            if self.changes:
                x.add_(1)
            return self.bn(y) if y.shape else y

    torch.manual_seed(0)
    Changes.changes = False
    model = randomize(Changes(nn.Conv2d(4, 6, 3), None)).double().eval()
    turn_on(model)
    Changes.changes = True
    with pytest.raises(RuntimeError, match='changed in place'):
        model(torch.randn(X, dtype=torch.float64))


def test_an_error_of_the_convolution_is_raised():
    model, stock = asking(lambda: nn.Conv2d(4, 6, 3), lambda y: y.shape)
    for one in (model, stock):
        with pytest.raises(RuntimeError, match="can't be greater than"):
            one(torch.randn(1, 4, 2, 2, dtype=torch.float64))


class Hybrid(nn.Module):
    """As PVT's and VAN's embeddings, and much besides."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.conv(x)
        batch, channels, height, width = y.shape
        assert len(y.shape) == 4
        torch._assert(y.ndim == 4, f'of {y.dim()} dimensions')
        if y.dtype == torch.float16 or y.size(1) != channels:
            raise TypeError('wrong')
        tokens = height * width
        y = self.bn(y).view(batch, channels, tokens)
        return F.pad(y, (0, math.ceil(tokens / 4) * 4 - tokens))


def test_questions_are_no_second_reader():
    torch.manual_seed(0)
    model = randomize(Hybrid()).double().eval()
    stock = stock_copy(model)
    assert not turn_on(model).left_out
    x = torch.randn(X, dtype=torch.float64)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused']
