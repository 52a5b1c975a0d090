_base_ = ['./faster-rcnn_hrnetv2p-w32_1x_coco.py', '../_base_/tune_mode.py']

default_hooks = dict(tune_mode=dict(type='mmtune.TuneModeHook'))
