_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/trees.py', 'mmdet::_base_/default_runtime.py'
]

norm_cfg = dict(type='GN', num_groups=16, requires_grad=True)
model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(2, 4, 6),
        norm_eval=True,
        # Written by tools/model_converters/mobilenet_v2_to_mmdet.py
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/mobilenet_v2_imagenet.pth')),
    neck=dict(
        _delete_=True,
        type='FPN',
        in_channels=[32, 96, 320],
        out_channels=64,
        num_outs=3,
        norm_cfg=norm_cfg),
    bbox_head=dict(
        num_classes=1,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        # Crowns are about as wide as high, most of them 15 to 75 pixels.
        anchor_generator=dict(
            octave_base_scale=2.5, ratios=[1.0], strides=[8, 16, 32])),
    # Anchors on the cut trees at the border are neither right nor wrong.
    train_cfg=dict(assigner=dict(ignore_iof_thr=0.5)))

train_cfg = dict(type='IterBasedTrainLoop', max_iters=250, val_interval=250)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# README.md tells how these were chosen.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.002, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))),
    clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type='QuadraticWarmupLR', by_epoch=False, end=60),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=60, end=250)
]

default_hooks = dict(
    logger=dict(interval=1),
    checkpoint=dict(by_epoch=False, interval=250, max_keep_ckpts=1))
log_processor = dict(by_epoch=False, window_size=1)
randomness = dict(seed=0)
