_base_ = './condensenetv2-110_300e_cifar100.py'

model = dict(
    backbone=dict(arch=dict(layers=(24, 24, 24))),
    neck=dict(in_channels=1360),
    head=dict(in_channels=1360),
)
