"""The files of a config's datasets, and their names in the errors of a training."""

import functools
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import TRANSFORMS, DefaultScope
from mmengine.runner import Runner

import bad_data as bad
from mmdense.datasets import files as files_module
from mmdense.datasets.check import ReadOptions, Sample
from mmdense.datasets.files import check_data, check_files, check_trained_labels, list_files
from mmdense.engine.bad_samples import naming
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
    annotations = [bad.box(i, image=0, category=i) for i in (1, 2)]
    file = bad.write_json(folder / f'{split}.json', bad.coco(images, annotations))
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
    annotations = [short, bad.box(2, image=0, category=2)]
    bad.write_json(tmp_path / 'train.json', bad.coco([(0, '0.jpg', 96, 64)], annotations))
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
        (dict(img_suffix='.bmp'), ['no images', 'other suffix']),
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


def die(*arguments):
    os._exit(9)


def test_decoding_in_processes(tmp_path, monkeypatch):
    samples = Sample('x.jpg'), Sample(str(bad.write(tmp_path, 'x.jpg', b'text')))
    files = [(sample, ReadOptions()) for sample in samples]
    *found, labels = check_files(files * 70, workers=2)
    assert not labels
    assert [finding.kind for [finding] in found] == ['missing file', 'not an image'] * 70
    assert list(check_files([], workers=1)) == []
    monkeypatch.setattr(files_module, 'check_sample', die)
    with pytest.raises(UserError, match='was killed.*--workers'):
        list(check_files(files, workers=1))


# Between data sets


def kinds_of(scope='mmdet', **datasets):
    """Return {kind: text} of the findings in loaders' datasets."""
    return {finding.kind: finding.text for finding in files_of(scope, **datasets)[0]}


def reverse_categories(folder, split):
    file = folder / f'{split}.json'
    content = json.loads(file.read_text())
    bad.write_json(file, dict(content, categories=content['categories'][::-1]))


def voc(folder, name, classes):
    """Write a VOC dataset of one image; return its config."""
    bad.write(folder, f'{name}.jpg', bad.png(bad.PIXELS))
    (folder / f'{name}.txt').write_text(name)
    box = '<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>50</xmax><ymax>40</ymax></bndbox>'
    objects = ''.join(f'<object><name>{c}</name>{box}</object>' for c in 'ab')
    size = '<size><width>0</width><height>0</height></size>'  # as some tools write it
    (folder / f'{name}.xml').write_text(f'<annotation>{size}{objects}</annotation>')
    return dict(
        type='XMLDataset',
        data_root=str(folder),
        ann_file=f'{name}.txt',
        data_prefix=dict(sub_data_root=''),
        img_subdir='',
        ann_subdir='',
        metainfo=dict(classes=classes),
        pipeline=BOXES,
    )


def test_labels_mean_the_same_classes(tmp_path):
    train, val = boxes(tmp_path, 'train'), boxes(tmp_path, 'val')
    assert set(kinds_of(train=train, val=val)) == {'no objects', 'shared images'}
    reverse_categories(tmp_path, 'val')
    text = "label 0 is 'b', but 'a' in train_dataloader.dataset"
    assert kinds_of(train=train, val=val)['other classes'] == text
    joined = dict(type='ConcatDataset', datasets=[train, val])
    assert kinds_of(train=joined)['other classes'] == f'{text}.datasets[0]'
    assert "'b', but 'a' in metainfo.classes" in kinds_of(val=val)['class order']
    renamed = dict(val, metainfo=dict(classes=('b', 'a')))
    assert 'other classes' in kinds_of(train=train, val=renamed)
    assert 'class order' not in kinds_of(train=renamed)


def test_labels_of_other_datasets(tmp_path):
    train, val = voc(tmp_path, 't', 'ab'), voc(tmp_path, 'v', 'ba')
    assert kinds_of(train=train, val=train) == {}
    assert kinds_of(train=train, val=val)['other classes'].startswith("label 0 is 'b', but 'a'")
    assert 'repeats' in kinds_of(train=dict(train, metainfo=dict(classes='aab')))['same name']
    assert kinds_of(train=voc(tmp_path, 't', 'AB')) == {
        'nothing to learn': 'no object of A, B is left of 0 annotations'
    }
    maps_of = functools.partial(kinds_of, 'mmseg', train=maps(tmp_path / 's'))
    zero = maps_of(val=maps(tmp_path / 's', reduce_zero_label=True))
    assert zero['other labels'].startswith('reduce_zero_label is True, but False in train_')
    classes = maps_of(val=maps(tmp_path / 's', metainfo=dict(classes=('b', 'a'))))
    assert 'other classes' in classes
    dataset = maps(tmp_path / 's')
    dataset['pipeline'][1]['reduce_zero_label'] = True
    text = 'reduce_zero_label is False, but True in the pipeline'
    assert kinds_of('mmseg', train=dataset)['other labels'] == text


def test_images_in_two_loaders(tmp_path):
    train = boxes(tmp_path, 'train')
    for i in (0, 1):  # of the same size
        bad.write(tmp_path / 'train', f'{i}.jpg', bad.png(np.full((64, 96, 3), i, np.uint8)))
    text = '{} of 2 images are in train_dataloader too, such as {}'
    same = kinds_of(train=train, val=dict(train, test_mode=True))
    assert same['shared images'] == text.format(2, tmp_path / 'train/0.jpg')
    val = boxes(tmp_path, 'val')
    assert 'shared images' not in kinds_of(train=train, val=val)
    copy = tmp_path / 'val/1.jpg'
    copy.write_bytes((tmp_path / 'train/0.jpg').read_bytes())
    assert kinds_of(train=train, val=val)['shared images'] == text.format(1, copy)


def test_suffixes_that_are_passed_over(tmp_path):
    dataset = maps(tmp_path)
    for name in ('1.JPG', '2.jpeg', '.3.jpeg', 'notes.txt'):
        bad.write(tmp_path / 'img', name, bad.INTACT)
    assert kinds_of('mmseg', train=dataset) == {
        'other suffix': "img_suffix='.jpg' leaves out 1 .JPG, 1 .jpeg"
    }
    (tmp_path / 'map/0.png').rename(tmp_path / 'map/0_mask.png')
    text = (
        '1 of 1 files are missing, such as 0.png; the folder has 1 _mask.png, and seg_map_suffix '
    )
    text += "is '.png'"
    assert kinds_of('mmseg', train=dataset)['missing files'] == text


# Before anything is built


def check(scope='mmdet', **datasets):
    """Check as train.py does."""
    loaders = {f'{name}_dataloader': dict(dataset=dataset) for name, dataset in datasets.items()}
    check_data(Config(dict(loaders, default_scope=scope)), [*datasets])


def binary(folder, numbers=(0, 255), **options):
    """Write 40 label maps of the first of two numbers, and a last one of both."""
    config = maps(folder, **options)
    label_map = bad.png(np.tile(np.array(numbers, np.uint8), (64, 48)))
    for i in range(41):
        bad.write(folder / 'img', f'{i:02}.jpg', bad.INTACT)
        plain = bad.png(np.full((64, 96), numbers[0], np.uint8))
        bad.write(folder / 'map', f'{i:02}.png', label_map if i == 40 else plain)
    (folder / 'img/0.jpg').unlink()
    return config


def test_label_maps_are_sampled_until_two_classes_occur(tmp_path, monkeypatch):
    check('mmseg', train=binary(tmp_path / 'rare', (0, 1)))
    with pytest.raises(
        UserError, match=r'only 0, 255: no pixel of b: 255 is ignored: write 1, or set type='
    ):
        check('mmseg', train=binary(tmp_path))
    values = dict(type='mmdense.LabelMapDataset', values=[0, 255])
    check('mmseg', train=binary(tmp_path, **values))
    with pytest.raises(UserError, match='only 0: no pixel of b: fix the annotations'):
        check('mmseg', train=binary(tmp_path / 'none', (0, 0)))
    monkeypatch.setattr(files_module, 'MANY', 30)
    check('mmseg', train=binary(tmp_path / 'none', (0, 0)))  # it may be in the rest


def test_pipelines_of_users_may_change_labels(tmp_path):
    dataset = binary(tmp_path)
    dataset['pipeline'].append(dict(type='mmengine.Failing', name='none', error='key'))
    check('mmseg', train=dataset)
    dataset['pipeline'][0]['type'] = 'mmengine.Failing'  # reads images from somewhere
    dataset['pipeline'][0].update(name='none', error='key')
    shutil.rmtree(tmp_path / 'map')
    check('mmseg', train=dataset)


def test_what_stops_training(tmp_path):
    train = boxes(tmp_path)
    bad.write(tmp_path / 'train', '1.jpg', bad.png(bad.PIXELS[:32]))
    with pytest.raises(UserError, match=r'1\.jpg: image 1: 96 x 32 pixels, annotated as 96 x 64'):
        check(train=train)
    (tmp_path / 'train/1.jpg').rename(tmp_path / 'train/1.JPG')
    with pytest.raises(
        UserError, match=r'1 of 2 files .* such as 1\.jpg; the folder has 1 \.jpg, 1 \.JPG:'
    ):
        check(train=train)
    bad.write_json(tmp_path / 'train.json', bad.coco([(0, '0.jpg', 96, 64)]))
    with pytest.raises(UserError, match='no object of a, b is left of 0 annotations: fix'):
        check(train=train)
    check(test=dict(train, test_mode=True))  # without annotations
    check(train=dict(train, pipeline=[BOXES[0], dict(type='LoadEmptyAnnotations')]))
    for remote in (dict(data_root='s3://bucket'), dict(typo=1)):  # left to other checks
        check(train=dict(train, **remote))


def test_a_checkpoint_of_other_classes(tmp_path, log):
    cfg = Config(dict(default_scope='mmdet', test_dataloader=dict(dataset=boxes(tmp_path))))
    for classes in (('a', 'b'), None):
        check_trained_labels(cfg, dict(dataset_meta=dict(classes=classes)))
    check_trained_labels(cfg, {})
    assert not log
    check_trained_labels(cfg, dict(dataset_meta=dict(classes=('A', 'B'))))
    assert "label 0 is 'a', but 'A' in the checkpoint" in log[0]
    with pytest.raises(UserError, match="label 0 is 'a', but 'b' in the checkpoint: list"):
        check_trained_labels(cfg, dict(dataset_meta=dict(classes=('b', 'a'))))


# During training


def loader_of(dataset, scope='mmdet', workers=0):
    sampler = dict(type='DefaultSampler', shuffle=False)
    collate = dict(type='pseudo_collate')
    config = dict(batch_size=2, num_workers=workers, sampler=sampler, collate_fn=collate)
    with DefaultScope.overwrite_default_scope(scope):
        return naming(Runner).build_dataloader(Config(dict(config, dataset=dataset)))


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
    assert naming(Runner).build_dataloader(loader) is loader
    with pytest.raises(TypeError), DefaultScope.overwrite_default_scope('mmdet'):
        naming(Runner).build_dataloader(dict(dataset=boxes(tmp_path, typo=1), sampler=None))
