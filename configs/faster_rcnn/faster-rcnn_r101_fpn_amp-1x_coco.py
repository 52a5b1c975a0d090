_base_ = './faster-rcnn_r101_fpn_1x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')
