# mmdet's SSDLite for MobileNetV2: six levels, of which the first two are ReXNet's stride 16 and its
# last convolution, and its schedule (120 epochs over five copies of the data set).
_base_ = 'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py'

custom_imports = dict(imports=['mmdense'])
train_dataloader = dict(pin_memory=True)
val_dataloader = dict(pin_memory=True)
test_dataloader = val_dataloader
act_cfg = dict(inplace=False)  # in training ReLU6 would copy what it overwrites
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.ReXNet',
        arch='1.0',
        out_indices=(3, 5),
        init_cfg=dict(type='Pretrained', checkpoint='timm://rexnet_100.nav_in1k')),
    neck=dict(
        in_channels=(128, 1280),
        out_channels=(128, 1280, 512, 256, 256, 128),
        act_cfg=act_cfg),
    bbox_head=dict(
        type='mmdense.SSDHead',
        in_channels=(128, 1280, 512, 256, 256, 128),
        act_cfg=act_cfg))
