_base_ = ['./resnet50_8xb8-eval_cars.py', '../_base_/tune_mode.py']

default_hooks = dict(tune_mode=dict(type='mmtune.TuneModeHook'))
