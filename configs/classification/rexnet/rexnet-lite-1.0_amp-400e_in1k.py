# With the settings of ReXNet: none were published.
_base_ = './rexnet-1.0_amp-400e_in1k.py'

model = dict(
    backbone=dict(arch='lite-1.0'),
    neck=dict(in_channels=1280, hidden_channels=1024),
    head=dict(in_channels=1024),
)
