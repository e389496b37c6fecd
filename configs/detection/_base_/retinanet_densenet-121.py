_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'

# The FPN starts at stride 8.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.DenseNet',
        arch='121',
        tap='activated',
        out_indices=(1, 2, 3),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='timm://densenet121.ra_in1k')),
    neck=dict(in_channels=[512, 1024, 1024], start_level=0))
