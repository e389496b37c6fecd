"""The metrics of a config, and whether their files are those of the data that they evaluate."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import METRICS

from mmdense.config.parts import arguments, dicts, find
from mmdense.datasets.files import iter_dataset_configs
from mmdense.errors import UserError, first_of
from mmdense.files import check_writable


def iter_metrics(evaluator: Any, where: str = '') -> Iterator[tuple[str, dict]]:
    """Yield the metrics of an evaluator in any of mmengine's forms, with their places."""
    if isinstance(evaluator, list | tuple):
        for i, child in enumerate(evaluator):
            yield from iter_metrics(child, f'{where}.{i}')
    elif isinstance(evaluator, dict) and not isinstance(evaluator.get('metrics', ''), str):
        yield from iter_metrics(evaluator['metrics'], f'{where}.metrics')
    elif isinstance(evaluator, dict):
        yield where, evaluator


def check_metric_files(cfg: Config, loaders: Sequence[str]) -> None:
    """Check that each metric's files exist and are those of its data set.

    An annotation file at another path must have the same images, by id and name, and the same
    categories. Files elsewhere (``s3://``) are not compared.
    """
    for loader in loaders:
        place, evaluator = f'{loader}_evaluator', cfg.get(f'{loader}_evaluator')
        data = [node for _, node in iter_dataset_configs(cfg.get(f'{loader}_dataloader'), '')]
        metrics = list(iter_metrics(evaluator, place))
        prefixes = isinstance(evaluator, dict) and evaluator.get('dataset_prefixes')
        if prefixes and not len(prefixes) == len(metrics) == len(data):
            raise UserError(
                f'{place} has {len(metrics)} metrics and {len(prefixes)} dataset_prefixes for '
                f'{len(data)} data sets: it needs one of each for every data set'
            )
        for i, (where, metric) in enumerate(metrics):
            _check_metric(where, metric, data[i : i + 1] if prefixes else data, cfg)


def _check_metric(where: str, metric: dict, data: Sequence[dict], cfg: Config) -> None:
    files = [Path(n.get('data_root') or '', n['ann_file']) for n in data if n.get('ann_file')]
    paths = [path for node in (metric, *data) for path in node.values()]
    if any('://' in str(path) for path in paths) or metric.get('backend_args'):
        return
    way = f'set it to {first_of(files)}'
    if len(files) > 1:
        way = "use type='MultiDatasetsEvaluator' with one metric a data set, or one file of all"
    for key, advice in (('ann_file', way), ('seg_prefix', 'set it to the folder of label maps')):
        if metric.get(key) and not Path(metric[key]).exists():
            raise UserError(f'{where}.{key}: {metric[key]} not found: {advice}')
    for key in ('outfile_prefix', 'output_dir'):
        if metric.get(key):
            check_writable(Path(f'{metric[key]}.json'))
    kind = find(metric.get('type'), [METRICS], cfg.get('default_scope'))
    if not files or kind is None or 'ann_file' not in arguments(kind):
        return
    if not metric.get('ann_file'):
        packed = {key for node in dicts(data) for key in node.get('meta_keys') or ()}
        if not packed & {'instances', 'segments_info'}:
            raise UserError(f'{where}.ann_file: {kind.__name__} has none: {way}')
    elif Path(metric['ann_file']).resolve() not in map(Path.resolve, files) or len(files) > 1:
        (images, categories), *others = map(_read, (Path(metric['ann_file']), *files))
        same = images == set().union(*(more for more, _ in others))
        known = images and all(more for more, _ in others)
        if known and (not same or any(more != categories for _, more in others)):
            raise UserError(
                f'{where}.ann_file: {metric["ann_file"]} has other '
                f'{"categories" if same else "images"} than {first_of(files)}: {way}'
            )


def _read(file: Path) -> tuple[set, list]:
    """Return the images and categories of a COCO file; nothing of another file."""
    try:
        content = json.loads(file.read_bytes())
        images = [(i['id'], i.get('file_name') or i['coco_url']) for i in content['images']]
        categories = [(c['id'], c['name']) for c in content['categories']]
    except (OSError, ValueError, LookupError, TypeError):  # the data set's own check names these
        return set(), []
    return {(i, Path(name).name) for i, name in images}, categories
