# No segmentor of this size was published: B's recipe with exact layer decay.
_base_ = './upernet_rdnet-b_amp-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='large', init_cfg=dict(checkpoint='timm://rdnet_large.nv_in1k')),
    decode_head=dict(in_channels=[528, 840, 1528, 2000]),
    auxiliary_head=dict(in_channels=1528))
optim_wrapper = dict(paramwise_cfg=dict(mode='exact'))
