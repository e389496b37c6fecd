# COCO boxes, 12 epochs of AdamW. RDNet was published with 3x schedules only.
_base_ = './coco_sgd-1x.py'

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0))
