# The published recipe: 350 epochs, 8 GPUs x 128 images; connections are pruned in the first half.
_base_ = ['../_base_/imagenet_randaug.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmdense.CondenseNetV2', arch='a', out_indices=(4,)),
    neck=dict(type='mmdense.CondenseNetV2Neck', in_channels=800, hidden_channels=828),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=828,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)

max_epochs = 350
train_cfg = dict(type='mmdense.EpochBasedTrainLoop', max_epochs=max_epochs)
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.4, momentum=0.9, nesterov=True, weight_decay=4e-5),
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
# As timm's: the cosine counts from the first epoch, and the rate changes between epochs.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.25, end=6),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min=1e-5),
]
custom_hooks = [
    dict(type='mmdense.CondenseScheduleHook'),
    dict(type='EMAHook', momentum=2e-4, update_buffers=True, priority='ABOVE_NORMAL'),
]
auto_scale_lr = dict(enable=False, base_batch_size=1024)
