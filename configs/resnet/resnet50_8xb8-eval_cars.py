_base_ = './resnet50_8xb8_cars.py'

model = dict(backbone=dict(norm_eval=True))
