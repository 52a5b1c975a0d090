"""Kinds of convolutions and normalizations against stock, in float64."""
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import build_conv_layer
from mmcv.ops import DeformConv2d, SyncBatchNorm
from mmdet.models.backbones.trident_resnet import TridentConv
from torch import nn

from mmtune import turn_off, turn_on
from mmtune.layers import convolutions
from mmtune.layers.convolutions import CONV_KINDS
from mmtune.layers.kinds import ConvKind
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy

TRANSPOSED = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d
}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def prepared(model):
    """With nothing at a value that hides a mistake, as zero offsets do."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=.3)
    return randomize(model).double().eval()


def mmcv(kind, *args, **options):
    return build_conv_layer(dict(type=kind), *args, **options)


class WithOffset(nn.Module):
    """A deformable convolution whose offset another layer gives."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Conv2d(4, 18, 3, padding=1)
        self.conv = DeformConv2d(4, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(x, self.offset(x)))


class WithOutputSize(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, 6, 3, stride=2)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(x, [2 * n + 2 for n in x.shape[2:]]))


class Trident(nn.Module):

    def __init__(self, branch=-1):
        super().__init__()
        self.conv = TridentConv(4, 6, 3, test_branch_idx=branch)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        inputs = [x, x + 1, x * 2][:1 if self.conv.test_branch_idx == 1 else 3]
        return [self.bn(y) for y in self.conv(inputs)]


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and detectron2 have it."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer('weight', torch.ones(channels))
        self.register_buffer('bias', torch.zeros(channels))
        self.register_buffer('running_mean', torch.zeros(channels))
        self.register_buffer('running_var', torch.ones(channels))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def frozen():
    norm = FrozenBatchNorm2d(6)
    for buffer in norm.buffers():
        nn.init.uniform_(buffer, .5, 2)
    return norm


def mmcv_sync_bn(channels):
    """Without the process group that its constructor asks for."""
    norm = SyncBatchNorm.__new__(SyncBatchNorm)
    nn.Module.__init__(norm)
    vars(norm).update(
        vars(nn.BatchNorm2d(channels)), group=None, group_size=1,
        stats_mode='default')
    return norm


SHAPE = (2, 4, 7, 7)
CONVS = {
    **{
        f'transposed {dim}d {name}': (lambda cls=cls, options=options: cls(
            4, 6, 3, **options), (2, 4, *[5] * dim))
        for dim, cls in TRANSPOSED.items()
        for name, options in {
            'plain': {},
            'no bias': dict(bias=False),
            'stride, padding': dict(stride=2, padding=1),
            'output padding': dict(stride=2, padding=1, output_padding=1),
            'groups': dict(groups=2, stride=2),
            'dilation': dict(dilation=2),
        }.items()
    },
    'transposed, depthwise': (lambda: nn.ConvTranspose2d(
        6, 6, 2, stride=2, groups=6), (2, 6, 5, 5)),
    **{
        f"padding='same', kernel {kernel}, dilation {dilation}":
        (lambda kernel=kernel, dilation=dilation: nn.Conv2d(
            4, 6, kernel, padding='same', dilation=dilation), SHAPE)
        for kernel, dilation in (((4, 4), 1), ((2, 6), 1), ((4, 3), 2),
                                 ((4, 2), 3))
    },
    "padding='same', 1d": (lambda: nn.Conv1d(4, 6, 4, padding='same'),
                           (2, 4, 9)),
    "padding='same', 3d": (lambda: nn.Conv3d(
        4, 6, (4, 3, 2), padding='same'), (2, 4, 6, 5, 4)),
    'linear': (lambda: nn.Linear(4, 6), (5, 4)),
    'linear, no bias': (lambda: nn.Linear(4, 6, bias=False), (5, 4)),
    'mmcv linear': (lambda: kinds_of_mmcv('Linear')(4, 6), (5, 4)),
    'mmcv deconv': (lambda: kinds_of_mmcv('ConvTranspose2d')(
        4, 6, 2, stride=2), SHAPE),
    'adaptive padding': (lambda: mmcv('Conv2dAdaptivePadding', 4, 6, 3,
                                      stride=2), (2, 4, 8, 7)),
    'adaptive padding, uneven': (lambda: mmcv(
        'Conv2dAdaptivePadding', 4, 6, (5, 2), stride=(3, 1)), SHAPE),
    'ConvWS': (lambda: mmcv('ConvWS', 4, 6, 3, padding=1), SHAPE),
    'ConvAWS': (lambda: mmcv('ConvAWS', 4, 6, 3, padding=1, groups=2), SHAPE),
    'DCN': (lambda: mmcv('DCN', 4, 6, 3, padding=1), SHAPE),
    'DCN, groups': (lambda: mmcv(
        'DCN', 4, 6, 3, padding=1, groups=2, deform_groups=2), SHAPE),
    'DCNv2': (lambda: mmcv('DCNv2', 4, 6, 3, padding=1), SHAPE),
    'DCNv2, no bias': (lambda: mmcv('DCNv2', 4, 6, 3, bias=False), SHAPE),
}
NORMS_AFTER_CONV = {
    'InstanceNorm': (lambda: nn.InstanceNorm2d(
        6, affine=True, track_running_stats=True), 'fused'),
    'InstanceNorm, not affine': (lambda: nn.InstanceNorm2d(
        6, track_running_stats=True), 'fused'),
    'frozen': (frozen, 'fused'),
    'MMSyncBN': (lambda: mmcv_sync_bn(6), 'fused'),
}


def kinds_of_mmcv(name):
    from mmcv.cnn.bricks import wrappers
    return getattr(wrappers, name)


def with_norm(conv, shape):
    channels = conv.out_features if len(shape) == 2 else conv.out_channels
    return nn.Sequential(conv, NORMS[max(len(shape) - 2, 1)](channels))


def compare(model, stock, shape, expected):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64)
    for _ in range(2):
        assert_equal_steps(step(stock, x), step(model, x))
        assert set(runs(model)) == {expected}
    with torch.no_grad():
        torch.testing.assert_close(model(x), stock(x))


@pytest.mark.parametrize('build, shape', CONVS.values(), ids=CONVS)
def test_convolution(build, shape):
    model = prepared(with_norm(build(), shape))
    stock = stock_copy(model)
    report = turn_on(model)
    assert not report.left_out
    compare(model, stock, shape, 'fused')
    turn_off(model)
    assert type(model[0]) is type(stock[0])
    model.train(), stock.train()
    x = torch.randn(shape, dtype=torch.float64)
    assert_equal_steps(step(stock, x), step(model, x))


@pytest.mark.parametrize('build, shape', CONVS.values(), ids=CONVS)
def test_convolution_runs_as_stock_where_something_is_between(build, shape):
    model = prepared(with_norm(build(), shape))
    stock = stock_copy(model)
    turn_on(model)
    for part in (model, stock):
        part[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, ))
    compare(model, stock, shape, 'stock')


@pytest.mark.parametrize('build, shape', CONVS.values(), ids=CONVS)
def test_promise_of_a_convolution_is_its_output(build, shape):
    """Where the norm turns out to be skipped, the promise is kept."""

    class Skips(nn.Module):

        def __init__(self):
            super().__init__()
            self.pair = prepared(with_norm(build(), shape))
            self.skip = False

        def forward(self, x):
            y = self.pair[0](x)
            return y * 2 if self.skip else self.pair[1](y)

    model = Skips()
    stock = stock_copy(model)
    turn_on(model)
    model.skip = stock.skip = True
    x = torch.randn(shape, dtype=torch.float64)
    assert_equal_steps(step(stock, x), step(model, x))


@pytest.mark.parametrize(
    'build', [WithOffset, WithOutputSize, Trident, lambda: Trident(1)],
    ids=['offset', 'output size', 'trident', 'trident, one branch'])
def test_blocks(build):
    model = prepared(build())
    stock = stock_copy(model)
    assert not turn_on(model).left_out
    x = torch.randn(SHAPE, dtype=torch.float64)
    for _ in range(2):
        assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused']


@pytest.mark.parametrize(
    'build, expected', NORMS_AFTER_CONV.values(), ids=NORMS_AFTER_CONV)
def test_normalization(build, expected):
    model = prepared(nn.Sequential(nn.Conv2d(4, 6, 3), build()))
    for name in ('running_mean', 'running_var'):
        nn.init.uniform_(getattr(model[1], name), .5, 2)
    stock = stock_copy(model)
    assert not turn_on(model).left_out
    x = torch.randn(SHAPE, dtype=torch.float64)
    actual = step(model, x)
    assert_equal_steps(step(stock, x), actual)
    assert runs(model) == [expected]


def test_frozen_norm_folds_in_train_mode():
    model = prepared(nn.Sequential(nn.Conv2d(4, 6, 3), frozen())).train()
    stock = stock_copy(model)
    report = turn_on(model)
    assert report.in_train_mode == 0
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused']


def test_frozen_norm_is_not_half_where_stock_is_not():
    """It has float32 buffers and multiplies by them."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3), frozen())
    stock = stock_copy(model)
    turn_on(model)
    x = torch.randn(SHAPE)
    with torch.autocast('cpu', torch.bfloat16):
        expected, actual = stock(x), model(x)
    assert actual.dtype == expected.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize('tracks, training, expected', [
    (True, False, ['fused', 'fused']),
    (True, True, ['train mode', 'fused']),
    (False, False, ['fused']),
    (False, True, ['fused']),
])
def test_instance_norm_of_its_input_runs_as_stock(tracks, training, expected):
    norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=tracks)
    model = prepared(
        nn.Sequential(
            nn.Conv2d(4, 6, 3), norm, nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)))
    stock = stock_copy(model)
    turn_on(model)
    model[1].train(training), stock[1].train(training)
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == expected


class Doubled(nn.Module):
    """Linear in its weight, by code that nobody has seen before."""
    in_channels = 4
    out_channels = 6
    groups = 1
    kernel_size = (3, 3)
    stride = (1, 1)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.bias = nn.Parameter(torch.randn(6))
        self.gate = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        return F.conv2d(x * self.gate, self.weight) * 2 + self.bias.view(
            -1, 1, 1)


class DoubledConv(Doubled):
    pass


class Squared(nn.Conv2d):
    """A convolution by type, but not linear in its weight."""

    def forward(self, x):
        return F.conv2d(x, self.weight**2, self.bias)


class HiddenSquare(nn.Conv2d):

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight**2, bias)


class SquaredCall(nn.Conv2d):

    def __call__(self, x):
        return super().__call__(x)**2


class SquaredTransposed(nn.ConvTranspose2d):

    def forward(self, x, output_size=None):
        return super().forward(x, output_size)**2


class SquaredLinear(nn.Linear):

    def forward(self, x):
        return super().forward(x)**2


UNKNOWN = {
    'forward': (lambda: Squared(4, 6, 3), 'Squared is not'),
    '_conv_forward': (lambda: HiddenSquare(4, 6, 3), 'HiddenSquare is not'),
    '__call__': (lambda: SquaredCall(4, 6, 3), 'comes from `pow`'),
    'transposed': (lambda: SquaredTransposed(4, 6, 3), 'Transposed is not'),
    'linear': (lambda: SquaredLinear(4, 6), 'SquaredLinear is not'),
    'not registered': (DoubledConv, 'DoubledConv is not'),
}


@pytest.mark.parametrize('build, reason', UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_type_runs_as_stock_and_is_named(build, reason):
    conv = build()
    shape = (5, 4) if isinstance(conv, nn.Linear) else SHAPE
    head = nn.Linear(6, 6) if isinstance(conv, nn.Linear) else nn.Conv2d(
        6, 6, 1)
    model = prepared(
        nn.Sequential(with_norm(conv, shape), with_norm(head, shape)))
    stock = stock_copy(model)
    report = turn_on(model)
    row, = report.left_out
    assert row.bn == '0.1' and reason in row.reason
    x = torch.randn(shape, dtype=torch.float64)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused']


def test_a_kind_of_ones_own(monkeypatch):
    """As the docstring of mmtune.layers.convolutions shows."""
    monkeypatch.setitem(CONV_KINDS, f'{__name__}.Doubled', ConvKind())
    model = prepared(nn.Sequential(DoubledConv(), nn.BatchNorm2d(6)))
    stock = stock_copy(model)
    assert not turn_on(model).left_out
    compare(model, stock, SHAPE, 'fused')
    assert 'CONV_KINDS[' in convolutions.__doc__


class Masked(nn.Conv2d):
    """Computes what pytorchcv's XConv2d does."""

    def __init__(self):
        super().__init__(4, 6, 3)
        self.mask = nn.Parameter(
            torch.eye(6, 4)[..., None, None].expand_as(self.weight).clone(),
            requires_grad=False)

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight.mul(self.mask), self.bias)


class Spectral:
    """Computes what the layers with a spectral norm of MMagic do."""

    def sn_weight(self):
        with torch.no_grad():
            matrix = self.weight.flatten(1)
            u = nn.functional.normalize(self.u0 @ matrix, dim=0) @ matrix.T
            norm = u.norm()
            if self.training:
                self.u0.copy_(u / norm)
        return self.weight / norm


class SpectralConv(nn.Conv2d, Spectral):

    def __init__(self):
        super().__init__(4, 6, 3)
        self.register_buffer('u0', torch.ones(6))

    def forward(self, x):
        return nn.functional.conv2d(x, self.sn_weight(), self.bias)


class SpectralLinear(nn.Linear, Spectral):

    def __init__(self):
        super().__init__(4, 6)
        self.register_buffer('u0', torch.ones(6))

    def forward(self, x):
        return nn.functional.linear(x, self.sn_weight(), self.bias)


_SPECTRAL = 'mmagic.models.editors.biggan.biggan_snmodule.'


@pytest.mark.parametrize('layer, upstream, norm, shape', [
    (Masked, 'pytorchcv.models.xdensenet.XConv2d', nn.BatchNorm2d, SHAPE),
    (SpectralConv, f'{_SPECTRAL}SNConv2d', nn.BatchNorm2d, SHAPE),
    (SpectralLinear, f'{_SPECTRAL}SNLinear', nn.BatchNorm1d, SHAPE[:2]),
])
def test_a_weight_that_is_made_at_each_call(monkeypatch, layer, upstream,
                                            norm, shape):
    monkeypatch.setitem(CONV_KINDS, f'{__name__}.{layer.__name__}',
                        CONV_KINDS[upstream])
    model = prepared(nn.Sequential(layer(), norm(6)))
    model[0].train()  # where a spectral norm goes on
    stock = stock_copy(model)
    assert not turn_on(model).left_out
    compare(model, stock, shape, 'fused')
    turn_off(model)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='makes a weight of its own'):
        turn_on(model, mode='Deploy')
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


class PaddedTwice(nn.Sequential):
    """Padded by a convolution, after an operator that autocast runs in half.

    Its input is bfloat16 before autocast is asked.
    """

    def __init__(self):
        super().__init__(
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'),
            nn.BatchNorm2d(6))


def padded(dim, mode, **options):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    return lambda: nn.Sequential(
        conv(4, 6, 3, padding=1, padding_mode=mode, **options), NORMS[dim](6))


UNDER_AUTOCAST = {
    **{
        f'{mode}, {dim}d': (padded(dim, mode), (2, 4, *[6] * dim))
        for mode in ('zeros', 'reflect', 'replicate', 'circular')
        for dim in (1, 2, 3)
    },
    'groups, no bias': (padded(2, 'reflect', groups=2, bias=False), SHAPE),
    'half before': (PaddedTwice, SHAPE),
    'same, uneven': (lambda: nn.Sequential(
        nn.Conv2d(4, 6, 4, padding='same'), nn.BatchNorm2d(6)), SHAPE),
    'adaptive': (lambda: nn.Sequential(
        mmcv('Conv2dAdaptivePadding', 4, 6, 3, stride=2), nn.BatchNorm2d(6)),
                 (2, 4, 8, 7)),
    'transposed': (lambda: nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)), SHAPE),
    'linear': (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)),
               (5, 4)),
}


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    'build, shape', UNDER_AUTOCAST.values(), ids=UNDER_AUTOCAST)
def test_dtypes_under_autocast(build, shape, dtype):
    """Autocast runs some paddings in float32, what they are given or not."""
    model = prepared(build()).float()
    stock = stock_copy(model)
    turn_on(model)

    def call(model, x):
        with torch.autocast('cpu', dtype):
            return model(x)

    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected, actual = step(stock, x, call), step(model, x, call)
    assert actual['output 0'].dtype == dtype
    assert_equal_steps(expected, actual, 16 * torch.finfo(dtype).eps)
    assert runs(model) == ['fused']


TAKEN_UNDER_AUTOCAST = {
    # What is given, what the modules are, and what becomes of it.
    'float32': (torch.float32, torch.float32, 'fused'),
    'bfloat16': (torch.bfloat16, torch.float32, 'fused'),
    'float64 throughout': (torch.float64, torch.float64, 'fused'),
    'float64': (torch.float64, torch.float32, None),
    'float64 weights': (torch.float32, torch.float64, None),
    'uint8': (torch.uint8, torch.float32, None),
    'int64': (torch.int64, torch.float32, None),
    'bool': (torch.bool, torch.float32, None),
    'complex64': (torch.complex64, torch.float32, None),
}


@pytest.mark.parametrize('build', [
    lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)),
    padded(2, 'circular'),
], ids=['plain', 'transposed', 'circular'])
@pytest.mark.parametrize(
    'given, own, expected', TAKEN_UNDER_AUTOCAST.values(),
    ids=TAKEN_UNDER_AUTOCAST)
def test_autocast_takes_what_stock_takes(build, given, own, expected):
    """It leaves float64 and what is no floating point number as they are."""
    model = prepared(build()).to(own)
    stock = stock_copy(model)
    turn_on(model)
    x = torch.randint(0, 2, SHAPE).to(given)
    with torch.autocast('cpu', torch.bfloat16):
        if expected is None:
            with pytest.raises(RuntimeError) as raised:
                stock(x)
            with pytest.raises(RuntimeError) as raised_too:
                model(x)
            assert str(raised_too.value) == str(raised.value)
            return
        wanted, actual = stock(x), model(x)
    assert actual.dtype == wanted.dtype
    torch.testing.assert_close(actual, wanted, rtol=.02, atol=.1)
    assert runs(model) == [expected]


PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def geometries(transposed):
    for dim, groups, stride, dilation, padding in itertools.product(
            (1, 2, 3), (1, 2), (1, 2, 3), (1, 2, 3), (0, 1)):
        options = dict(
            groups=groups, stride=stride, dilation=dilation, padding=padding)
        if not transposed:
            yield dim, options
            continue
        # What torch allows: below the stride or below the dilation.
        for output_padding in range(max(stride, dilation)):
            yield dim, dict(options, output_padding=output_padding)


@pytest.mark.parametrize('dim, options', [
    *[(PLAIN[dim], options) for dim, options in geometries(False)],
    *[(TRANSPOSED[dim], options) for dim, options in geometries(True)],
    (nn.ConvTranspose2d,
     dict(stride=(1, 3), dilation=(3, 1), output_padding=(2, 1))),
    (nn.ConvTranspose3d,
     dict(stride=(2, 1, 1), dilation=(1, 3, 2), output_padding=(1, 2, 0))),
], ids=lambda value: value.__name__ if isinstance(value, type) else
    ' '.join(f'{k}={v}' for k, v in value.items()))
def test_gradient_of_the_input_where_nothing_else_learns(dim, options):
    """Its size is that of the input, whatever the geometry rounds off."""
    conv = dim(4, 2, 2, **options)
    size = 5 if conv.transposed else 7
    shape = (2, 4, *[size] * len(conv.stride))
    model = prepared(with_norm(conv, shape)).requires_grad_(False)
    stock = stock_copy(model)
    turn_on(model)
    compare(model, stock, shape, 'fused')


LAYERS = {
    'plain': lambda: nn.Conv2d(4, 6, 3, padding=1),
    'no bias': lambda: nn.Conv2d(4, 6, 3, bias=False),
    'stride': lambda: nn.Conv2d(4, 6, 3, stride=2),
    '1 x 1': lambda: nn.Conv2d(4, 6, 1),
    '1 x 3': lambda: nn.Conv2d(4, 6, (1, 3)),
    'depthwise': lambda: nn.Conv2d(4, 4, 3, groups=4),
    'depthwise, 1 x 1': lambda: nn.Conv2d(4, 4, 1, groups=4),
    'depthwise, several each': lambda: nn.Conv2d(4, 8, 3, groups=4),
    'groups': lambda: nn.Conv2d(4, 6, 3, groups=2),
    'one channel out': lambda: nn.Conv2d(4, 1, 3),
    'one channel out, 1 x 1': lambda: nn.Conv2d(4, 1, 1),
    'one channel in': lambda: nn.Conv2d(1, 6, 3),
    'one channel': lambda: nn.Conv2d(1, 1, 3),
    'reflect': lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'),
    'same, uneven': lambda: nn.Conv2d(4, 4, 4, padding='same', groups=4),
    'transposed': lambda: nn.ConvTranspose2d(4, 6, 3, stride=2),
    'transposed, groups': lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    'transposed, depthwise': lambda: nn.ConvTranspose2d(4, 4, 3, groups=4),
    'transposed, one channel': lambda: nn.ConvTranspose2d(4, 1, 3),
    'transposed, output padding': lambda: nn.ConvTranspose2d(
        4, 6, 3, dilation=2, output_padding=1),
    '1d': lambda: nn.Conv1d(4, 6, 3),
    '1d, depthwise': lambda: nn.Conv1d(4, 4, 3, groups=4),
    '3d': lambda: nn.Conv3d(4, 6, 3),
    '3d, depthwise': lambda: nn.Conv3d(4, 4, 3, groups=4),
    'linear': lambda: nn.Linear(4, 6),
    'linear, no bias': lambda: nn.Linear(4, 6, bias=False),
    'linear, one channel': lambda: nn.Linear(4, 1),
    'linear, one input': lambda: nn.Linear(1, 6),
}


def strided(tensor, layout):
    """The tensor with other strides; channels_last needs two dimensions."""
    if layout == 'channels_last' and tensor.dim() > 3:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == 'transposed':
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor.contiguous()


def strides(model, x, learns, accumulated):
    """Of the output and of each gradient, by name."""
    learned = dict(model.named_parameters()) if learns else {}
    for parameter in model.parameters():
        parameter.requires_grad_(learns)
        parameter.grad = None
    learned['x'] = x = x.detach().requires_grad_()
    output = model(x)
    # Those of a dimension of size 1 mean nothing; and only DDP reads them.
    result = {'output': output.squeeze().stride()}
    if accumulated:
        output.square().sum().backward()
        gradients = [tensor.grad for tensor in learned.values()]
    else:
        gradients = torch.autograd.grad(output.square().sum(),
                                        learned.values())
    result.update(zip(learned, (grad.stride() for grad in gradients)))
    if not learns and output.size(1) == 1:
        # Without the input, only a map of one channel says how it lay.
        del result['x']
    return result


@pytest.mark.parametrize('of_input', ['contiguous', 'channels_last'])
@pytest.mark.parametrize(
    'of_weight', ['contiguous', 'channels_last', 'transposed'])
@pytest.mark.parametrize('build', LAYERS.values(), ids=LAYERS)
def test_strides_are_those_of_stock(build, of_weight, of_input):
    """DDP warns, and copies, where gradients are not as the parameters."""
    torch.manual_seed(0)
    conv = build()
    sizes = [7] * (conv.weight.dim() - 2)
    channels = conv.in_channels if sizes else conv.in_features
    shape = (2, channels, *sizes)
    conv.weight = nn.Parameter(strided(conv.weight.detach(), of_weight))
    model = with_norm(conv, shape).eval()
    stock = stock_copy(model)
    turn_on(model)
    for dtype, learns, accumulated in itertools.product(
            (torch.float32, torch.float64), (True, False), (True, False)):
        model.to(dtype), stock.to(dtype)
        x = strided(torch.randn(shape, dtype=dtype), of_input)
        assert strides(model, x, learns, accumulated) == strides(
            stock, x, learns, accumulated), (dtype, learns, accumulated)
        assert runs(model) == ['fused']
