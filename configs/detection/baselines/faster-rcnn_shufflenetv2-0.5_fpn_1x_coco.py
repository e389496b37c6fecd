_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/coco_sgd-1x.py']

# Frozen: the stages up to stride 4.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.ShuffleNetV2',
        arch='0.5',
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained', checkpoint='torchvision://shufflenet_v2_x0_5.imagenet1k_v1')),
    neck=dict(in_channels=[24, 48, 96, 192]))
