_base_ = './densenet-bc-100-k12_300e_cifar10.py'

model = dict(
    backbone=dict(arch=dict(growth_rate=24, layers=(41, 41, 41))), head=dict(in_channels=1734)
)
