_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', '../_base_/coco-instance_sgd-1x.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.DenseNet',
        arch='121',
        tap='activated',
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='timm://densenet121.ra_in1k')),
    neck=dict(in_channels=[256, 512, 1024, 1024]))
