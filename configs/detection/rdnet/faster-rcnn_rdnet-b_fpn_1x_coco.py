_base_ = './faster-rcnn_rdnet-t_fpn_1x_coco.py'

model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint='timm://rdnet_base.nv_in1k')),
    neck=dict(in_channels=[408, 584, 1000, 1760]))
