_base_ = './faster-rcnn_condensenetv2-a_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='b',
        init_cfg=dict(checkpoint='condensenetv2://checkpoints/condensenetv2-b_converted.pth')),
    neck=dict(in_channels=[72, 216, 600, 1176]))
