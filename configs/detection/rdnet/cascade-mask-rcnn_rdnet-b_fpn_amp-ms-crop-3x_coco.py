_base_ = './cascade-mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='base', drop_path_rate=0.6, init_cfg=dict(checkpoint='timm://rdnet_base.nv_in1k')),
    neck=dict(in_channels=[408, 584, 1000, 1760]))
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7))
