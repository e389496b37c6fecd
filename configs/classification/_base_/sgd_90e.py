# 90 epochs, 4 GPUs x 64 images: the rate falls to a tenth at 30 and 60 epochs.
max_epochs = 90
train_cfg = dict(type='mmdense.EpochBasedTrainLoop', max_epochs=max_epochs)
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
)
param_scheduler = [dict(type='MultiStepLR', milestones=[30, 60], gamma=0.1)]
auto_scale_lr = dict(enable=False, base_batch_size=256)
