_base_ = './densenet-bc-100-k12_300e_cifar100.py'

model = dict(
    backbone=dict(arch=dict(growth_rate=40, layers=(31, 31, 31))), head=dict(in_channels=2190)
)
