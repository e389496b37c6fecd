_base_ = './condensenetv2-a_350e_in1k.py'

model = dict(
    backbone=dict(arch='c'),
    neck=dict(in_channels=2064, hidden_channels=1024),
    head=dict(in_channels=1024),
)
