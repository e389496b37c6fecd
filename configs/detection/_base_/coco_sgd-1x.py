# COCO boxes, 12 epochs of SGD, 8 GPUs x 2 images: mmdet's recipe for ResNet-50. Ours for the families
# that use it: untried on COCO.
_base_ = [
    'mmdet::_base_/datasets/coco_detection.py', 'mmdet::_base_/schedules/schedule_1x.py',
    './default_runtime.py'
]
