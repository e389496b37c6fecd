"""mmdet's SSD head, able to predict."""

from mmdet.models.dense_heads import SSDHead as _SSDHead

__all__ = ['SSDHead']


class SSDHead(_SSDHead):
    """mmdet's ``SSDHead`` with its options.

    mmdet's dense heads ask ``loss_cls`` for its activation when they predict (since 3.3); SSD
    computes its loss by itself and has none.
    """

    loss_cls = None
