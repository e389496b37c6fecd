# The published fine-tuning of RDNet-L at 384 x 384: 4 GPUs x 16 images x 8 accumulated steps, from
# the classifier of 224 x 224. The released head_init_scale=0.001 scales weights that are replaced.
_base_ = './rdnet-l_amp-300e_in1k.py'

model = dict(backbone=dict(drop_path_rate=0.6), train_cfg=None)
load_from = 'timm://rdnet_large.nv_in1k'

for choice in _base_.train_pipeline[1]['transforms']:
    choice[0].update(scale=384)
_base_.test_pipeline[1].update(scale=384)
_base_.test_pipeline[2].update(crop_size=384)
train_dataloader = dict(batch_size=16, dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader

max_epochs = 30
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(
    accumulative_counts=8,
    constructor='mmdense.LayerDecayOptimWrapperConstructor',
    optimizer=dict(lr=2e-5, weight_decay=1e-8),
    paramwise_cfg=dict(_delete_=True, decay_rate=0.7, mode='exact'),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, end=6),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min=1e-6),
]
auto_scale_lr = dict(base_batch_size=64)
