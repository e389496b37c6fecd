_base_ = './rdnet-t_amp-300e_in1k.py'

model = dict(
    backbone=dict(arch='large', drop_path_rate=0.5),
    neck=dict(in_channels=2000),
    head=dict(in_channels=2000),
)
