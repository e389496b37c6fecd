"""mmdet's SSD head, able to predict."""

from mmdet.models.dense_heads import SSDHead as _SSDHead


class SSDHead(_SSDHead):
    """mmdet's ``SSDHead``, with the same options.

    Since mmdet 3.3 dense heads read ``loss_cls`` when they predict, and ``SSDHead`` has none.
    """

    loss_cls = None
