_base_ = './faster-rcnn_r101_fpn_amp-1x_coco.py'

# The learning rate stays at the value for the inherited base_batch_size of 16;
# train with --auto-scale-lr to scale it linearly to 8 GPUs x 16 images.
train_dataloader = dict(batch_size=16)
