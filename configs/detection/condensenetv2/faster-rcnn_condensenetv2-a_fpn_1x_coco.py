_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/coco_sgd-1x.py']

# Frozen: the stages up to stride 4. Condensed: the only released form of A and B.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.CondenseNetV2',
        arch='a',
        form='condensed',
        frozen_stages=2,
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='condensenetv2://checkpoints/condensenetv2-a_converted.pth')),
    neck=dict(in_channels=[32, 96, 288, 800]))
