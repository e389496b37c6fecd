# An example of scheduled pruning, untried on COCO: a detector learns which connections to keep during
# the first half of its training. No unpruned weights were released: those of your own, of form
# 'learned', go into init_cfg.
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/coco_sgd-ms-3x.py']

# From scratch, batch norms learn their statistics, and two images per GPU are too few for them.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.CondenseNetV2',
        arch='c',
        form='learned',
        norm_cfg=dict(type='SyncBN')),
    neck=dict(in_channels=[144, 400, 1040, 2064]))
custom_hooks = [dict(type='mmdense.CondenseScheduleHook')]
