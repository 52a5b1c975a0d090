_base_ = 'mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')

# The learning rate stays at the value for the inherited base_batch_size of 16;
# train with --auto-scale-lr to scale it linearly to 8 GPUs x 16 images.
train_dataloader = dict(batch_size=16)
