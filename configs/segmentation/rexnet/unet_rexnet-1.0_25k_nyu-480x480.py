# Depth in metres, up to ten. The network was published without a recipe; this one is mmdense's.
_base_ = [
    '../_base_/unet_rexnet-1.0.py', '../_base_/nyu_480x480.py', '../_base_/default_runtime.py'
]

model = dict(
    type='DepthEstimator',
    data_preprocessor=dict(size=(480, 480), seg_pad_val=0),
    decode_head=dict(
        _delete_=True,
        type='mmdense.ReXUNetDepthHead',
        in_channels=[16, 27, 50, 72, 140, 1280],
        max_depth=10.0))

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0),
    clip_grad=dict(max_norm=35.0))
max_iters = 25000
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=500, by_epoch=False),
    dict(type='PolyLR', power=0.9, eta_min=1e-6, begin=500, end=max_iters, by_epoch=False)
]
train_cfg = dict(type='mmdense.IterBasedTrainLoop', max_iters=max_iters, val_interval=2500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    checkpoint=dict(interval=2500, save_best='rmse', rule='less', max_keep_ckpts=1))
auto_scale_lr = dict(enable=False, base_batch_size=8)
