"""Every backbone, neck and head of MMDetection against stock."""
import gc
from collections import Counter

import pytest
import torch
from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack
from torch import distributed, nn

from mmtune import turn_on
from mmtune.api import latest_runs
from mmtune.report import Report
from tests import zoo
from tests.operators import BatchNormCalls
from tests.oracle import assert_equal_steps, step

# Tried in this order: some models ask for more than others.
IMAGE_SIZES = (64, 128, 256)
# Larger ones take long in a sample.
MOST_PARAMETERS = 30_000_000
# So that no test comes near the time after which it is taken to hang.
SHARES = 4
# The class of a part, the config that has it.
SAMPLE = [
    ('CSPDarknet', 'yolox/yolox_nano_8xb8-300e_coco.py'),
    ('MobileNetV2', 'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py'),
    ('MobileNetV2', 'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py'),
    ('CSPNeXt', 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py'),
    ('RegNet', 'regnet/cascade-mask-rcnn_regnetx-400MF_fpn_ms-3x_coco.py'),
    ('ResNet', 'faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py'),
    ('TridentResNet', 'tridentnet/tridentnet_r50-caffe_1x_coco.py'),
    ('HRNet', 'hrnet/cascade-mask-rcnn_hrnetv2p-w18_20e_coco.py'),
    ('EfficientNet',
     'efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py'),
    ('RegNet', 'regnet/mask-rcnn_regnetx-3.2GF-mdconv-c3-c5_fpn_1x_coco.py'),
    ('DetectoRS_ResNet', 'detectors/cascade-rcnn_r50-rfp_1x_coco.py'),
    ('ResNet', 'dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py'),
    ('ResNeSt',
     'resnest/cascade-mask-rcnn_s50_fpn_syncbn-backbone+head_ms-1x_coco.py'),
    ('ResNet', 'gcnet/mask-rcnn_r50-gcb-r16-c3-c5_fpn_1x_coco.py'),
    ('ResNet', 'empirical_attention/faster-rcnn_r50-attn0010_fpn_1x_coco.py'),
    ('ResNet', 'empirical_attention/faster-rcnn_r50-attn1111_fpn_1x_coco.py'),
    ('YOLOXPAFPN', 'yolox/yolox_nano_8xb8-300e_coco.py'),
    ('SSDNeck', 'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py'),
    ('YOLOV3Neck', 'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py'),
    ('CSPNeXtPAFPN', 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py'),
    ('CTResNetNeck', 'centernet/centernet_r18_8xb16-crop512-140e_coco.py'),
    ('CTResNetNeck',
     'centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py'),
    ('FPN', 'fpg/faster-rcnn_r50_fpn_crop640-50e_coco.py'),
    ('DilatedEncoder', 'yolof/yolof_r50-c5_8xb8-1x_coco.py'),
    ('FPG', 'fpg/faster-rcnn_r50_fpg-chn128_crop640-50e_coco.py'),
    ('NASFCOS_FPN',
     'nas_fcos/nas-fcos_r50-caffe_fpn_fcoshead-gn-head_4xb4-1x_coco.py'),
    ('RFP', 'detectors/cascade-rcnn_r50-rfp_1x_coco.py'),
    ('NASFPN', 'nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py'),
    ('YOLOXHead', 'yolox/yolox_nano_8xb8-300e_coco.py'),
    ('YOLOV3Head', 'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py'),
    ('RTMDetSepBNHead', 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py'),
    ('RTMDetInsSepBNHead', 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py'),
    ('SSDHead', 'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py'),
    ('CondInstMaskHead',
     'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py'),
    ('FCNMaskHead', 'fpg/mask-rcnn_r50_fpg-chn128_crop640-50e_coco.py'),
    ('FCNMaskHead',
     'simple_copy_paste/'
     'mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_32xb2-ssj-270k_coco.py'),
    ('RetinaSepBNHead', 'fpg/retinanet_r50_fpg-chn128_crop640_50e_coco.py'),
    ('DynamicMaskHead',
     'queryinst/queryinst_r101_fpn_300-proposals_crop-ms-480-800-3x_coco.py'),
    ('CornerHead',
     'cornernet/cornernet_hourglass104_10xb5-crop511-210e-mstest_coco.py'),
    ('ResLayer', 'faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py'),
    ('Shared4Conv1FCBBoxHead',
     'resnest/cascade-mask-rcnn_s101_fpn_syncbn-backbone+head_ms-1x_coco.py'),
    ('ConvFCBBoxHead',
     'convnext/'
     'cascade-mask-rcnn_convnext-s-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'),
    ('YOLOFHead', 'yolof/yolof_r50-c5_8xb8-1x_coco.py'),
    ('CentripetalHead',
     'centripetalnet/'
     'centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco.py'),
    ('DoubleConvFCBBoxHead', 'double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py'),
]


@pytest.fixture(scope='module', autouse=True)
def process_group():
    """Without one MMCV's own SyncBN cannot be built."""
    distributed.init_process_group(
        'gloo', store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize('kind, source', SAMPLE)
def test_sample_of_mmdet(kind, source):
    found = zoo.collect('mmdet', sources=(source, )).normalized
    part, *_ = (part for part in found if part.type == kind)
    eligible, left = compare(part)
    assert len(left) <= 0.01 * eligible, left


@pytest.mark.exhaustive
def test_each_class_that_occurs_in_small_parts_is_in_the_sample():
    assert SAMPLE == [(part.type, part.source) for role in zoo.ROLES
                      for part in zoo.sample(parts('mmdet', role))
                      if part.size <= MOST_PARAMETERS]


@pytest.mark.exhaustive
@pytest.mark.parametrize('share', range(SHARES))
def test_every_part_of_mmdet(share, subtests):
    sweep(parts('mmdet', *zoo.ROLES)[share::SHARES], subtests)


@pytest.mark.exhaustive
def test_every_backbone_of_mmseg(subtests):
    sweep(parts('mmseg', 'backbone'), subtests)


@pytest.mark.exhaustive
@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
def test_what_cannot_be_had_here(package, subtests):
    """Skips, with its reason, what the tests above do not sweep."""
    for name, reason in collect(package).missing.items():
        with subtests.test(name):
            pytest.skip(f'{type(reason).__name__}: {reason}')


def collect(package):
    try:
        zoo.registry(package)
    except ImportError as error:
        pytest.skip(f'{package} cannot be imported: {error}')
    return zoo.collect(package)


def parts(package, *roles):
    return [p for p in collect(package).normalized if p.role in roles]


def sweep(parts, subtests):
    """Compare each part with stock, and count what is fused in all."""
    eligible, left = 0, []
    for part in parts:
        with subtests.test(str(part)):
            of_part, left_of_part = compare(part)
            eligible += of_part
            left += left_of_part
        gc.collect()  # modules, graphs and tracebacks refer to each other
    fused = eligible - len(left)
    print(f'{fused} of {eligible} eligible calls are fused in {len(parts)} '
          'models, all but', *left, sep='\n')
    assert eligible
    assert fused >= 0.99 * eligible


def compare(part):
    """Compare a part with stock: outputs, gradients, and what is fused.

    Returns:
        tuple[int, list[str]]: How many calls are eligible, and those of them
        that are not fused, each with the reason that mmtune gives.
    """
    stock, model = zoo.build(part), zoo.build(part)
    report = turn_on_if_any(model)
    expected, before, args = first_step(part, stock)
    actual, after = watched_step(model, args)
    assert all(value.isfinite().all() for value in expected.values()
               if value is not None)
    assert_equal_steps(expected, actual)
    eligible = before.eligible
    fused = before.convolved - after.convolved
    assert fused <= eligible
    check_account(stock, model, report, eligible, fused)
    reasons = {row.bn: row.reason for row in report.rows}
    return eligible.total(), [
        f'{part}: {name} ({reasons.get(name, "nothing is turned on")})'
        for name in (eligible - fused).elements()
    ]


def turn_on_if_any(model):
    try:
        return turn_on(model, norm_eval=True)
    except ValueError as error:
        assert 'There is nothing to put into Tune mode' in str(error)
        return Report('Tune')


def first_step(part, model):
    """A step at the smallest image that the model takes."""
    for size in IMAGE_SIZES:
        args = zoo.inputs(part, model, size)
        try:
            return *watched_step(model, args), args
        except (RuntimeError, ValueError) as error:
            reason = error
    raise reason


def watched_step(model, args):
    calls = BatchNormCalls(model)
    torch.manual_seed(2)  # for the paths that it drops
    result = step(model, args, lambda _, args: calls.run(*args))
    return result, calls


def check_account(stock, model, report, eligible, fused):
    """What mmtune says of itself is what was counted."""
    says = {k for k, ran in latest_runs(model).items() if ran == 'fused'}
    assert says == {k for k in eligible if fused[k] == eligible[k]}
    assert says <= {row.bn for row in report.rewritten}
    if report.rows:
        rows = {row.bn for row in report.rows}
        assert rows >= zoo.norms(stock).keys()
    assert all(row.reason for row in report.left_out)


# --------------------------------------------------------------------------
# Parts of a config
# --------------------------------------------------------------------------

HEAD = dict(type='Head')
# name: a model in a config, the parts that are found in it
PARTS = {
    'a part': (dict(neck=HEAD), [('neck', HEAD)]),
    'of a detector inside': (dict(detector=dict(backbone=HEAD)),
                             [('backbone', HEAD)]),
    'heads in a head': (dict(roi_head=dict(type='RoI', bbox_head=[HEAD])),
                        [('head', HEAD)]),
    'what a head makes several of': (
        dict(bbox_head=dict(type='Center', separate_head=HEAD)),
        [('head', dict(type='Center', separate_head=HEAD))]),
    'of another package': (
        dict(_scope_='mmdet', neck=HEAD),
        [('neck', dict(type='Head', _scope_='mmdet'))]),
    'no role': (dict(data_preprocessor=HEAD), []),
}


@pytest.mark.parametrize('case', PARTS.values(), ids=PARTS)
def test_finds_parts(case):
    config, parts = case
    assert list(zoo._parts(config, zoo.ROLES)) == parts


def test_builds_without_weights():
    settings = dict(pretrained=True, flow=[dict(flow_pretrained='a.pth')],
                    depth=50)
    assert zoo._without_weights(settings) == dict(
        pretrained=False, flow=[dict(flow_pretrained=None)], depth=50)


# --------------------------------------------------------------------------
# The count itself, where the truth is known
# --------------------------------------------------------------------------


class TwoReaders(nn.Module):
    """The normalization is not all that sees the convolution."""

    def __init__(self, second):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.second = second

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y), self.second(y)


class AfterSum(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x) + x)


class SharedConv(nn.Module):
    """A normalization for each level, as in RTMDet."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        return [bn(self.conv(x)) for bn in self.bns]


def sequence(*layers):
    return nn.Sequential(*layers)


IMAGE = (2, 3, 8, 8)
# name: model, shape of its input, eligible calls, calls after a convolution
COUNTS = {
    'conv and BN': (sequence(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGE,
                    {'1': 1}, {'1': 1}),
    'Conv1d': (sequence(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 8),
               {'1': 1}, {'1': 1}),
    'Conv3d': (sequence(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)),
               (2, 3, 8, 8, 8), {'1': 1}, {'1': 1}),
    'transposed': (sequence(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)),
                   IMAGE, {'1': 1}, {'1': 1}),
    'Linear': (sequence(nn.Linear(3, 4), nn.BatchNorm1d(4)), (2, 3),
               {'1': 1}, {'1': 1}),
    'Linear without bias': (sequence(
        nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)), (2, 3), {'1': 1},
                            {'1': 1}),
    'deformable': (sequence(
        DeformConv2dPack(3, 4, 3), nn.BatchNorm2d(4)), IMAGE, {'1': 1},
                   {'1': 1}),
    'modulated': (sequence(
        ModulatedDeformConv2dPack(3, 4, 3), nn.BatchNorm2d(4)), IMAGE,
                  {'1': 1}, {'1': 1}),
    'BN alone': (sequence(nn.BatchNorm2d(3)), IMAGE, {}, {}),
    'BN after BN': (sequence(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), IMAGE,
                    {'1': 1}, {'1': 1}),
    'BN after ReLU': (sequence(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), IMAGE, {}, {}),
    'BN after ReLU in place': (sequence(
        nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4)), IMAGE,
                               {}, {'2': 1}),
    'BN after a sum': (AfterSum(), IMAGE, {}, {}),
    'another reader': (TwoReaders(nn.ReLU()), IMAGE, {}, {'bn': 1}),
    'a reader in an extension': (TwoReaders(DeformConv2dPack(3, 3, 1)),
                                 IMAGE, {}, {'bn': 1}),
    'output of the model': (TwoReaders(nn.Identity()), IMAGE, {}, {'bn': 1}),
    'a BN for each level': (SharedConv(), IMAGE,
                            {f'bns.{i}': 1 for i in range(3)},
                            {f'bns.{i}': 1 for i in range(3)}),
    'without statistics': (sequence(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
                           IMAGE, {}, {}),
}


@pytest.mark.parametrize('case', COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize('grad', [False, True])
def test_counts_operators(case, grad):
    model, shape, eligible, convolved = case
    calls = BatchNormCalls(model.eval())
    with torch.set_grad_enabled(grad):
        calls.run(torch.randn(shape))
    assert calls.eligible == Counter(eligible)
    assert calls.convolved == Counter(convolved)


def test_counts_each_call():
    bn = nn.BatchNorm2d(3)
    model = sequence(nn.Conv2d(3, 3, 1), bn, nn.Conv2d(3, 3, 1), bn).eval()
    calls = BatchNormCalls(model)
    calls.run(torch.randn(IMAGE))
    assert calls.eligible == Counter({'1': 2})


def test_counts_nothing_in_train_mode():
    model = sequence(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    calls = BatchNormCalls(model)
    calls.run(torch.randn(IMAGE))
    assert not calls.convolved
