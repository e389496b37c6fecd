_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', '../_base_/coco_sgd-1x.py']

# The FPN starts at stride 8. Frozen: the stages up to stride 4.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.ReXNet',
        arch='1.0',
        out_indices=(2, 3, 4),
        frozen_stages=2,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='timm://rexnet_100.nav_in1k')),
    neck=dict(in_channels=[61, 128, 185], start_level=0))

# Half of the learning rate, as in mmdet's RetinaNet.
optim_wrapper = dict(optimizer=dict(lr=0.01))
