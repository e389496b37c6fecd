"""Hooks that save the predictions of a test, pictures at their image's path below the image folder.

mmdet and mmseg name such files by the image's last name alone, so that of ``cam0/1.jpg`` and
``cam1/1.jpg`` only one would be left.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import barrier
from mmengine.hooks import Hook
from mmengine.registry import METRICS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from PIL import Image

from mmdense.files import change_suffix, check_writable, relative_paths
from mmdense.registry import HOOKS


@HOOKS.register_module()
class SaveLabelMapsHook(Hook):
    """Save the label maps that a segmentor predicts as PNG, numbered as the data set's own.

    Images that differ only in their suffix keep it: ``x.jpg.png`` and ``x.bmp.png``.
    """

    def __init__(self, out_dir: str) -> None:
        self.out_dir = Path(out_dir)

    def before_test(self, runner: Runner) -> None:
        """Name the files; raise UserError if one cannot be written."""
        names = change_suffix(relative_paths(_image_paths(runner)), '.png')
        self._files = {image: self.out_dir / name for image, name in names.items()}
        for file in self._files.values():
            check_writable(file)
        barrier()  # of several processes, one made the folders

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence[BaseDataElement] | None = None,
    ) -> None:
        for sample in outputs or ():
            labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
            labels = labels + bool(sample.get('reduce_zero_label'))
            dtype = np.uint8 if labels.max() < 256 else np.uint16
            Image.fromarray(labels.astype(dtype)).save(self._files[sample.img_path])


@HOOKS.register_module()
class SavePredictionsHook(Hook):
    """Save all predictions of a detector in one .pkl file by mmdet's ``DumpDetResults``.

    That metric has no place in a ``MultiDatasetsEvaluator``, which takes one for each data set.
    """

    def __init__(self, out_file: str) -> None:
        check_writable(Path(out_file))
        self._metric = METRICS.build(dict(type='mmdet.DumpDetResults', out_file_path=out_file))

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = ()
    ) -> None:
        self._metric.process(data_batch, [sample.to_dict() for sample in outputs])

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Write the file, from all processes."""
        self._metric.evaluate(len(runner.test_dataloader.dataset))


def _image_paths(runner: Runner) -> list[str]:
    dataset = runner.test_dataloader.dataset
    return [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]


def _det_visualization_hook(**options: Any) -> Hook:
    """Return mmdet's DetVisualizationHook, imported when it is built: segmentors don't need it."""
    from mmdet.engine.hooks import DetVisualizationHook

    class PathsKept(DetVisualizationHook):
        def before_test(self, runner: Runner) -> None:
            super().before_test(runner)
            self._names = relative_paths(_image_paths(runner)) if self.test_out_dir else {}

        def after_test_iter(
            self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Sequence[Any]
        ) -> None:
            folder = self.test_out_dir
            for sample in outputs:
                if folder:
                    self.test_out_dir = str(Path(folder, self._names[sample.img_path]).parent)
                super().after_test_iter(runner, batch_idx, data_batch, [sample])
            self.test_out_dir = folder

    return PathsKept(**options)


HOOKS.register_module(name='DetVisualizationHook', module=_det_visualization_hook)
