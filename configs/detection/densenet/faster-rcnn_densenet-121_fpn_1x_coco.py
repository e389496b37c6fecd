_base_ = ['../_base_/faster-rcnn_densenet-121.py', '../_base_/coco_sgd-1x.py']
