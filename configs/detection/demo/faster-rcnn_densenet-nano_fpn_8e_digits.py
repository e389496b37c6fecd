# A narrow DenseNet-121: three blocks, a third of the growth rate, half of the layers.
_base_ = './faster-rcnn_rdnet-nano_fpn_8e_digits.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.DenseNet',
        arch=dict(growth_rate=12, layers=(4, 8, 12)),
        tap='activated'),
    neck=dict(in_channels=[72, 132, 210]))
