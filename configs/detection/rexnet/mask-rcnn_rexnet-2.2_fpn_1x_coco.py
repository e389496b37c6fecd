# Its ImageNet weights were not released: put your own into init_cfg, and freeze as the recipe of 1.0.
_base_ = './mask-rcnn_rexnet-1.0_fpn_1x_coco.py'

model = dict(
    backbone=dict(arch='2.2', frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[85, 134, 283, 406]))
