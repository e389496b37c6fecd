"""A data set of images and label maps whose pixel values are not the classes' indices."""

from collections.abc import Sequence
from typing import Any

from mmseg.datasets import BaseSegDataset

from mmdense.registry import DATASETS


@DATASETS.register_module()
class LabelMapDataset(BaseSegDataset):
    """mmseg's BaseSegDataset for any pixel values, such as binary masks of 0 and 255.

    ``values`` are those of each class of ``metainfo``, from 0 to 255. A pixel with another value
    that is a class's index is ignored; ``ignore_index`` is, too, unless a class has it. ValueError
    if there are not as many different values as classes.
    """

    def __init__(self, *, values: Sequence[int], **options: Any) -> None:
        self.values = values
        super().__init__(**options)

    def get_label_map(self, new_classes: Sequence[str] | None = None) -> dict[int, int]:
        """Return the label of each pixel value that is not a label itself."""
        if len({*self.values}) != len(new_classes or ()):
            raise ValueError(f'{len({*self.values})} values for {len(new_classes or ())} classes')
        labels = dict.fromkeys(range(len(self.values)), self.ignore_index)
        labels |= {value: label for label, value in enumerate(self.values)}
        return {value: label for value, label in labels.items() if value != label}
