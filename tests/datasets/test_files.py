"""The files of a config's datasets, and their names in the errors of a training."""

import os
import pickle

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import TRANSFORMS, DefaultScope

import bad_data as bad
from mmdense.datasets import files as files_module
from mmdense.datasets.check import ReadOptions, Sample
from mmdense.datasets.files import check_files, list_files
from mmdense.engine.bad_samples import Runner
from mmdense.errors import UserError

BOXES = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]


@TRANSFORMS.register_module()
class Failing:
    """A transform that raises an error for images with a name."""

    def __init__(self, name, error):
        self.name = name
        self.error = error

    def __call__(self, results):
        if self.name in results['img_path']:
            raise dict(key=KeyError, user=UserError)[self.error]('a mistake')
        return results


def boxes(folder, split='train', number=2, **options):
    """Write a detection dataset of two classes; return its config."""
    images = [(i, f'{i}.jpg', 96, 64) for i in range(number)]
    for _, name, *_ in images:
        bad.write(folder / split, name, bad.INTACT)
    file = bad.write_json(folder / f'{split}.json', bad.coco(images, [bad.box(1, image=0)]))
    config = dict(type='CocoDataset', metainfo=dict(classes=('a', 'b')), pipeline=BOXES)
    config.update(data_root=str(folder), ann_file=file.name, data_prefix=dict(img=f'{split}/'))
    return dict(config, **options)


def maps(folder, **options):
    """Write a segmentation dataset of two classes; return its config."""
    bad.write(folder / 'img', '0.jpg', bad.INTACT)
    labels = np.tile([[0, 1]], (64, 48)).astype(np.uint8)
    bad.write(folder / 'map', '0.png', bad.png(labels))
    config = dict(type='BaseSegDataset', metainfo=dict(classes=('a', 'b')), data_root=str(folder))
    config.update(data_prefix=dict(img_path='img', seg_map_path='map'))
    config.update(pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')])
    return dict(config, **options)


def files_of(scope='mmdet', **datasets):
    """Return the findings in the annotations of loaders' datasets, and their files."""
    loaders = {f'{name}_dataloader': dict(dataset=dataset) for name, dataset in datasets.items()}
    return list_files(Config(dict(loaders, default_scope=scope)), ('train', 'val', 'test'))


# Before training


def test_datasets_inside_wrappers(tmp_path):
    one, two = boxes(tmp_path / 'one'), boxes(tmp_path / 'two', number=3)
    joined = dict(type='ConcatDataset', datasets=[one, two])
    mixed = dict(type='MultiImageMixDataset', pipeline=[], dataset=one)
    balanced = dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=two)
    for dataset, number in (
        (dict(type='RepeatDataset', times=4, dataset=joined), 5),
        (mixed, 2),
        (balanced, 3),
    ):
        findings, files = files_of(train=dataset)
        assert len({sample.image for sample, _ in files}) == len(files) == number
        assert {finding.kind for finding in findings} == {'no objects'}
    # Each file once, whichever datasets read it.
    assert len(files_of(train=one, val=joined, test=joined)[1]) == 5


def test_filtered_images_are_left_out(tmp_path):
    filters = dict(filter_cfg=dict(filter_empty_gt=True, min_size=32))
    names = [os.path.basename(sample.image) for sample, _ in files_of(train=boxes(tmp_path))[1]]
    assert names == ['0.jpg', '1.jpg']
    assert len(files_of(train=boxes(tmp_path, **filters))[1]) == 1
    assert len(files_of(train=boxes(tmp_path, test_mode=True, **filters))[1]) == 2


def test_read_options_come_from_the_pipeline(tmp_path):
    def options_of(dataset, scope='mmdet'):
        ((_, options),) = files_of(scope, train=dataset)[1]
        return options

    assert options_of(boxes(tmp_path, number=1)) == ReadOptions()
    loads = [dict(type='LoadImageFromFile', imdecode_backend='pillow', color_type='grayscale')]
    inside = [dict(type='RandomChoice', transforms=[loads])]
    for pipeline in (loads, inside):
        options = options_of(boxes(tmp_path, number=1, pipeline=pipeline))
        assert (options.backend, options.color_type) == ('pillow', 'grayscale')
    assert options_of(maps(tmp_path), 'mmseg') == ReadOptions(classes=2)
    config = maps(tmp_path, ignore_index=9, reduce_zero_label=True)
    config['pipeline'] = [dict(type='LoadAnnotations', imdecode_backend='cv2')]
    expected = ReadOptions(label_backend='cv2', classes=2, ignored=9, reduce_zero_label=True)
    assert options_of(config, 'mmseg') == expected
    subset = dict(type='ADE20KDataset', metainfo=dict(classes=('building', 'wall')))
    options = options_of(maps(tmp_path, **subset), 'mmseg')
    assert (options.classes, options.reduce_zero_label) == (2, True)
    assert [options.label_map[i] for i in range(3)] == [1, 0, 255]


def test_masks_are_checked_if_the_pipeline_loads_them(tmp_path):
    dataset = boxes(tmp_path)
    short = bad.box(1, image=0, segmentation=[[1, 2, 3, 4]])
    bad.write_json(tmp_path / 'train.json', bad.coco([(0, '0.jpg', 96, 64)], [short]))
    assert not files_of(train=dataset)[0]
    dataset['pipeline'] = [dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
    (finding,) = files_of(train=dataset)[0]
    assert finding.kind == 'short polygon'


def test_other_datasets_list_their_images(tmp_path):
    content = dict(metainfo={}, data_list=[dict(img_path='x.jpg', img_id=3, width=5, height=4)])
    file = bad.write_json(tmp_path / 'list.json', content)
    dataset = dict(type=BaseDataset, ann_file=str(file), data_prefix=dict(img_path='img'))
    ((sample, _),) = files_of('mmengine', train=dataset)[1]
    assert sample == Sample('img/x.jpg', 3, (5, 4))
    file.write_text('{')
    (finding,), files = files_of('mmengine', train=dataset)
    assert finding.kind == 'unreadable annotations'
    assert not files
    (tmp_path / 'x.txt').write_text('0\n')
    for options, kinds in (
        (dict(img_suffix='.jpg'), []),
        (dict(img_suffix='.bmp'), ['no images']),
        (dict(ann_file='x.txt'), []),  # a list of names
        (dict(ann_file='x'), ['unreadable annotations']),
    ):
        findings, files = files_of('mmseg', train=maps(tmp_path, **options))
        assert [finding.kind for finding in findings] == kinds
        assert len(files) == (not kinds)


def test_datasets_that_cannot_be_checked(tmp_path):
    for dataset, message in (
        (boxes(tmp_path, data_root='s3://bucket'), 'is not on this machine'),
        (boxes(tmp_path, backend_args=dict(backend='petrel')), 'is not on this machine'),
        (boxes(tmp_path, typo=1), r'cannot be built \(TypeError: .*typo'),
    ):
        with pytest.raises(UserError, match=f'^train_dataloader.dataset {message}'):
            files_of(train=dataset)
    with pytest.raises(UserError, match='has no dataset for train, val, test'):
        files_of()


def die(sample, options):
    os._exit(9)


def test_decoding_in_processes(tmp_path, monkeypatch):
    samples = Sample('x.jpg'), Sample(str(bad.write(tmp_path, 'x.jpg', b'text')))
    files = [(sample, ReadOptions()) for sample in samples]
    found = list(check_files(files * 70, workers=2))
    assert [finding.kind for [finding] in found] == ['missing file', 'not an image'] * 70
    assert list(check_files([], workers=1)) == []
    monkeypatch.setattr(files_module, 'check_sample', die)
    with pytest.raises(UserError, match='was killed.*--workers'):
        list(check_files(files, workers=1))


# During training


def loader_of(dataset, scope='mmdet', workers=0):
    sampler = dict(type='DefaultSampler', shuffle=False)
    collate = dict(type='pseudo_collate')
    config = dict(batch_size=2, num_workers=workers, sampler=sampler, collate_fn=collate)
    with DefaultScope.overwrite_default_scope(scope):
        return Runner.build_dataloader(Config(dict(config, dataset=dataset)))


def failing(folder, error):
    pipeline = [*BOXES, dict(type='mmengine.Failing', name='1.jpg', error=error)]
    return boxes(folder, pipeline=pipeline)


def test_errors_of_transforms_keep_their_traceback_and_name_the_image(tmp_path):
    joined = dict(type='ConcatDataset', datasets=[failing(tmp_path, 'key')])
    for dataset in (failing(tmp_path, 'key'), dict(type='RepeatDataset', times=1, dataset=joined)):
        with pytest.raises(
            RuntimeError, match=r"1\.jpg: a transform failed \(KeyError: 'a mistake"
        ) as e:
            next(iter(loader_of(dataset)))
        assert not isinstance(e.value, UserError)
        assert isinstance(e.value.__cause__, KeyError)


@pytest.mark.parametrize('workers', [0, 1])
def test_user_errors_stay_one_line(workers, tmp_path):
    with pytest.raises(UserError) as error:
        next(iter(loader_of(failing(tmp_path, 'user'), workers=workers)))
    assert str(error.value) == 'a mistake'


def test_an_image_whose_resized_size_is_zero(tmp_path):
    dataset = boxes(tmp_path)
    bad.write(tmp_path / 'train', '1.jpg', bad.png(np.zeros((1, 3000, 3), np.uint8)))
    dataset['pipeline'] = [*BOXES, dict(type='Resize', scale=(192, 192), keep_ratio=True)]
    content = bad.coco([(0, '0.jpg', 96, 64), (1, '1.jpg', 3000, 1)], [bad.box(1, image=0)])
    bad.write_json(tmp_path / 'train.json', content)
    with pytest.raises(UserError, match=r'1\.jpg: image 1: 3000 x 1 pixels: resizing may leave'):
        next(iter(loader_of(dataset)))


def test_labels_made_by_the_pipeline(tmp_path):
    dataset = maps(tmp_path)
    read, pack = dataset['pipeline'], dict(type='PackSegInputs')
    pad = dict(type='Pad', size=(100, 100), pad_val=dict(img=0, seg=9))
    dataset['pipeline'] = [*read, pad, pack]
    with pytest.raises(UserError, match=r'map/0\.png: after the pipeline it has labels'):
        next(iter(loader_of(dataset, 'mmseg')))
    for config in (dict(dataset, ignore_index=9), dict(dataset, pipeline=[*read, pack])):
        assert len(next(iter(loader_of(config, 'mmseg')))['inputs']) == 1


def test_the_dataset_itself_is_unchanged(tmp_path):
    loader = loader_of(boxes(tmp_path))
    dataset = loader.dataset
    assert isinstance(dataset, BaseDataset)
    assert len(dataset) == 2
    assert dataset[0]['img'].shape == (64, 96, 3)
    pickled = pickle.loads(pickle.dumps(dataset))  # for spawned workers
    assert type(pickled.pipeline) is type(dataset.pipeline)
    assert dataset.get_subset([1])[0]['img_id'] == 1
    assert Runner.build_dataloader(loader) is loader
    with pytest.raises(TypeError), DefaultScope.overwrite_default_scope('mmdet'):
        Runner.build_dataloader(dict(dataset=boxes(tmp_path, typo=1), sampler=None))
