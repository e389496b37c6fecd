# The ReXNet U-Net with one output channel per class. Every scale is supervised at the label's size, so
# that six score maps of 150 classes need much memory.
_base_ = [
    '../_base_/unet_rexnet-1.0.py', '../_base_/ade20k_512x512.py', '../_base_/sgd_160k.py',
    '../_base_/default_runtime.py'
]

model = dict(data_preprocessor=dict(size=(512, 512)))
