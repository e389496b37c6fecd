_base_ = './retinanet_densenet-121_fpn_ms-3x_coco.py'

model = dict(
    backbone=dict(arch='161', init_cfg=dict(checkpoint='timm://densenet161.tv_in1k')),
    neck=dict(in_channels=[768, 2112, 2208]))
