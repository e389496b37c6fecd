_base_ = './rdnet-t_amp-300e_in1k.py'

model = dict(
    backbone=dict(arch='small', drop_path_rate=0.35),
    neck=dict(in_channels=1264),
    head=dict(in_channels=1264),
)
