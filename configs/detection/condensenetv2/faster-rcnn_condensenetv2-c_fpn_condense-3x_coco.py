# Scheduled pruning: the detector learns which connections to keep during the first half of training.
# No unpruned weights were released; put your own (form='learned') into init_cfg.
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/coco_sgd-ms-3x.py']

# Trained from scratch, batch norms need more than two images per GPU.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.CondenseNetV2',
        arch='c',
        form='learned',
        norm_cfg=dict(type='SyncBN')),
    neck=dict(in_channels=[144, 400, 1040, 2064]))
custom_hooks = [dict(type='mmdense.CondenseScheduleHook')]
