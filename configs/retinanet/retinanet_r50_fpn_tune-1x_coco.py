_base_ = ['./retinanet_r50_fpn_1x_coco.py', '../_base_/tune_mode.py']

default_hooks = dict(tune_mode=dict(type='mmtune.TuneModeHook'))
