_base_ = './cascade-mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint='timm://rdnet_small.nv_in1k')),
    neck=dict(in_channels=[264, 512, 760, 1264]))
optim_wrapper = dict(optimizer=dict(weight_decay=0.1), paramwise_cfg=dict(decay_rate=0.7))
