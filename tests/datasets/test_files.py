"""Which files a config's data sets read, and how errors in reading them are told."""

import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import TRANSFORMS, DefaultScope
from mmengine.runner import Runner

import bad_data as bad
from mmdense.datasets import files as data
from mmdense.datasets.check import ReadOptions, Sample
from mmdense.datasets.files import check_files, list_files
from mmdense.engine.bad_samples import name_bad_samples
from mmdense.errors import UserError

BOXES = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]


@TRANSFORMS.register_module()
class Failing:
    """Fails at images of this name, as a transform with a mistake does."""

    def __init__(self, name, error):
        self.name = name
        self.error = error

    def __call__(self, results):
        if self.name in results['img_path']:
            raise dict(key=KeyError, user=UserError)[self.error]('a mistake')
        return results


def boxes(folder, split='train', number=2, **more):
    """Write a detection data set of two classes; return its config."""
    images = [(i, f'{i}.jpg', 96, 64) for i in range(number)]
    for _, name, *_ in images:
        bad.write(folder / split, name, bad.WHOLE)
    file = bad.write_json(folder / f'{split}.json', bad.coco(images, [bad.box(1, image=0)]))
    known = dict(type='CocoDataset', metainfo=dict(classes=('a', 'b')), pipeline=BOXES)
    known.update(data_root=str(folder), ann_file=file.name, data_prefix=dict(img=f'{split}/'))
    return dict(known, **more)


def maps(folder, **more):
    """Write a segmentation data set of two classes; return its config."""
    bad.write(folder / 'img', '0.jpg', bad.WHOLE)
    labels = np.tile([[0, 1]], (64, 48)).astype(np.uint8)
    bad.write(folder / 'map', '0.png', bad.png(labels))
    known = dict(type='BaseSegDataset', metainfo=dict(classes=('a', 'b')), data_root=str(folder))
    known.update(data_prefix=dict(img_path='img', seg_map_path='map'))
    known.update(pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')])
    return dict(known, **more)


def files_of(scope='mmdet', **loaders):
    """Return what is found in the annotations, and the files, with how they are read."""
    held = {f'{name}_dataloader': dict(dataset=dataset) for name, dataset in loaders.items()}
    return list_files(Config(dict(held, default_scope=scope)), ('train', 'val', 'test'))


# Before training


def test_data_sets_inside_wrappers(tmp_path):
    one, two = boxes(tmp_path / 'one'), boxes(tmp_path / 'two', number=3)
    joined = dict(type='ConcatDataset', datasets=[one, two])
    mixed = dict(type='MultiImageMixDataset', pipeline=[], dataset=one)
    balanced = dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=two)
    for dataset, number in (
        (joined, 5),
        (dict(type='RepeatDataset', times=4, dataset=joined), 5),
        (mixed, 2),
        (balanced, 3),
    ):
        found, files = files_of(train=dataset)
        assert len({sample.image for sample, _ in files}) == len(files) == number
        assert {finding.kind for finding in found} == {'no object'}
    # Each file once, whoever reads it.
    assert len(files_of(train=one, val=joined, test=joined)[1]) == 5


def test_files_that_are_left_out(tmp_path):
    empty = dict(filter_cfg=dict(filter_empty_gt=True, min_size=32))
    names = [os.path.basename(sample.image) for sample, _ in files_of(train=boxes(tmp_path))[1]]
    assert names == ['0.jpg', '1.jpg']
    assert len(files_of(train=boxes(tmp_path, **empty))[1]) == 1
    assert len(files_of(train=boxes(tmp_path, test_mode=True, **empty))[1]) == 2
    assert len(files_of(train=boxes(tmp_path, number=3, indices=2))[1]) == 2
    assert len(files_of(train=boxes(tmp_path, number=3, indices=[2]))[1]) == 1


def test_how_files_are_read(tmp_path):
    def reading(dataset, scope='mmdet'):
        ((_, found),) = files_of(scope, train=dataset)[1]
        return found

    assert reading(boxes(tmp_path, number=1)) == ReadOptions()
    loads = [dict(type='LoadImageFromFile', imdecode_backend='pillow', color_type='grayscale')]
    inside = [dict(type='RandomChoice', transforms=[loads])]
    for pipeline in (loads, inside):
        found = reading(boxes(tmp_path, number=1, pipeline=pipeline))
        assert (found.backend, found.color_type) == ('pillow', 'grayscale')
    assert reading(maps(tmp_path), 'mmseg') == ReadOptions(classes=2)
    loads = [dict(type='LoadAnnotations', imdecode_backend='cv2')]
    more = dict(pipeline=loads, ignore_index=9, reduce_zero_label=True)
    expected = ReadOptions(label_backend='cv2', classes=2, ignored=9, reduce_zero_label=True)
    assert reading(maps(tmp_path, **more), 'mmseg') == expected
    some = dict(type='ADE20KDataset', metainfo=dict(classes=('building', 'wall')))
    found = reading(maps(tmp_path, **some), 'mmseg')
    assert (found.classes, found.reduce_zero_label) == (2, True)
    assert (found.label_map[0], found.label_map[1], found.label_map[2]) == (1, 0, 255)


def test_masks_are_looked_at_where_they_are_learnt(tmp_path):
    dataset = boxes(tmp_path)
    short = bad.box(1, image=0, segmentation=[[1, 2, 3, 4]])
    bad.write_json(tmp_path / 'train.json', bad.coco([(0, '0.jpg', 96, 64)], [short]))
    assert not files_of(train=dataset)[0]
    dataset['pipeline'] = [dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
    (finding,) = files_of(train=dataset)[0]
    assert finding.kind == 'polygon'


def test_other_data_sets_are_asked_for_their_images(tmp_path):
    listed = dict(metainfo={}, data_list=[dict(img_path='x.jpg', img_id=3, width=5, height=4)])
    file = bad.write_json(tmp_path / 'list.json', listed)
    dataset = dict(type=BaseDataset, ann_file=str(file), data_prefix=dict(img_path='img'))
    ((sample, _),) = files_of('mmengine', train=dataset)[1]
    assert sample == Sample('img/x.jpg', 3, (5, 4))
    file.write_text('{')
    (finding,), files = files_of('mmengine', train=dataset)
    assert finding.kind == 'annotation file'
    assert not files
    for suffix, kind in (('.bmp', 'no images'), ('.jpg', None)):
        found, files = files_of('mmseg', train=maps(tmp_path, img_suffix=suffix))
        assert [finding.kind for finding in found] == ([kind] if kind else [])
        assert len(files) == (kind is None)
    for split in ('x', 'x.txt'):  # a list of names
        (tmp_path / 'x.txt').write_text('0\n')
        found, files = files_of('mmseg', train=maps(tmp_path, ann_file=split))
        assert bool(found) == (split == 'x')


def test_data_sets_that_cannot_be_looked_at(tmp_path):
    for dataset, said in (
        (boxes(tmp_path, data_root='s3://bucket'), 'is not on this machine'),
        (boxes(tmp_path, backend_args=dict(backend='petrel')), 'is not on this machine'),
        (boxes(tmp_path, typo=1), r'cannot be built \(TypeError: .*typo'),
    ):
        with pytest.raises(UserError, match=f'^train_dataloader.dataset {said}'):
            files_of(train=dataset)
    with pytest.raises(UserError, match='has no data set for train, val, test'):
        files_of()


def die(sample, reading):
    os._exit(9)


def test_decoding_in_processes(tmp_path, monkeypatch):
    good, worse = Sample('x.jpg'), Sample(str(bad.write(tmp_path, 'x.jpg', b'text')))
    found = list(check_files([(good, ReadOptions()), (worse, ReadOptions())] * 70, workers=2))
    assert [finding.kind for [finding] in found] == ['missing file', 'no image'] * 70
    assert list(check_files([], workers=1)) == []
    monkeypatch.setattr(data, 'check_sample', die)
    with pytest.raises(UserError, match='was killed.*--workers'):
        list(check_files([(good, ReadOptions())], workers=1))


# During training


def loader_of(dataset, scope='mmdet', workers=0):
    runner = SimpleNamespace(build_dataloader=Runner.build_dataloader)
    name_bad_samples(runner)
    sampler = dict(type='DefaultSampler', shuffle=False)
    collate = dict(type='pseudo_collate')
    config = dict(batch_size=2, num_workers=workers, sampler=sampler, collate_fn=collate)
    with DefaultScope.overwrite_default_scope(scope):
        return runner.build_dataloader(Config(dict(config, dataset=dataset)))


@pytest.mark.parametrize('wrap', [False, True])
def test_mistakes_in_transforms_keep_their_traceback(wrap, tmp_path):
    dataset = boxes(tmp_path)
    dataset['pipeline'] = [*BOXES, dict(type='mmengine.Failing', name='1.jpg', error='key')]
    if wrap:
        dataset = dict(
            type='RepeatDataset', times=1, dataset=dict(type='ConcatDataset', datasets=[dataset])
        )
    with pytest.raises(
        RuntimeError, match=r"1\.jpg: cannot be prepared \(KeyError: 'a mistake"
    ) as e:
        next(iter(loader_of(dataset)))
    assert not isinstance(e.value, UserError)
    assert isinstance(e.value.__cause__, KeyError)


@pytest.mark.parametrize('workers', [0, 1])
def test_lines_for_users_stay_one_line(workers, tmp_path):
    dataset = boxes(tmp_path)
    dataset['pipeline'] = [*BOXES, dict(type='mmengine.Failing', name='1.jpg', error='user')]
    with pytest.raises(UserError) as error:
        next(iter(loader_of(dataset, workers=workers)))
    assert str(error.value) == 'a mistake'


def test_images_of_which_nothing_is_left(tmp_path):
    dataset = boxes(tmp_path)
    bad.write(tmp_path / 'train', '1.jpg', bad.png(np.zeros((1, 3000, 3), np.uint8)))
    dataset['pipeline'] = [*BOXES, dict(type='Resize', scale=(192, 192), keep_ratio=True)]
    held = bad.coco([(0, '0.jpg', 96, 64), (1, '1.jpg', 3000, 1)], [bad.box(1, image=0)])
    bad.write_json(tmp_path / 'train.json', held)
    with pytest.raises(UserError, match=r'1\.jpg: image 1: 3000 x 1 pixels: resizing may leave'):
        next(iter(loader_of(dataset)))


def test_labels_that_the_pipeline_makes(tmp_path):
    pack = dict(type='PackSegInputs')
    dataset = maps(tmp_path)
    read = dataset['pipeline']
    dataset['pipeline'] = [
        *read,
        dict(type='Pad', size=(100, 100), pad_val=dict(img=0, seg=9)),
        pack,
    ]
    with pytest.raises(UserError, match=r'map/0\.png: the pipeline makes labels of it that are'):
        next(iter(loader_of(dataset, 'mmseg')))
    for fine in (dict(dataset, ignore_index=9), dict(dataset, pipeline=[*read, pack])):
        assert len(next(iter(loader_of(fine, 'mmseg')))['inputs']) == 1


def test_what_is_built_stays_what_it_was(tmp_path):
    loader = loader_of(boxes(tmp_path))
    dataset = loader.dataset
    assert isinstance(dataset, BaseDataset)
    assert len(dataset) == 2
    assert dataset[0]['img'].shape == (64, 96, 3)
    again = pickle.loads(pickle.dumps(dataset))  # for workers that are spawned
    assert again.prepare_data.args[0] is again
    assert dataset.get_subset([1])[0]['img_id'] == 1
    built = SimpleNamespace(build_dataloader=Runner.build_dataloader)
    name_bad_samples(built)
    assert built.build_dataloader(loader) is loader
    with pytest.raises(TypeError), DefaultScope.overwrite_default_scope('mmdet'):
        built.build_dataloader(dict(dataset=boxes(tmp_path, typo=1), sampler=None))
