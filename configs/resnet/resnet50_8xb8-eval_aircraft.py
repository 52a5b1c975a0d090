_base_ = './resnet50_8xb8_aircraft.py'

model = dict(backbone=dict(norm_eval=True))
