_base_ = 'mmpretrain::resnet/resnet50_8xb8_cub.py'
