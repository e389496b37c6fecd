# 160,000 iterations in mixed precision: AdamW with layer decay, warm-up and linear decay to zero.
# Recipes set lr, weight_decay and decay_rate.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    constructor='mmdense.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', betas=(0.9, 0.999)))

max_iters = 160000
# The two are multiplied: the rate decays from the first iteration, as in mmseg 0.x.
param_scheduler = [
    dict(type='LinearLR', start_factor=6e-6, begin=0, end=1500, by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=0, end=max_iters, by_epoch=False)
]
train_cfg = dict(type='mmdense.IterBasedTrainLoop', max_iters=max_iters, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
