_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', '../_base_/coco_adamw-1x.py']

# The FPN starts at stride 8. Output 0 is left out: DDP fails on its unused norm.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.RDNet',
        arch='tiny',
        out_indices=(1, 2, 3),
        output_norm=True,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='timm://rdnet_tiny.nv_in1k')),
    neck=dict(in_channels=[440, 744, 1040], start_level=0))
