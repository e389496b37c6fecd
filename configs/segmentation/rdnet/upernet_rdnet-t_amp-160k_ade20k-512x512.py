_base_ = [
    '../_base_/upernet_rdnet-t.py', '../_base_/ade20k_512x512.py', '../_base_/adamw_160k.py',
    '../_base_/default_runtime.py'
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))

# The released learning rate scales: they count 7 stages for every size and put the heads after the
# last depth, so that heads get 0.9 ** -2 = 1.23 times lr.
optim_wrapper = dict(
    optimizer=dict(lr=8e-5, weight_decay=0.03),
    paramwise_cfg=dict(decay_rate=0.9, mode='published'))
