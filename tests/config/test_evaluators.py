"""Files of metrics, compared with the data sets that they evaluate."""

import json

import pytest
from mmengine.config import Config

from bad_data import coco, write_json
from mmdense.config.evaluators import check_metric_files, iter_metrics
from mmdense.config.parts import check_parts
from mmdense.errors import UserError
from support import DEMOS, load_tool

IMAGES = {'val': [(1, 'a.png', 9, 9), (2, 'b.png', 9, 9)], 'other': [(7, 'c.png', 9, 9)]}
IMAGES['both'] = IMAGES['val'] + IMAGES['other']
IMAGES['renamed'] = [(1, 'x.png', 9, 9), (2, 'b.png', 9, 9)]  # the ids of other images
IMAGES['copy'] = [(1, 'elsewhere/a.png', 9, 9), (2, 'b.png', 9, 9)]
PACK = dict(type='PackDetInputs', meta_keys=('img_id', 'instances'))


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Return a function that returns the config of an evaluator and data sets."""
    monkeypatch.chdir(tmp_path)
    for name, images in IMAGES.items():
        write_json(tmp_path / f'{name}.json', coco(images))
    write_json(tmp_path / 'swapped.json', coco(IMAGES['val'], categories=('b', 'a')))

    def make(evaluator, *names, **more):
        data = [dict(type='CocoDataset', ann_file=f'{name}.json', **more) for name in names]
        dataset = data[0] if len(data) == 1 else dict(type='ConcatDataset', datasets=data)
        loader = dict(dataset=dataset)
        return Config(dict(default_scope='mmdet', val_dataloader=loader, val_evaluator=evaluator))

    return make


def metric(file=None, kind='CocoMetric', **more):
    return dict(type=kind, **({} if file is None else dict(ann_file=f'{file}.json')), **more)


def several(*metrics, prefixes=('a', 'b')):
    return dict(type='MultiDatasetsEvaluator', metrics=list(metrics), dataset_prefixes=prefixes)


GONE = 'val_evaluator.ann_file: gone.json not found: set it to val.json'


@pytest.mark.parametrize(
    ('evaluator', 'names', 'message'),
    [
        (metric('gone'), ['val'], GONE),
        (metric('gone', 'CocoPanopticMetric'), ['val'], GONE),
        (metric('gone', 'LVISMetric'), ['val'], GONE),
        (metric('other'), ['val'], 'other.json has other images than val.json: set it to val.json'),
        (metric('renamed'), ['val'], 'other images'),
        (metric('both'), ['val'], 'other images'),
        (metric('swapped'), ['val'], 'swapped.json has other categories than val.json'),
        (metric('val'), ['val', 'other'], "use type='MultiDatasetsEvaluator' with one metric a"),
        (metric('val', seg_prefix='masks'), ['val'], 'val_evaluator.seg_prefix: masks not found'),
        (metric(), ['val'], 'val_evaluator.ann_file: CocoMetric has none: set it to val.json'),
        ([metric('val'), metric()], ['val'], 'val_evaluator.1.ann_file: CocoMetric has none'),
        (dict(metrics=[metric('gone')]), ['val'], 'val_evaluator.metrics.0.ann_file: gone.json'),
        (
            several(metric('val'), metric('val')),
            ['val', 'other'],
            'metrics.1.ann_file: val.json has',
        ),
        (
            several(metric('val')),
            ['val', 'other'],
            'has 1 metrics and 2 dataset_prefixes for 2 data',
        ),
        (metric('val', outfile_prefix='val.json/x'), ['val'], 'cannot write val.json/x.json'),
    ],
)
def test_files_of_other_data(evaluator, names, message, config):
    with pytest.raises(UserError) as error:
        check_metric_files(config(evaluator, *names), ('train', 'val', 'test'))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ('evaluator', 'names', 'more'),
    [
        (metric('val'), ['val'], {}),
        (metric('copy'), ['val'], {}),
        (metric('both'), ['val', 'other'], {}),
        (several(metric('val'), metric('other')), ['val', 'other'], {}),
        (metric(), ['val'], dict(pipeline=[PACK])),  # the samples have the ground truth
        (dict(type='VOCMetric'), ['val'], {}),
        (metric('s3://x/gone'), ['val'], {}),
        (None, ['val'], {}),
    ],
)
def test_files_that_fit(evaluator, names, more, config):
    check_metric_files(config(evaluator, *names, **more), ('train', 'val', 'test'))


def test_an_unreadable_file_is_left_to_the_check_of_the_data(config, tmp_path):
    (tmp_path / 'odd.json').write_text(json.dumps([1, 2]))
    check_metric_files(config(metric('odd'), 'val'), ('val',))


@pytest.mark.parametrize(
    'evaluator',
    [
        metric('val'),
        [metric('val')],
        dict(metrics=metric('val')),
        dict(type='Evaluator', metrics=[metric('val')]),
        several(metric('val'), prefixes=['a']),
    ],
)
def test_every_form_of_an_evaluator(evaluator, config):
    check_parts(config(evaluator, 'val'))
    assert [found['ann_file'] for _, found in iter_metrics(evaluator)] == ['val.json']


def test_the_tools_find_the_file_of_other_images(call_tool, tmp_path):
    file, other = tmp_path / 'leaf.py', 'data/digits/annotations/instances_train.json'
    file.write_text(
        f'_base_ = {str(DEMOS["detection"])!r}\nval_evaluator = dict(ann_file={other!r})'
    )
    message = f'val_evaluator.ann_file: {other} has other images than data/digits/annotations/inst'
    status, _, errors = call_tool('train', file, '--work-dir', tmp_path / 'run')
    assert status == 2
    assert errors.splitlines()[-1].startswith(f'error: {message}')
    status, output, _ = call_tool('check_dataset', file, '--workers', 1)
    assert status == 1
    assert message in output
    (finding,) = [f for f in load_tool('doctor').probe_config(str(file)) if f.check == 'data'][1:2]
    assert (finding.level, finding.message[: len(message)]) == ('error', message)
    assert finding.fix.endswith('--cfg-options val_evaluator.ann_file=FILE')
