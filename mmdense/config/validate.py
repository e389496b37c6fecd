"""Validating a config: each mistake is one line that says how to fix it, a UserError.

``loaders`` are those that will run, of 'train', 'val' and 'test'; ``model`` is a detector or
segmentor.
"""

import copy
import difflib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATA_SAMPLERS, DATASETS, LOOPS, METRICS
from mmengine.runner import FlexibleRunner, IterBasedTrainLoop, Runner
from torch import nn

from mmdense.config.channels import nested_models, readers
from mmdense.config.evaluators import iter_metrics
from mmdense.config.parts import arguments, find
from mmdense.datasets.files import iter_dataset_configs
from mmdense.errors import UserError, first_of, suggest_name

# All that mmengine's runners, their methods and mmdense's tools read at the top of a config.
SECTIONS = sorted(
    {*inspect.signature(Runner).parameters, *inspect.signature(FlexibleRunner).parameters} - {'cfg'}
    | {'activation_checkpointing', 'efficient_conv_bn_eval', 'find_unused_parameters'}
    | {'custom_imports', 'model_wrapper_cfg', 'runner_type', 'sync_bn'}
    | {'data_root', 'tta_model', 'tta_pipeline'}
)
# Parts that read all feature maps of a detector's neck -> the attribute with their channels.
NECK_READERS = {
    re.compile(r'rpn_head|bbox_head'): 'in_channels',
    re.compile(r'roi_head\.(bbox|mask)_roi_extractor(\.\d+)?'): 'out_channels',
}

ENDLESS = {'InfiniteSampler', 'MultiSourceSampler'}  # mmengine's and mmdet's
# Arguments of hooks and schedules that count epochs.
EPOCHS = ('by_epoch', 'begin_epoch', 'num_last_epochs', 'switch_epoch')


# Before anything is built


def check_sections(cfg: Config, path: str) -> None:
    """Refuse a misspelt section, which nothing would read."""
    # Without those that are close to common variables: data_roots, tta_pipelines.
    names = [name for name in SECTIONS if name not in ('data_root', 'tta_pipeline')]
    for name, value in cfg.items():
        items = value if isinstance(value, list | tuple) else [value]
        if name in SECTIONS or not items or not all(isinstance(item, dict) for item in items):
            continue
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.88):
            raise UserError(
                f'{path}: nothing reads {name!r}; did you mean {close[0]!r}? (If it is a variable '
                'of yours, give it another name.)'
            )


def check_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Refuse options of ``--cfg-options`` that would have no effect on a config.

    Misspelt arguments are left to :func:`.check_parts`, which sees them when all are merged.
    """
    for key in options:
        section, *_ = names = key.split('.')
        if section == 'custom_imports':
            raise UserError(
                f'--cfg-options {key}: modules are imported while the config is read, so they must '
                'be named in a config file'
            )
        if section not in SECTIONS:
            if section in cfg:
                raise UserError(
                    f'--cfg-options {key}: {section!r} is a variable of {cfg.filename}, which has '
                    'used it already: override the settings that it is used for'
                )
            raise UserError(
                f'--cfg-options {key}: nothing reads {section!r}{suggest_name(section, SECTIONS)}'
            )
        _check_key(cfg, key, names)


def _check_key(cfg: Mapping[str, Any], key: str, names: Sequence[str]) -> None:
    """Compare a new key with its siblings, unless they are arguments."""
    node = cfg
    for name in names:
        if isinstance(node, list | tuple) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict | Config) and name in node:
            node = node[name]
        else:
            siblings = node if isinstance(node, dict) and 'type' not in node else ()
            if difflib.get_close_matches(name, siblings, n=1, cutoff=0.85):
                raise UserError(
                    f'--cfg-options {key}: there is no {name!r} yet{suggest_name(name, siblings)}'
                )
            return


def check_data_files(cfg: Config, loaders: Sequence[str]) -> None:
    """Check that the annotation files and folders of the data sets exist, and are all read."""
    check_prefixes(cfg, loaders)
    for where, dataset in _datasets(cfg, loaders):
        root = dataset.get('data_root') or ''
        prefixes = dataset.get('data_prefix') or {}
        prefixes = [prefixes] if isinstance(prefixes, str) else prefixes.values()
        kind = find(dataset.get('type'), [DATASETS], cfg.get('default_scope'))
        if kind and 'download' in arguments(kind):  # it fetches what is missing
            continue
        for name in [dataset.get('ann_file'), *(p for p in prefixes if isinstance(p, str))]:
            path = Path(root, name or '')
            if '://' in root or '://' in str(name) or path.exists():
                continue
            raise UserError(
                f'{path} not found (for {where}): if the data are elsewhere, add '
                '--cfg-options data_root=FOLDER'
            )


def _datasets(cfg: Config, loaders: Sequence[str]) -> Iterator[tuple[str, dict]]:
    for place in [f'{loader}_dataloader' for loader in loaders]:
        yield from iter_dataset_configs(cfg.get(place), place)


def check_prefixes(cfg: Config, loaders: Sequence[str]) -> None:
    """Refuse keys of ``data_prefix`` that the data set's class never reads."""
    for where, node in _datasets(cfg, loaders):
        kind = find(node.get('type'), [DATASETS], node.get('_scope_', cfg.get('default_scope')))
        if not isinstance(kind, type) or not kind.__module__.startswith(('mmdet.', 'mmseg.')):
            continue
        bases = [base for base in kind.__mro__ if base.__module__.startswith('mm')]
        code = re.sub('#.*', '', ''.join(map(inspect.getsource, bases)))
        known = {*re.findall(r'data_prefix(?:\[|\.get\()[\'"](\w+)', code)}
        for key in node.get('data_prefix') or () if known else ():
            if key not in (*known, 'sub_data_root'):  # VOC's stays in leaf configs of mmdet
                keys = ' and '.join(sorted(known))
                raise UserError(f'{where}.data_prefix: {kind.__name__} reads {keys}, not {key}')


def is_endless(sampler: Any) -> bool:
    """Return whether a class of samplers starts over at the end."""
    return any(base.__name__ in ENDLESS for base in getattr(sampler, '__mro__', ()))


def check_loops(cfg: Config, loaders: Sequence[str]) -> None:
    """Refuse loops that would not end, not validate, or never get to what counts epochs."""
    scope, train = cfg.get('default_scope'), cfg.get('train_cfg') or {}
    loop = find(train.get('type'), [LOOPS], scope)
    by_iter = isinstance(loop, type) and issubclass(loop, IterBasedTrainLoop)
    for loader in loaders:
        place = f'{loader}_dataloader'
        node = cfg.get(place) or {}
        sampler = find((node.get('sampler') or {}).get('type'), [DATA_SAMPLERS], scope)
        if is_endless(sampler) and not (by_iter and loader == 'train'):
            raise UserError(
                f'{place}.sampler: {sampler.__name__} never ends, so an epoch would not either: '
                f'add --cfg-options {place}.sampler.type=DefaultSampler'
            )
        if loader != 'train' and node.get('drop_last') and node.get('batch_size', 1) > 1:
            raise UserError(
                f'{place}.drop_last would leave images out of the metrics: add --cfg-options '
                f'{place}.drop_last=False'
            )
    if 'train' not in loaders:
        return
    for key in ('max_epochs', 'max_iters', 'val_interval'):
        if train.get(key, 1) < 1:
            way = '; without validation: val_dataloader=None val_cfg=None val_evaluator=None'
            way = way if key == 'val_interval' else ''
            raise UserError(f'train_cfg.{key} is {train[key]}, must be at least 1{way}')
    for section in ('default_hooks', 'custom_hooks', 'param_scheduler') if by_iter else ():
        parts = cfg.get(section) or {}
        items = parts.items() if isinstance(parts, dict) else enumerate(parts)
        for key, part in [('', parts)] if 'type' in parts else items:
            if isinstance(part, dict) and 'type' in part:
                _check_unit(f'{section}.{key}'.rstrip('.'), part)


def _check_unit(place: str, part: dict[str, Any]) -> None:
    """Refuse a hook or schedule that counts epochs, of which training by iterations has one."""
    default = 'CheckpointHook' in str(part['type']) or place.startswith('param_scheduler')
    names = [name for name in EPOCHS if part.get(name, default and name == 'by_epoch')]
    if names and not part.get('convert_to_iter_based') and part.get('interval') != -1:
        remedy = 'take EpochBasedTrainLoop'
        if names[0] == 'by_epoch':
            remedy = f'add --cfg-options {place}.by_epoch=False, and count in iterations'
        raise UserError(
            f'{place} counts epochs ({names[0]}), but training by iterations has only one: {remedy}'
        )


# After the model is built


def _with_backbone(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the model and those inside it, such as a teacher, that have a backbone."""
    parts = model.named_modules()
    return [(name, part) for name, part in parts if hasattr(part, 'backbone')]


def check_channels(model: nn.Module, cfg: Mapping[str, Any]) -> None:
    """Compare the channels of each backbone's feature maps with those in the model's config."""
    for (place, node), (_, part) in zip(nested_models(cfg), _with_backbone(model), strict=False):
        channels = getattr(part.backbone, 'out_channels', None)
        if not isinstance(channels, tuple):  # not one of mmdense's backbones
            continue
        for reader in readers(node, channels):
            name = f'{place}{reader.name}'
            if not reader.fits:
                raise UserError(
                    f'{name} expects {reader.node[reader.key]} channels, but the backbone gives '
                    f"{reader.channels}: set model.{name}.{reader.key}='auto'"
                )


def check_neck(model: nn.Module) -> None:
    """Compare the output channels of a detector's neck with those that its heads expect."""
    for place, detector in _with_backbone(model):
        given = _channels(getattr(detector, 'neck', None), 'out_channels')
        for name, part in detector.named_modules():
            key = next((key for places, key in NECK_READERS.items() if places.fullmatch(name)), '')
            expected = _channels(part, key)
            if given and expected and given != expected:
                raise UserError(
                    f'{"" if place else "model."}{name}.{key} is {expected}, but the neck gives '
                    f'{given}: make them equal (neck.out_channels)'
                )


def _channels(part: nn.Module | None, key: str) -> int | list[int] | None:
    channels = getattr(part, key, None)
    return list(channels) if isinstance(channels, list | tuple) else channels


def check_classes(model: nn.Module, cfg: Config, loaders: Sequence[str]) -> None:
    """Compare classes, palettes, ignored labels and masks of data, heads, losses and metrics.

    No file is read.
    """
    keys = ('ignore_index', 'ignore_label', *(['seg_pad_val'] if 'train' in loaders else []))
    parts = dict(model.named_modules())
    ignored = {
        f'model.{name}.{key}': getattr(part, key, None)
        for name, part in parts.items()
        for key in keys
    }
    segments = False
    for where, node in _datasets(cfg, loaders):
        scope = node.get('_scope_', cfg.get('default_scope'))
        _check_palette(node.get('metainfo') or {}, where, scope)
        kind = find(node['type'], [DATASETS], scope)
        if not kind or 'lazy_init' not in arguments(kind):  # it would read its files
            continue
        with DATASETS.switch_scope_and_registry(scope) as registry:
            dataset = registry.build({**copy.deepcopy(node), 'lazy_init': True})
        compare_classes(model, dataset.metainfo, where)
        if hasattr(dataset, 'reduce_zero_label'):  # mmseg's
            segments = type(model).__name__ != 'DepthEstimator'
            ignored[f'{where}.ignore_index'] = dataset.ignore_index
            ignored[f'{where}.reduce_zero_label'] = 255 if dataset.reduce_zero_label else None
            for i, step in enumerate(dataset.pipeline.transforms):
                ignored[f'{where}.pipeline.{i}.seg_pad_val'] = getattr(step, 'seg_pad_val', None)
    for place in [f'{loader}_evaluator' for loader in loaders]:
        for where, node in iter_metrics(cfg.get(place), place):
            kind = find(node.get('type'), [METRICS], cfg.get('default_scope'))
            if kind and 'ignore_index' in arguments(kind):
                default = inspect.signature(kind).parameters['ignore_index'].default
                ignored[f'{where}.ignore_index'] = node.get('ignore_index', default)
            top, count = (
                node.get('topk') or 1,
                getattr(getattr(model, 'head', None), 'num_classes', 0),
            )
            if count and max([top] if isinstance(top, int) else top) > count:
                raise UserError(f'{where}.topk is {top} for {count} classes: set {where}.topk=1')
            if 'segm' in (node.get('metric') or ()) and not any('mask' in name for name in parts):
                raise UserError(
                    f"{where}.metric has 'segm', but {type(model).__name__} predicts no masks: set "
                    "metric='bbox', or train a model with a mask head"
                )
    places = defaultdict(list)
    for where, value in ignored.items():
        places[value].append(where)
    places.pop(None, None)
    if segments and len(places) > 1:
        listed = '; '.join(f'{value} in {first_of(names)}' for value, names in places.items())
        raise UserError(f'the ignored label differs: {listed}: set all to that of the label maps')


def _check_palette(metainfo: Mapping[str, Any], where: str, scope: str | None) -> None:
    colours, names = (len(metainfo.get(key) or ()) for key in ('palette', 'classes'))
    if colours and (colours < names or (scope == 'mmseg' and colours > names > 0)):
        raise UserError(
            f'{where}.metainfo.palette has {colours} colours for {names} classes: give each class '
            f'one, or set palette={[] if scope == "mmseg" else None}'
        )


def compare_classes(model: nn.Module, metainfo: Mapping[str, Any], where: str) -> None:
    """Compare the heads' numbers of classes with those of one data set, unless it is panoptic."""
    classes = metainfo.get('classes')
    if isinstance(classes, str):
        raise UserError(f'{where}: classes must be a tuple: for one class write ({classes!r},)')
    if classes is None or 'thing_classes' in metainfo or hasattr(model, 'language_model'):
        return
    for name, head in model.named_modules():
        number = getattr(head, 'num_classes', None)
        if {'', 'backbone', 'rpn_head'} & {*name.split('.')}:  # ImageNet's, objectness or none
            continue
        if hasattr(head, 'max_depth'):
            continue
        other = type(head).__name__ in ('FusedSemanticHead', 'STDCHead')  # stuff, boundaries
        if isinstance(number, int) and number != len(classes) and not other:
            raise UserError(
                f'model.{name}.num_classes is {number}, but {where} has {len(classes)} classes: '
                'make them equal (the classes are in its metainfo.classes)'
            )
