"""Runners that name the image or label map that stops them."""

from collections.abc import Iterator
from typing import Any

from mmengine.dataset import BaseDataset, Compose
from mmengine.structures import BaseDataElement
from torch.utils.data import DataLoader

from mmdense.datasets.check import ReadOptions, Sample, check_sample
from mmdense.datasets.files import raise_first, read_options_of, to_sample
from mmdense.errors import UserError, one_line


class NamedPipeline(Compose):
    """A data set's pipeline that names the sample it fails on, in worker processes too.

    When a transform fails, the first error that :func:`.check_sample` finds is raised as UserError,
    else the transform's own, with the image's name. Labels outside the classes are refused here,
    because on the device they would have no name.
    """

    def __init__(self, pipeline: Compose, options: ReadOptions) -> None:
        super().__init__(None)
        self.transforms = pipeline.transforms
        self.options = options

    def __call__(self, info: dict) -> dict | None:
        if 'img_path' not in info:  # not one image
            return super().__call__(info)
        sample = to_sample(info)
        try:
            data = self._transform(info, sample)
        except UserError:
            raise
        except Exception as error:  # each transform raises its own
            raise_first(check_sample(sample, self.options), error)
            raise RuntimeError(f'{sample.image}: a transform failed ({one_line(error)})') from error
        packed = data.get('data_samples') if isinstance(data, dict) else None
        classes = self.options.classes
        if classes and isinstance(packed, BaseDataElement) and 'gt_sem_seg' in packed:
            labels = packed.gt_sem_seg.data
            unknown = ((labels < 0) | (labels >= classes)) & (labels != self.options.ignored)
            if unknown.any():
                raise_first(check_sample(sample, self.options))
                text = f'after the pipeline it has labels outside the {classes} classes'
                raise UserError(f'{sample.label_map}: {text}')
        return data

    def _transform(self, data: dict, sample: Sample) -> dict | None:
        """Run the transforms; refuse an image or label map of another size once it is loaded."""
        size, unseen = sample.size, {'ori_shape', 'gt_seg_map'}
        for transform in self.transforms:
            data = transform(data)
            if data is None:
                break
            for key in unseen.intersection(data) if isinstance(data, dict) else ():
                unseen.remove(key)
                shape = tuple(getattr(data[key], 'shape', data[key]))[1::-1]
                if shape != (size := size or shape):
                    raise_first(check_sample(sample, self.options))
        return data


def naming(runner: type) -> type:
    """Return one of mmengine's runner classes with data loaders that name samples at fault."""

    class NamingRunner(runner):
        @staticmethod
        def build_dataloader(
            dataloader: DataLoader | dict, *args: Any, **kwargs: Any
        ) -> DataLoader:
            loader = runner.build_dataloader(dataloader, *args, **kwargs)
            for dataset in _leaves(loader.dataset):
                if type(dataset.pipeline) is Compose:
                    dataset.pipeline = NamedPipeline(dataset.pipeline, read_options_of(dataset))
            return loader

    return NamingRunner


def _leaves(dataset: Any) -> Iterator[BaseDataset]:
    """Yield the data sets inside wrappers."""
    if isinstance(dataset, BaseDataset):
        yield dataset
    for name in ('dataset', '_dataset', 'datasets'):
        inner = getattr(dataset, name, ())
        for child in inner if isinstance(inner, list | tuple) else [inner]:
            yield from _leaves(child)
