"""Exported files in the place of their models: with the config's data, samples and metrics."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor

from mmdense.runtime.models import open_model


class OnnxModel(BaseModel):
    """A complete model's .onnx file in the place of the model, for ``test_step``.

    Neighbours of one size run as a batch: predictions don't depend on padding, as mmdet's do.
    The options are those of :func:`.open_model`; there are as many threads as torch has by default.
    """

    def __init__(self, file: str | Path, **options: Any) -> None:
        super().__init__()
        self.predictor = open_model(file, **{'threads': torch.get_num_threads(), **options})
        self.session = self.predictor.session

    def forward(
        self, inputs: Sequence[Tensor], data_samples: Sequence[BaseDataElement], mode: str
    ) -> list[BaseDataElement]:
        """Return the data samples of images [3, H, W], BGR from 0 to 255, with predictions."""
        for _, group in groupby(zip(inputs, data_samples, strict=True), lambda pair: pair[0].shape):
            images, samples = zip(*group, strict=True)
            pixels = torch.stack(images).flip(1).cpu().numpy()
            if self.session.dtype == np.uint8:
                pixels = pixels.round().clip(0, 255)  # as if read and resized in uint8
            outputs = self.predictor.run(pixels)
            for i, sample in enumerate(samples):
                width, height = sample.get('scale_factor', (1, 1))
                size = np.rint(np.multiply(sample.ori_shape, (height, width))).astype(int)
                output = {name: values[i] for name, values in outputs.items()}
                if self.predictor.classifies:
                    sample.pred_score = scores = torch.from_numpy(output['scores'])
                    sample.pred_label = scores.argmax(0, keepdim=True)
                    continue
                found = self.predictor.finish(output, tuple(size), sample.ori_shape)
                found = {name: torch.from_numpy(values) for name, values in found.items()}
                if self.predictor.segments:
                    sample.pred_sem_seg = PixelData(data=found['label_map'][None])
                else:
                    sample.pred_instances = InstanceData(**found)
        return list(data_samples)
