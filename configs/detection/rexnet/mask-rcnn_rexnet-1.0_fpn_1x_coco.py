_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', '../_base_/coco-instance_sgd-1x.py']

# Frozen: the stages up to stride 4.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.ReXNet',
        arch='1.0',
        frozen_stages=2,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='timm://rexnet_100.nav_in1k')),
    neck=dict(in_channels=[38, 61, 128, 185]))
