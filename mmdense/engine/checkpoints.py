"""Where weights can come from, as schemes of mmengine's checkpoint loader."""

from __future__ import annotations

import timm
from mmengine.runner import CheckpointLoader

__all__ = ['load_from_timm']


@CheckpointLoader.register_scheme(prefixes='timm://')
def load_from_timm(filename: str, map_location: str | None = None) -> dict:
    """Return timm's pretrained weights for ``timm://NAME``, without the classifier.

    They come through the Hugging Face hub, from its cache if they are there.

    Args:
        filename: Such as ``timm://rdnet_tiny.nv_in1k``.
        map_location: Device that the tensors go to; the CPU by default.

    Raises:
        RuntimeError: timm has no such weights, or they can be had neither from the cache nor from
            the network.
    """
    name = filename.removeprefix('timm://')
    try:
        net = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's client, the network and timm each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f'no weights from {filename}: {reason}. Put them into the Hugging Face cache on a '
            'machine with network, or train from scratch with model.backbone.init_cfg=None'
        ) from error
    weights = {k: v for k, v in net.state_dict().items() if not k.startswith('head.')}
    return dict(state_dict={k: v.to(map_location or 'cpu') for k, v in weights.items()})
