# A small, narrow segmentor that trains in minutes on two CPU cores. It separates digits from
# background; in that time, networks of this size don't learn the ten digits from scratch
# (docs/decisions.md).
_base_ = [
    '../_base_/upernet_rdnet-t.py', '../_base_/digits_segmentation.py',
    '../_base_/default_runtime.py'
]

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(192, 192)),
    backbone=dict(
        _delete_=True,
        type='mmdense.RDNet',
        arch=dict(
            stem=32, growth=(16, 32, 48), down=(1, 2), blocks=2, gate_from=2, layer_scale=1.0),
        out_indices=(0, 1, 2)),
    decode_head=dict(
        in_channels=[64, 96, 144],
        in_index=[0, 1, 2],
        channels=32,
        num_classes=2,
        norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=144, channels=32, num_classes=2, norm_cfg=norm_cfg))

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    # Digits cover 7 % of the pixels: the classifier's bias needs a high learning rate.
    paramwise_cfg=dict(
        flat_decay_mult=0.0, custom_keys=dict(conv_seg=dict(lr_mult=10.0, decay_mult=0.0))),
    clip_grad=dict(max_norm=10.0))
max_iters = 400
train_cfg = dict(type='mmdense.IterBasedTrainLoop', max_iters=max_iters, val_interval=100)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=1e-5, power=1.0, begin=100, end=max_iters, by_epoch=False)
]

default_hooks = dict(checkpoint=dict(interval=max_iters))
custom_hooks = [dict(type='mmdense.ChannelsLastHook')]
auto_scale_lr = dict(enable=False, base_batch_size=8)
randomness = dict(seed=0)
