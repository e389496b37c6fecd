_base_ = './upernet_densenet-121_160k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='201', init_cfg=dict(checkpoint='timm://densenet201.tv_in1k')),
    decode_head=dict(in_channels=[256, 512, 1792, 1920]),
    auxiliary_head=dict(in_channels=1792))
