_base_ = './densenet-bc-100-k12_300e_cifar10.py'

model = dict(backbone=dict(arch=dict(growth_rate=48, layers=(6, 6, 6))), head=dict(in_channels=528))
