_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/coco_adamw-1x.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.RDNet',
        arch='tiny',
        output_norm=True,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='timm://rdnet_tiny.nv_in1k')),
    neck=dict(in_channels=[256, 440, 744, 1040]))
