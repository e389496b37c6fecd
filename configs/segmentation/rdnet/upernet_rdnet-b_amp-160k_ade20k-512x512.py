_base_ = './upernet_rdnet-t_amp-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='base', drop_path_rate=0.2, init_cfg=dict(checkpoint='timm://rdnet_base.nv_in1k')),
    decode_head=dict(in_channels=[408, 584, 1000, 1760]),
    auxiliary_head=dict(in_channels=1000))
optim_wrapper = dict(optimizer=dict(weight_decay=0.01))
