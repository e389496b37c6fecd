_base_ = './faster-rcnn_condensenetv2-a_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='c',
        init_cfg=dict(checkpoint='condensenetv2://checkpoints/condensenetv2-c_converted.pth')),
    neck=dict(in_channels=[144, 400, 1040, 2064]))
