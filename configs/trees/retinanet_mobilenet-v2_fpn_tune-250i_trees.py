_base_ = ['./retinanet_mobilenet-v2_fpn_250i_trees.py', '../_base_/tune_mode.py']

default_hooks = dict(tune_mode=dict(type='mmtune.TuneModeHook'))
