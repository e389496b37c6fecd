_base_ = './retinanet_densenet-121_fpn_1x_coco.py'

model = dict(
    backbone=dict(arch='201', init_cfg=dict(checkpoint='timm://densenet201.tv_in1k')),
    neck=dict(in_channels=[512, 1792, 1920]))
