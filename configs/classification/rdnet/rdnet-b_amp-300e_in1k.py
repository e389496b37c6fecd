_base_ = './rdnet-t_amp-300e_in1k.py'

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.4),
    neck=dict(in_channels=1760),
    head=dict(in_channels=1760),
)
