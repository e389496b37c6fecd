# The published command: 400 epochs in mixed precision, 4 GPUs x 128 images. What it leaves out is
# as in timm at that time: label smoothing, and 3 epochs of warm-up.
_base_ = ['../_base_/imagenet_randaug.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmdense.ReXNet', arch='1.0', out_indices=(5,)),
    neck=dict(type='mmdense.ReXNetNeck'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=1280,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)

max_epochs = 400
train_cfg = dict(type='mmdense.EpochBasedTrainLoop', max_epochs=max_epochs)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='SGD', lr=0.5, momentum=0.9, nesterov=True, weight_decay=1e-5),
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
# As timm's: the cosine counts from the first epoch, and the rate changes between epochs.
param_scheduler = [
    dict(type='LinearLR', start_factor=2e-4, end=4),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min=1e-5),
]
auto_scale_lr = dict(enable=False, base_batch_size=512)
