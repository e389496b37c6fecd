_base_ = ['../_base_/retinanet_densenet-121.py', '../_base_/coco_sgd-ms-3x.py']

# Half of the learning rate, as in mmdet's RetinaNet.
optim_wrapper = dict(optimizer=dict(lr=0.01))
