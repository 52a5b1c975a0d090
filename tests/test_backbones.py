"""The backbones of MMDetection against stock, in float64."""
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmtune import turn_on
from mmtune.analysis import saved_bytes
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy

HRNET = dict(
    stage1=dict(
        num_modules=1,
        num_branches=1,
        block='BOTTLENECK',
        num_blocks=(4, ),
        num_channels=(64, )),
    stage2=dict(
        num_modules=1,
        num_branches=2,
        block='BASIC',
        num_blocks=(4, 4),
        num_channels=(18, 36)),
    stage3=dict(
        num_modules=4,
        num_branches=3,
        block='BASIC',
        num_blocks=(4, 4, 4),
        num_channels=(18, 36, 72)),
    stage4=dict(
        num_modules=3,
        num_branches=4,
        block='BASIC',
        num_blocks=(4, 4, 4, 4),
        num_channels=(18, 36, 72, 144)))

BACKBONES = {
    'ResNet-18': dict(type='ResNet', depth=18),
    'ResNet-50': dict(type='ResNet', depth=50),
    'ResNet-50 frozen': dict(type='ResNet', depth=50, frozen_stages=2),
    'ResNet-50 caffe, BN frozen': dict(
        type='ResNet',
        depth=50,
        style='caffe',
        norm_cfg=dict(type='BN', requires_grad=False)),
    'ResNet-50 checkpointed': dict(type='ResNet', depth=50, with_cp=True),
    'ResNet-50 SyncBN': dict(
        type='ResNet', depth=50, norm_cfg=dict(type='SyncBN')),
    'ResNetV1d-50': dict(type='ResNetV1d', depth=50),
    'ResNeXt-50': dict(type='ResNeXt', depth=50, groups=32, base_width=4),
    'RegNetX-400MF': dict(type='RegNet', arch='regnetx_400mf'),
    'HRNetV2-W18': dict(type='HRNet', extra=HRNET),
    'Darknet-53': dict(type='Darknet', depth=53),
    'CSPDarknet': dict(type='CSPDarknet', widen_factor=.25),
    'MobileNetV2': dict(type='MobileNetV2'),
}


def build(settings):
    register_all_modules()
    torch.manual_seed(0)
    model = MODELS.build(dict(settings, norm_eval=True))
    model.train()
    return randomize(model)


@pytest.mark.slow
@pytest.mark.parametrize('settings', BACKBONES.values(), ids=BACKBONES)
def test_backbone_equals_stock(settings):
    model = build(settings).double()
    stock = stock_copy(model)
    report = turn_on(model)
    assert not report.left_out
    norms = sum(isinstance(m, _BatchNorm) for m in model.modules())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['fused'] * norms
    assert len(report.rewritten) == norms


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    'ResNet-50', 'ResNeXt-50', 'RegNetX-400MF', 'MobileNetV2',
    pytest.param('HRNetV2-W18', marks=pytest.mark.exhaustive)
])
def test_keeps_what_deploy_keeps(name):
    kept = {}
    x = torch.randn(2, 3, 224, 224)
    for mode in ('Eval', 'Tune', 'Deploy'):
        model = build(BACKBONES[name])
        turn_on(model, mode)
        with saved_bytes(model) as saved:
            outputs = model(x)
        kept[mode] = saved.total
        del outputs
    assert kept['Tune'] <= 1.01 * kept['Deploy'] < 0.75 * kept['Eval']


@pytest.mark.slow
def test_only_the_input_learns():
    """Below Deploy: torch keeps a convolution's input in any case."""
    kept = {}
    x = torch.randn(2, 3, 64, 64).requires_grad_()
    for mode in ('Tune', 'Deploy'):
        model = build(BACKBONES['ResNet-50'])
        turn_on(model, mode)
        model.requires_grad_(False)
        with saved_bytes(model) as saved:
            outputs = model(x)
        kept[mode] = saved.total
        del outputs
    assert kept['Tune'] < kept['Deploy']


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    'ResNet-18', pytest.param('MobileNetV2', marks=pytest.mark.exhaustive)
])
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(BACKBONES[name]).double()
    turn_on(model)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert_equal_steps(
        step(model, x), step(model, x, lambda _, x: compiled(x)))
    counters = torch._dynamo.utils.counters
    assert counters['stats']['unique_graphs'] == 1
    assert not counters['graph_break']


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('grad', [False, True])
def test_compiled_block_in_any_state(training, grad):
    torch._dynamo.reset()
    model = randomize(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).train(training)
    turn_on(model)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), model(x))
    assert runs(model) == ['train mode' if training else 'fused']


@pytest.mark.exhaustive
def test_compiled_block_with_inductor():
    torch._dynamo.reset()
    model = randomize(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))).eval()
    turn_on(model)
    compiled = torch.compile(model, fullgraph=True)
    for size in (9, 12):
        x = torch.randn(2, 3, size, size)
        assert_equal_steps(
            step(model, x), step(model, x, lambda _, x: compiled(x)), 1e-5)
