_base_ = './faster-rcnn_densenet-121_fpn_ms-3x_coco.py'

model = dict(
    backbone=dict(arch='161', init_cfg=dict(checkpoint='timm://densenet161.tv_in1k')),
    neck=dict(in_channels=[384, 768, 2112, 2208]))
