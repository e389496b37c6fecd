_base_ = './faster-rcnn_shufflenetv2-0.5_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='1.5',
        init_cfg=dict(checkpoint='torchvision://shufflenet_v2_x1_5.imagenet1k_v1')),
    neck=dict(in_channels=[24, 176, 352, 704]))
