_base_ = './retinanet_rdnet-t_fpn_1x_coco.py'

model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint='timm://rdnet_small.nv_in1k')),
    neck=dict(in_channels=[512, 760, 1264]))
