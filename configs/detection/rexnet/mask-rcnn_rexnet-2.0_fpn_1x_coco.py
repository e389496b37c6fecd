_base_ = './mask-rcnn_rexnet-1.0_fpn_1x_coco.py'

model = dict(
    backbone=dict(arch='2.0', init_cfg=dict(checkpoint='timm://rexnet_200.nav_in1k')),
    neck=dict(in_channels=[77, 122, 257, 370]))
