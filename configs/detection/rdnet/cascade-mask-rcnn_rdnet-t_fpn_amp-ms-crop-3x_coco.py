_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py', '../_base_/coco-instance_ms-crop-3x.py'
]

norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.RDNet',
        arch='tiny',
        output_norm=True,
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='timm://rdnet_tiny.nv_in1k')),
    neck=dict(in_channels=[256, 440, 744, 1040], norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=[
            dict(
                head,
                type='ConvFCBBoxHead',
                num_shared_convs=4,
                num_shared_fcs=1,
                conv_out_channels=256,
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                norm_cfg=norm_cfg,
                loss_bbox=dict(type='GIoULoss', loss_weight=10.0))
            for head in _base_.model.roi_head.bbox_head
        ]))

# The released learning rate scales: they count 7 stages for every size and put the heads after the
# last depth, so that heads get 0.8 ** -2 = 1.56 times lr here.
optim_wrapper = dict(
    optimizer=dict(lr=8e-5, weight_decay=0.05),
    paramwise_cfg=dict(decay_rate=0.8, mode='published'))
