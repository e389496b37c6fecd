# ReXNet has no dilated convolutions: ASPP reads stride 32, with half of the dilations used for
# stride 16.
_base_ = [
    '../_base_/upernet_rdnet-t.py', '../_base_/ade20k_512x512.py', '../_base_/sgd_160k.py',
    '../_base_/default_runtime.py'
]

norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type='mmdense.ReXNet',
        arch='1.0',
        init_cfg=dict(type='Pretrained', checkpoint='timm://rexnet_100.nav_in1k')),
    decode_head=dict(
        _delete_=True,
        type='DepthwiseSeparableASPPHead',
        in_channels=185,
        in_index=3,
        channels=256,
        dilations=(1, 3, 6, 9),
        c1_in_channels=38,
        c1_channels=48,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(in_channels=128))
# Squeeze-excite norms see one value per image: SyncBN uses the images of all GPUs.
sync_bn = 'torch'
