# No detector of this size was published: B's recipe with exact layer decay.
_base_ = './cascade-mask-rcnn_rdnet-b_fpn_amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(arch='large', init_cfg=dict(checkpoint='timm://rdnet_large.nv_in1k')),
    neck=dict(in_channels=[528, 840, 1528, 2000]))
optim_wrapper = dict(paramwise_cfg=dict(mode='exact'))
