_base_ = './rexnet-lite-1.0_amp-400e_in1k.py'

model = dict(backbone=dict(arch='lite-1.3'), neck=dict(in_channels=1664))
