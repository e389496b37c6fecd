# ReXNet with width 0.5, without its last stage.
_base_ = './faster-rcnn_rdnet-nano_fpn_8e_digits.py'

model = dict(
    backbone=dict(
        _delete_=True, type='mmdense.ReXNet', arch=dict(width=0.5), out_indices=(1, 2, 3)),
    neck=dict(in_channels=[27, 38, 72]))
