# DenseNet-BC of 100 layers.
_base_ = ['../_base_/cifar10.py', '../_base_/sgd_300e.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmdense.DenseNet',
        arch=dict(growth_rate=12, layers=(16, 16, 16), stem='cifar'),
        out_indices=(2,),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=342),
)
