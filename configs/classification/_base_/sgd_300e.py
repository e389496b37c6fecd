# 300 epochs, 64 images: the rate falls to a tenth at a half and at three quarters.
max_epochs = 300
train_cfg = dict(type='mmdense.EpochBasedTrainLoop', max_epochs=max_epochs)
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
)
param_scheduler = [dict(type='MultiStepLR', milestones=[150, 225], gamma=0.1)]
auto_scale_lr = dict(enable=False, base_batch_size=64)
