_base_ = './densenet-121_90e_in1k.py'

model = dict(backbone=dict(arch='264-k48'), head=dict(in_channels=4032))
