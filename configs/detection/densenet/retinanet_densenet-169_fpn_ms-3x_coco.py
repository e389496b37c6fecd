_base_ = './retinanet_densenet-121_fpn_ms-3x_coco.py'

model = dict(
    backbone=dict(arch='169', init_cfg=dict(checkpoint='timm://densenet169.tv_in1k')),
    neck=dict(in_channels=[512, 1280, 1664]))
