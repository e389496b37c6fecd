# coco_sgd-1x with masks.
_base_ = [
    'mmdet::_base_/datasets/coco_instance.py', 'mmdet::_base_/schedules/schedule_1x.py',
    './default_runtime.py'
]

train_cfg = dict(type='mmdense.EpochBasedTrainLoop')
train_dataloader = dict(pin_memory=True)
val_dataloader = dict(pin_memory=True)
test_dataloader = val_dataloader
