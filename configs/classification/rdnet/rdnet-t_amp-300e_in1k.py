# The published recipe: 300 epochs in mixed precision, 4 GPUs x 64 images x 2 accumulated steps.
_base_ = ['../_base_/imagenet_randaug.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmdense.RDNet', arch='tiny', out_indices=(3,), drop_path_rate=0.15),
    neck=dict(type='mmdense.RDNetNeck', in_channels=1040),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=1040,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)

# timm's rand-m9-mstd0.5-inc1: the strength of all transforms rises with the magnitude.
_base_.train_pipeline[3].update(policies='timm_increasing')
_base_.train_pipeline[4].update(erase_prob=0.25)
_base_.test_pipeline[1].update(scale=248)  # a crop of 0.9
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader

max_epochs = 300
train_cfg = dict(type='mmdense.EpochBasedTrainLoop', max_epochs=max_epochs)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    accumulative_counts=2,
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
# As timm's: the cosine counts from the first epoch, and the rate changes between epochs.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, end=21),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min=1e-6),
]
custom_hooks = [dict(type='mmdense.ChannelsLastHook')]
auto_scale_lr = dict(enable=False, base_batch_size=256)
