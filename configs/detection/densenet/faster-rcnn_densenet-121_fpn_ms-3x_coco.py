_base_ = ['../_base_/faster-rcnn_densenet-121.py', '../_base_/coco_sgd-ms-3x.py']
