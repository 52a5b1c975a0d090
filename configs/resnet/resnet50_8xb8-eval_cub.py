_base_ = './resnet50_8xb8_cub.py'

model = dict(backbone=dict(norm_eval=True))
