_base_ = './upernet_rdnet-t_amp-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='small', drop_path_rate=0.2, init_cfg=dict(checkpoint='timm://rdnet_small.nv_in1k')),
    decode_head=dict(in_channels=[264, 512, 760, 1264]),
    auxiliary_head=dict(in_channels=760))
