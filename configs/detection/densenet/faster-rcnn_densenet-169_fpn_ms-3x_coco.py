_base_ = './faster-rcnn_densenet-121_fpn_ms-3x_coco.py'

model = dict(
    backbone=dict(arch='169', init_cfg=dict(checkpoint='timm://densenet169.tv_in1k')),
    neck=dict(in_channels=[256, 512, 1280, 1664]))
