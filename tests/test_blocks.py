"""Every supported kind of block against stock, in float64."""
import pytest
import torch
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
from mmengine.model.utils import revert_sync_batchnorm
from torch import nn

from mmtune import turn_on
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
BN = dict(type='BN')


def pair(dim=2, norm=None, **options):
    options = {**dict(kernel_size=3, padding=1), **options}
    return nn.Sequential(CONVS[dim](4, 6, **options),
                         norm or NORMS[dim](6))


def reverted():
    return revert_sync_batchnorm(pair(norm=nn.SyncBatchNorm(6)))


PAIRS = {
    **{
        f'{dim}d {name}': (lambda dim=dim, options=options: pair(
            dim, **options))
        for dim in (1, 2, 3)
        for name, options in {
            'plain': {},
            'no bias': dict(bias=False),
            'stride': dict(stride=2),
            'dilation': dict(dilation=2, padding=2),
            'groups': dict(groups=2),
            'same': dict(padding='same'),
            'same, even kernel': dict(padding='same', kernel_size=2),
            'same, dilated': dict(padding='same', dilation=2),
            'valid': dict(padding='valid'),
            'reflect': dict(padding_mode='reflect'),
            'circular': dict(padding_mode='circular'),
            'replicate same': dict(padding='same', padding_mode='replicate'),
            'not affine': dict(norm=NORMS[dim](6, affine=False)),
            'SyncBatchNorm': dict(norm=nn.SyncBatchNorm(6)),
            'momentum None': dict(norm=NORMS[dim](6, momentum=None)),
        }.items()
    },
    'uneven padding': lambda: pair(kernel_size=(3, 1), padding=(1, 0)),
    'SyncBN reverted by MMEngine': reverted,
    'ConvModule': lambda: ConvModule(4, 6, 3, norm_cfg=BN),
    'ConvModule with bias': lambda: ConvModule(4, 6, 3, bias=True,
                                               norm_cfg=BN),
    'ConvModule without activation': lambda: ConvModule(
        4, 6, 3, norm_cfg=BN, act_cfg=None),
    'ConvModule with explicit padding': lambda: ConvModule(
        4, 6, 3, padding=1, norm_cfg=BN, padding_mode='reflect'),
    'ConvModule, activation first': lambda: ConvModule(
        4, 6, 3, norm_cfg=BN, order=('act', 'conv', 'norm'), inplace=False),
    'ConvModule of mmcv Conv2d': lambda: ConvModule(
        4, 6, 3, conv_cfg=dict(type='Conv'), norm_cfg=BN),
    'mmcv Conv2d': lambda: nn.Sequential(MMCVConv2d(4, 6, 3),
                                         nn.BatchNorm2d(6)),
    'ConvModule 3d': lambda: ConvModule(
        4, 6, 3, conv_cfg=dict(type='Conv3d'), norm_cfg=dict(type='BN3d')),
}


def prepared(model):
    torch.manual_seed(0)
    return randomize(model).double().eval()


@pytest.mark.parametrize('build', PAIRS.values(), ids=PAIRS)
def test_pair_is_fused_and_equals_stock(build):
    model = prepared(build())
    stock = stock_copy(model)
    dim = model[0].weight.dim() - 2 if isinstance(
        model, nn.Sequential) else model.conv.weight.dim() - 2
    turn_on(model)
    x = torch.randn(2, 4, *[7] * dim, dtype=torch.float64)
    for shape in (x.shape, (1, *x.shape[1:]), (0, *x.shape[1:])):
        assert_equal_steps(
            step(stock, x[:shape[0]]), step(model, x[:shape[0]]))
    assert runs(model) == ['fused']
    model.train()
    stock.train()
    if not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        assert_equal_steps(step(stock, x), step(model, x))
    model.eval()
    stock.eval()
    assert_equal_steps(step(stock, x), step(model, x))


def test_channels_last():
    model = prepared(pair(bias=False)).to(memory_format=torch.channels_last)
    stock = stock_copy(model)
    turn_on(model)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last)
    assert_equal_steps(step(stock, x), step(model, x))
    assert model(x).is_contiguous(memory_format=torch.channels_last)


def test_depthwise_separable_block():
    model = prepared(DepthwiseSeparableConvModule(4, 6, 3, norm_cfg=BN))
    stock = stock_copy(model)
    turn_on(model)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused', 'fused']


def test_norm_skipped_by_an_argument():
    model = prepared(ConvModule(4, 6, 3, norm_cfg=BN))
    stock = stock_copy(model)
    turn_on(model)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    for arguments in (dict(norm=False), dict(activate=False),
                      dict(norm=False, activate=False)):

        def call(m, x, arguments=arguments):
            y = m(x, **arguments)
            assert type(y) is torch.Tensor
            return y

        assert_equal_steps(step(stock, x, call), step(model, x, call))


def test_own_option_of_mmcv_switched_on_later():
    """MMCV then runs the block itself, without calling the BN."""
    model = prepared(ConvModule(4, 6, 3, norm_cfg=BN))
    stock = stock_copy(model)
    turn_on(model)
    model.turn_on_efficient_conv_bn_eval()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['not run']
