# A small detector that trains in minutes on two CPU cores. Backbone, FPN and heads are narrow, and
# there are few proposals, since the 192 x 192 images contain 2 to 6 digits.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/digits_detection.py',
    '../_base_/default_runtime.py'
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.RDNet',
        arch=dict(
            stem=32, growth=(16, 32, 48), down=(1, 2), blocks=2, gate_from=2, layer_scale=1.0),
        out_indices=(0, 1, 2),
        output_norm=True),
    neck=dict(in_channels=[64, 96, 144], out_channels=48, num_outs=3),
    rpn_head=dict(
        in_channels=48,
        feat_channels=48,
        anchor_generator=dict(strides=[4, 8, 16], scales=[7], ratios=[1.0, 2.0])),
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(output_size=5),
            out_channels=48,
            featmap_strides=[4, 8, 16],
            finest_scale=40),
        bbox_head=dict(
            in_channels=48, roi_feat_size=5, fc_out_channels=256, num_classes=10)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=300, max_per_img=150),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5))),
    test_cfg=dict(
        rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=20)))

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0),
    clip_grad=dict(max_norm=10.0))
max_epochs = 8
train_cfg = dict(type='mmdense.EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        begin=1,
        T_max=max_epochs - 1,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True)
]

custom_hooks = [dict(type='mmdense.ChannelsLastHook')]
auto_scale_lr = dict(enable=False, base_batch_size=8)
randomness = dict(seed=0)
