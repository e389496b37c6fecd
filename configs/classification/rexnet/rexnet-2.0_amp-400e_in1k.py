_base_ = './rexnet-1.0_amp-400e_in1k.py'

model = dict(backbone=dict(arch='2.0'), head=dict(in_channels=2560))
