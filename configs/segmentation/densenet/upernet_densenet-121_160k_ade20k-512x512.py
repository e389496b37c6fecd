_base_ = [
    '../_base_/upernet_rdnet-t.py', '../_base_/ade20k_512x512.py', '../_base_/sgd_160k.py',
    '../_base_/default_runtime.py'
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type='mmdense.DenseNet',
        arch='121',
        tap='activated',
        norm_cfg=dict(type='SyncBN'),
        init_cfg=dict(type='Pretrained', checkpoint='timm://densenet121.ra_in1k')),
    decode_head=dict(in_channels=[256, 512, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024))
