# The published comparison's "MobileNet 1.0x" of 300 M multiply-adds; V1 of that width has 569 M.
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/coco_sgd-1x.py']

# Frozen: what the map of stride 4 is made of.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.TimmBackbone',
        model_name='mobilenetv2_100',
        frozen_stages=2,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='timm://mobilenetv2_100.ra_in1k')),
    neck=dict(in_channels=[24, 32, 96, 320]))
