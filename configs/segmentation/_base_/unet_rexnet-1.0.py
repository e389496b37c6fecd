model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255),
    backbone=dict(
        type='mmdense.ReXNet',
        arch='1.0',
        taps='unet',
        init_cfg=dict(type='Pretrained', checkpoint='timm://rexnet_100.nav_in1k')),
    decode_head=dict(
        type='mmdense.ReXUNetHead', in_channels=[16, 27, 50, 72, 140, 1280], num_classes=150),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
# Squeeze-excite norms see one value per image: SyncBN uses the images of all GPUs.
sync_bn = 'torch'
