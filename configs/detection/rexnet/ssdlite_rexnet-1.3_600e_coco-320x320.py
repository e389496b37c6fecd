_base_ = './ssdlite_rexnet-1.0_600e_coco-320x320.py'

model = dict(
    backbone=dict(arch='1.3', init_cfg=dict(checkpoint='timm://rexnet_130.nav_in1k')),
    neck=dict(in_channels=(167, 1664), out_channels=(167, 1664, 512, 256, 256, 128)),
    bbox_head=dict(in_channels=(167, 1664, 512, 256, 256, 128)))
