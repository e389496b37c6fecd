# From the classifier of configs/classification/demo/rdnet-nano_6e_digits.py.
_base_ = './faster-rcnn_rdnet-nano_fpn_8e_digits.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/rdnet-nano_6e_digits/epoch_6.pth',
            prefix='backbone.')))
