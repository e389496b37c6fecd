# A narrow CondenseNetV2 of four blocks, pruned to a quarter of its connections during training.
_base_ = './faster-rcnn_rdnet-nano_fpn_8e_digits.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.CondenseNetV2',
        arch=dict(layers=(1, 3, 4, 6), growth=(8, 12, 24, 32), groups=4),
        out_indices=(1, 2, 3)),
    neck=dict(in_channels=[60, 156, 348]))

custom_hooks = [*_base_.custom_hooks, dict(type='mmdense.CondenseScheduleHook')]
