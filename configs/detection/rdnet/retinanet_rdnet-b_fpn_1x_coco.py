_base_ = './retinanet_rdnet-t_fpn_1x_coco.py'

model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint='timm://rdnet_base.nv_in1k')),
    neck=dict(in_channels=[584, 1000, 1760]))
