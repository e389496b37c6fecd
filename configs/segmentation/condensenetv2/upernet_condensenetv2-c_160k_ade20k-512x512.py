_base_ = [
    '../_base_/upernet_rdnet-t.py', '../_base_/ade20k_512x512.py', '../_base_/sgd_160k.py',
    '../_base_/default_runtime.py'
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type='mmdense.CondenseNetV2',
        arch='c',
        form='condensed',
        norm_cfg=dict(type='SyncBN'),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='condensenetv2://checkpoints/condensenetv2-c_converted.pth')),
    decode_head=dict(in_channels=[144, 400, 1040, 2064]),
    auxiliary_head=dict(in_channels=1040))
