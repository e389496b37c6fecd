"""Corruptions of images, to test robustness."""

from typing import Any

from mmcv.transforms import BaseTransform

from mmdense.registry import TRANSFORMS


@TRANSFORMS.register_module()
class Corrupt(BaseTransform):
    """Corrupt ``img`` [H, W, 3] (uint8) by the package imagecorruptions.

    ``corruption`` is its name, such as 'gaussian_noise', and ``severity`` from 1 to 5.
    """

    def __init__(self, *, corruption: str, severity: int) -> None:
        self.options = dict(corruption_name=corruption, severity=severity)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Return the results with a corrupted image."""
        from imagecorruptions import corrupt

        image = results['img']
        results['img'] = corrupt(image, **self.options).astype(image.dtype)
        return results
