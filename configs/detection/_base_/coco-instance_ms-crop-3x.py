# RDNet's published recipe: COCO boxes and masks, 36 epochs in mixed precision, multi-scale resize and
# crops, 4 GPUs x 4 images. Recipes set lr, weight_decay and decay_rate.
_base_ = [
    'mmdet::_base_/datasets/coco_instance.py', 'mmdet::_base_/schedules/schedule_1x.py',
    './default_runtime.py'
]

scales = [(height, 1333) for height in range(480, 801, 32)]
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=_base_.backend_args),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            [dict(type='RandomChoiceResize', scales=scales, keep_ratio=True)],
            [
                dict(
                    type='RandomChoiceResize',
                    scales=[(400, 1333), (500, 1333), (600, 1333)],
                    keep_ratio=True),
                dict(
                    type='RandomCrop',
                    crop_type='absolute_range',
                    crop_size=(384, 600),
                    allow_negative_crop=True),
                dict(type='RandomChoiceResize', scales=scales, keep_ratio=True)
            ]
        ]),
    dict(type='PackDetInputs')
]
train_dataloader = dict(
    batch_size=4, num_workers=8, pin_memory=True, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(pin_memory=True)
test_dataloader = val_dataloader

max_epochs = 36
train_cfg = dict(type='mmdense.EpochBasedTrainLoop', max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(
        type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[27, 33], gamma=0.1)
]
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale=dict(init_scale=512),
    constructor='mmdense.LayerDecayOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', betas=(0.9, 0.999)))
