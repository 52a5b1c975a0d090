_base_ = ['./faster-rcnn_r101_fpn_8xb8-amp-1x_coco.py', '../_base_/tune_mode.py']

default_hooks = dict(tune_mode=dict(type='mmtune.TuneModeHook'))
