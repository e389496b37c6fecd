_base_ = './densenet-121_90e_in1k.py'

param_scheduler = [
    dict(type='CosineAnnealingLR', T_max=_base_.max_epochs, convert_to_iter_based=True)
]
