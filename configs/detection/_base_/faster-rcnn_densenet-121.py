_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'

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
