_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', '../_base_/coco_sgd-1x.py']

# The FPN starts at stride 8. Frozen: the stages up to stride 4.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdense.ShuffleNetV2',
        arch='1.5',
        out_indices=(1, 2, 3),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained', checkpoint='torchvision://shufflenet_v2_x1_5.imagenet1k_v1')),
    neck=dict(in_channels=[176, 352, 704], start_level=0))

# Half of the learning rate, as in mmdet's RetinaNet.
optim_wrapper = dict(optimizer=dict(lr=0.01))
