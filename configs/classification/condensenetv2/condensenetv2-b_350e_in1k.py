_base_ = './condensenetv2-a_350e_in1k.py'

model = dict(
    backbone=dict(arch='b'),
    neck=dict(in_channels=1176, hidden_channels=1024),
    head=dict(in_channels=1024),
)
