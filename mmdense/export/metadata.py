"""What an exported file says about itself: enough to run it without its config.

The dictionary is JSON in the file's metadata, under the key ``mmdense``; pixels are from 0 to 255,
sides are width, height in ``resize``, ``pad`` and ``crop``, and height, width elsewhere.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from mmdense.export.networks import Network
from mmdense.runtime.session import SCHEMA

LIBRARIES = ('mmdense', 'torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'onnx')
GEOMETRY = dict(Resize='resize', ResizeEdge='resize', Pad='pad', CenterCrop='crop')
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
    geometry, reason = read_geometry(config, crop=network.task == 'classification')
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
        **geometry,
        postprocessing=network.postprocessing(),
    )
    return metadata, reason


def inner_dataset(config: Config | None, loader: str = 'test') -> ConfigDict | None:
    """Return the config of a loader's (first) data set inside its wrappers, if there is one."""
    dataset = ((config or {}).get(f'{loader}_dataloader') or {}).get('dataset')
    while dataset and 'pipeline' not in dataset and ('dataset' in dataset or 'datasets' in dataset):
        dataset = dataset.dataset if 'dataset' in dataset else dataset.datasets[0]
    return dataset


def read_geometry(config: Config | None, crop: bool = False) -> tuple[dict[str, Any], str]:
    """Return how a config's test pipeline changes images, and what is not understood.

    ``resize`` is ``dict(scale=[width, height], keep_ratio=...)`` of mmcv's Resize or ``dict(scale=
    side, edge=...)`` of mmpretrain's ResizeEdge, bilinear, or with ``pillow``'s interpolation;
    ``pad`` is ``dict(size=[width, height], value=...)``, at the right and bottom; ``crop`` is
    [width, height] of the centre, which ``crop`` allows. None is no change.
    """
    unknown = dict(resize=None, pad=None, crop=None)
    dataset = inner_dataset(config)
    if dataset is None:
        return unknown, 'there is no test_dataloader with a pipeline'
    found: dict[str, Any] = dict(unknown)
    for transform in dataset.get('pipeline') or []:
        kind = str(transform['type']).rpartition('.')[2]
        if kind.startswith(PASSIVE):
            continue
        name, method = GEOMETRY.get(kind), transform.get('interpolation', 'bilinear')
        pillow = dict(pillow=method) if transform.get('backend') == 'pillow' else {}
        sides = next((transform[k] for k in ('scale', 'size', 'crop_size') if k in transform), None)
        value = transform.get('pad_val', 0)
        value = value.get('img', 0) if isinstance(value, Mapping) else value
        levels = {value} if isinstance(value, int | float) else {*value}
        known = name and sides and (pillow or method == 'bilinear') and len(levels) == 1
        known = known and (name != 'crop' or crop and not transform.get('auto_pad'))
        if not known or found[name] or found['pad'] or found['crop']:
            return unknown, f'{kind} of the test pipeline is not in the file'
        pair = [sides, sides] if isinstance(sides, int) else list(sides)
        if kind == 'Resize':
            found[name] = dict(scale=pair, keep_ratio=bool(transform.get('keep_ratio'))) | pillow
        elif kind == 'ResizeEdge':
            found[name] = dict(scale=sides, edge=transform.get('edge', 'short')) | pillow
        else:
            found[name] = pair if name == 'crop' else dict(size=pair, value=float(levels.pop()))
    return found, ''
