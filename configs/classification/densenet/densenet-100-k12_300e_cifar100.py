_base_ = './densenet-40-k12_300e_cifar100.py'

model = dict(backbone=dict(arch=dict(layers=(32, 32, 32))), head=dict(in_channels=1168))
