# "MobileNet 1.0x" of the published comparison has 300 M MACs, as MobileNetV2 does; V1 has 569 M.
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/coco_sgd-1x.py']

# Frozen: the stages up to stride 4.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.TimmBackbone',
        model_name='mobilenetv2_100',
        frozen_stages=2,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='timm://mobilenetv2_100.ra_in1k')),
    neck=dict(in_channels=[24, 32, 96, 320]))
