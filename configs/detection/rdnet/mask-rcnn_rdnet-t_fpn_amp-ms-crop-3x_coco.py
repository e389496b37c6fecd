_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', '../_base_/coco-instance_ms-crop-3x.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.RDNet',
        arch='tiny',
        output_norm=True,
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='timm://rdnet_tiny.nv_in1k')),
    neck=dict(
        in_channels=[256, 440, 744, 1040], norm_cfg=dict(type='SyncBN', requires_grad=True)))

# The released learning rate scales: heads get 0.95 ** -2 = 1.11 times lr.
optim_wrapper = dict(
    optimizer=dict(lr=3e-4, weight_decay=0.05),
    paramwise_cfg=dict(decay_rate=0.95, mode='published'))
_base_.param_scheduler[0].end = 1500
