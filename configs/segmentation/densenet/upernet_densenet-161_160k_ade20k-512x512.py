_base_ = './upernet_densenet-121_160k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='161', init_cfg=dict(checkpoint='timm://densenet161.tv_in1k')),
    decode_head=dict(in_channels=[384, 768, 2112, 2208]),
    auxiliary_head=dict(in_channels=2112))
