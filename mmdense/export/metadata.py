"""What an exported file says about itself: enough to run it without its config.

The dictionary is JSON in the file's metadata, under the key ``mmdense``; pixels are from 0 to 255,
sides are width, height in ``resize`` and ``pad``, and height, width elsewhere.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from mmdense.export.networks import Network
from mmdense.runtime.session import SCHEMA

LIBRARIES = ('mmdense', 'torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'timm', 'onnx')
PASSIVE = ('Load', 'Pack', 'Collect')  # transforms that leave the pixels alone, by their beginning


def build_metadata(
    network: Network,
    classes: Sequence[str] = (),
    palette: Sequence[Sequence[int]] = (),
    categories: Sequence[Mapping[str, Any]] = (),
    *,
    dtype: str,
    config: Config | None,
) -> tuple[dict[str, Any], str]:
    """Return the metadata of an exported network, and why its ``resize`` is unknown or ''."""
    model, preprocess = network.model, network.preprocess
    step = -1 if preprocess.order == 'BGR' else 1
    mean, std = (
        [] if x is None else [round(v, 4) for v in x.flatten().tolist()[::step]]
        for x in (preprocess.mean, preprocess.std)
    )
    resize, pad, reason = read_geometry(config)
    metadata = dict(
        schema=SCHEMA,
        part=network.part,
        task=network.task,
        model=type(model).__name__,
        backbone=type(getattr(model, 'backbone', model)).__name__,
        config=Path(config.filename).name if config is not None and config.filename else '',
        versions={k: sys.modules[k].__version__ for k in LIBRARIES if k in sys.modules},
        precision='float32',
        classes=list(classes),
        palette=[list(colour) for colour in palette],
        categories=[dict(category) for category in categories],
        input=dict(
            channels='RGB' if preprocess.order else '',
            dtype=dtype,
            normalized=bool(preprocess.order),
            mean=mean,
            std=std,
            order=preprocess.order,
            divisor=preprocess.divisor,
        ),
        resize=resize,
        pad=pad,
        postprocessing=network.postprocessing(),
    )
    return metadata, reason


def inner_dataset(config: Config | None, loader: str = 'test') -> ConfigDict | None:
    """Return the config of a loader's (first) data set inside its wrappers, if there is one."""
    dataset = ((config or {}).get(f'{loader}_dataloader') or {}).get('dataset')
    while dataset and 'pipeline' not in dataset and ('dataset' in dataset or 'datasets' in dataset):
        dataset = dataset.dataset if 'dataset' in dataset else dataset.datasets[0]
    return dataset


def read_geometry(
    config: Config | None,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, str]:
    """Return how a config's test pipeline resizes and pads images, and what is not understood.

    ``resize`` is ``dict(scale=[width, height], keep_ratio=...)`` of mmcv's Resize,
    bilinear; ``pad`` is ``dict(size=[width, height], value=...)``, at the right and bottom.
    """
    dataset = inner_dataset(config)
    if dataset is None:
        return None, None, 'there is no test_dataloader with a pipeline'
    found: dict[str, Any] = dict(Resize=None, Pad=None)
    for transform in dataset.get('pipeline') or []:
        kind = str(transform['type']).rpartition('.')[2]
        if kind.startswith(PASSIVE):
            continue
        bilinear = transform.get('interpolation', 'bilinear') == 'bilinear'
        sides, value = transform.get('scale', transform.get('size')), transform.get('pad_val', 0)
        value = value.get('img', 0) if isinstance(value, Mapping) else value
        levels = {value} if isinstance(value, int | float) else {*value}
        if found.get(kind, kind) or found['Pad'] or not (sides and bilinear) or len(levels) > 1:
            return None, None, f'{kind} of the test pipeline is not in the file'
        sides = [sides, sides] if isinstance(sides, int) else list(sides)
        keep_ratio = bool(transform.get('keep_ratio', False))
        found[kind] = dict(scale=sides, keep_ratio=keep_ratio)
        if kind == 'Pad':
            found[kind] = dict(size=sides, value=float(levels.pop()))
    return found['Resize'], found['Pad'], ''
