# The layout of CondenseNet's CIFAR networks with groups of 8, which has the published parameters;
# the settings of CondenseNet. Neither was released.
_base_ = ['../_base_/cifar100.py', '../_base_/sgd_300e.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmdense.CondenseNetV2',
        arch=dict(
            layers=(18, 18, 18), growth=(8, 16, 32), stem_stride=1, hard_swish_from=3, gated_from=3
        ),
        out_indices=(2,),
    ),
    neck=dict(type='mmdense.CondenseNetV2Neck', in_channels=1024),
    head=dict(type='LinearClsHead', num_classes=100, in_channels=1024),
)

param_scheduler = [
    dict(type='CosineAnnealingLR', T_max=_base_.max_epochs, convert_to_iter_based=True)
]
custom_hooks = [dict(type='mmdense.CondenseScheduleHook')]
