import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mmdense.datasets import CLASSES, PALETTE, SEG_CLASSES, SEG_PALETTE, digits, make_digits

ROOT = Path(__file__).parents[2]
SPLITS = ('train', 'val')
SMALL = dict(train=12, val=6, size=96, seed=3)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp('data') / 'digits', **SMALL)


@pytest.fixture
def copy(data, tmp_path):
    """A folder that a test may spoil."""
    return Path(shutil.copytree(data.root, tmp_path / 'digits'))


@pytest.fixture(scope='module')
def main():
    path = ROOT / 'tools' / 'make_demo_dataset.py'
    spec = importlib.util.spec_from_file_location('make_demo_dataset', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def load(root, split):
    return json.loads((root / 'annotations' / f'instances_{split}.json').read_text())


def by_image(root, split):
    """Yield (image's record, its annotations, their masks)."""
    content = load(root, split)
    for image in content['images']:
        own = [a for a in content['annotations'] if a['image_id'] == image['id']]
        yield image, own, [coco_mask.decode(a['segmentation']).astype(bool) for a in own]


def snapshot(root):
    """Return each file's bytes by its relative path."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob('*') if p.is_file()}


def grey_distance(image, mask):
    """Return the largest difference of channel means between a mask and its surroundings."""
    near = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))).astype(bool)
    far = near & ~cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))).astype(bool)
    return np.abs(image[mask].mean(axis=0) - image[far].mean(axis=0)).max()


# ------------------------------------------------------------------------------ what is written


def test_constants_describe_ten_digits():
    assert tuple(str(d) for d in range(10)) == CLASSES
    assert ('background', *CLASSES) == SEG_CLASSES
    assert len(set(PALETTE)) == len(CLASSES)
    assert len(set(SEG_PALETTE)) == len(SEG_CLASSES)
    assert all(0 <= c <= 255 for colour in SEG_PALETTE for c in colour)


def test_layout_and_counts(data):
    names = set(snapshot(data.root))
    expected = {'demo.json'}
    for split in SPLITS:
        expected.add(f'annotations/instances_{split}.json')
        for i in range(SMALL[split]):
            expected |= {f'{split}/{i:06d}.jpg'}
            expected |= {f'{maps}/{split}/{i:06d}.png' for maps in ('semantic', 'foreground')}
        assert data.images[split] == SMALL[split]
        assert data.instances[split] == len(load(data.root, split)['annotations'])
    assert names == expected
    assert data.made
    assert [p.name for p in data.root.parent.iterdir()] == ['digits'], 'scratch folder left over'


@pytest.mark.parametrize('split', SPLITS)
def test_pycocotools_loads_it(data, split):
    coco = COCO(data.root / 'annotations' / f'instances_{split}.json')
    assert len(coco.getImgIds()) == SMALL[split]
    categories = coco.loadCats(coco.getCatIds())
    assert [c['name'] for c in categories] == list(CLASSES)
    assert [c['id'] for c in categories] == list(range(1, 11))
    ids = coco.getAnnIds()
    assert len(ids) == len(set(ids)) == data.instances[split]
    assert min(ids) >= 1, 'COCOeval takes id 0 for no match'
    for annotation in coco.loadAnns(ids):
        assert np.array_equal(
            coco.annToMask(annotation), coco_mask.decode(annotation['segmentation'])
        )
        assert annotation['iscrowd'] == 0


@pytest.mark.parametrize('split', SPLITS)
def test_boxes_and_areas_are_those_of_the_masks(data, split):
    for image, annotations, masks in by_image(data.root, split):
        assert (image['height'], image['width']) == (SMALL['size'],) * 2
        for annotation, mask in zip(annotations, masks, strict=True):
            assert mask.shape == (image['height'], image['width'])
            x, y, w, h = annotation['bbox']
            assert x >= 0
            assert y >= 0
            assert x + w <= image['width']
            assert y + h <= image['height']
            inside = mask[y : y + h, x : x + w]
            assert inside.sum() == mask.sum() == annotation['area'] > 0
            assert inside[[0, -1]].any(axis=1).all(), 'a loose side'
            assert inside[:, [0, -1]].any(axis=0).all(), 'a loose side'


@pytest.mark.parametrize('split', SPLITS)
def test_label_maps_are_the_instance_masks(data, split):
    for image, annotations, masks in by_image(data.root, split):
        path = (data.root / 'semantic' / split / image['file_name']).with_suffix('.png')
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        expected = np.zeros((SMALL['size'],) * 2, dtype=np.uint8)
        for annotation, mask in zip(annotations, masks, strict=True):
            expected[mask] = annotation['category_id']
        assert labels.dtype == np.uint8
        assert np.array_equal(labels, expected)
        foreground = str(path).replace('semantic', 'foreground')
        assert np.array_equal(cv2.imread(foreground, cv2.IMREAD_UNCHANGED), expected > 0)


@pytest.mark.parametrize('split', SPLITS)
def test_two_to_six_digits_that_hide_none_of_each_other(data, split):
    for _, annotations, masks in by_image(data.root, split):
        assert 2 <= len(annotations) <= 6
        assert np.sum(masks, axis=0).max() == 1
        boxes = np.array([a['bbox'] for a in annotations], dtype=float)
        ious = coco_mask.iou(boxes, boxes, [0] * len(boxes))
        assert (ious - np.eye(len(boxes))).max() < 0.05


def test_places_keep_boxes_apart_and_may_run_out():
    rng = np.random.default_rng(0)
    alpha = np.ones((10, 10), dtype=np.float32)
    box = (0, 0, 40, 20)
    free = np.zeros((40, 40), dtype=bool)
    rows = set()
    for _ in range(100):
        y, x = (part.start for part in digits._place(alpha, free, [box], rng))
        own = np.array([[x, y, 10, 10]], dtype=float)
        assert coco_mask.iou(own, np.array([box], dtype=float), [0])[0, 0] < 0.05
        rows.add(y)
    # 4 rows of 10 pixels in common: 40 of 860, still less than 5 %
    assert min(rows) == 16
    assert max(rows) == 30
    assert digits._place(alpha, ~free, [], rng) is None


def test_counts_and_sizes_vary(data):
    counts = [len(annotations) for _, annotations, _ in by_image(data.root, 'train')]
    heights = [a['bbox'][3] for a in load(data.root, 'train')['annotations']]
    assert len(set(counts)) >= 3
    assert max(heights) > 1.7 * min(heights)
    # 22..60 px of 192, give or take the scan's own empty rows, the aspect and the rotation
    assert 0.08 * SMALL['size'] < min(heights) < max(heights) < 0.4 * SMALL['size']


@pytest.mark.parametrize('split', SPLITS)
def test_digits_stand_out_of_the_photographs(data, split):
    distances = []
    for image, _, masks in by_image(data.root, split):
        picture = cv2.imread(str(data.root / split / image['file_name'])).astype(float)
        assert picture.shape == (SMALL['size'], SMALL['size'], 3)
        distances += [grey_distance(picture, mask) for mask in masks]
    assert np.min(distances) > 25
    assert np.median(distances) > 70


def test_category_is_the_scans_own_and_the_holes_of_zero_are_kept(data):
    from sklearn.datasets import load_digits

    truth = load_digits().target
    holes = []
    for _, annotations, masks in itertools.chain(*(by_image(data.root, s) for s in SPLITS)):
        for annotation, mask in zip(annotations, masks, strict=True):
            assert annotation['category_id'] == truth[annotation['scan']] + 1
            if annotation['category_id'] == 1:
                outside = cv2.connectedComponents(np.pad(~mask, 1, constant_values=1).view('u1'))
                holes.append(outside[0] - 2)
    assert np.mean(holes) > 0.5


def test_no_scan_is_in_both_splits(data):
    train, val = ({a['scan'] for a in load(data.root, s)['annotations']} for s in SPLITS)
    assert not train & val
    # That these few didn't meet by luck only: the parts themselves.
    truth = np.repeat(np.arange(10), 180)
    parts = digits._split_scans(truth, seed=0)
    assert np.array_equal(np.sort(np.concatenate([parts['train'], parts['val']])), np.arange(1800))
    assert np.array_equal(np.bincount(truth[parts['val']]), [36] * 10)
    assert not np.array_equal(parts['val'], digits._split_scans(truth, seed=1)['val'])


# ------------------------------------------------------------------------------ reproducibility


def test_same_seed_same_bytes_other_seed_other_bytes(data, tmp_path):
    twin = snapshot(make_digits(tmp_path / 'twin', **SMALL).root)
    assert twin == snapshot(data.root)
    other = snapshot(make_digits(tmp_path / 'other', **{**SMALL, 'seed': 4}).root)
    assert all(other[name] != twin[name] for name in twin)


def test_an_image_does_not_depend_on_how_many_are_made(data, tmp_path):
    few = make_digits(tmp_path / 'few', **{**SMALL, 'train': 2, 'val': 3}).root
    ours, theirs = snapshot(data.root), snapshot(few)
    for name in theirs:
        if name.endswith(('.jpg', '.png')):
            assert theirs[name] == ours[name], name
    for split, n in dict(train=2, val=3).items():
        expected = [a for a in load(data.root, split)['annotations'] if a['image_id'] < n]
        assert load(few, split)['annotations'] == expected


def test_size_scales_the_digits(data, tmp_path):
    large = make_digits(tmp_path / 'large', **{**SMALL, 'size': 160, 'train': 6, 'val': 1})
    heights = [a['bbox'][3] for a in load(large.root, 'train')['annotations']]
    small = [a['bbox'][3] for a in load(data.root, 'train')['annotations']]
    assert cv2.imread(str(large.root / 'train/000000.jpg')).shape == (160, 160, 3)
    assert np.mean(heights) / np.mean(small) == pytest.approx(160 / 96, rel=0.25)


def test_progress_counts_every_image(tmp_path):
    calls = []
    make_digits(
        tmp_path / 'a', train=2, val=1, size=64, progress=lambda *numbers: calls.append(numbers)
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]


# ------------------------------------------------------------------------------ the folder


def test_up_to_date_folder_is_left_alone(copy, monkeypatch):
    monkeypatch.setattr(digits, '_load_sources', lambda: pytest.fail('drawn again'))
    before = {path: path.stat().st_mtime_ns for path in copy.rglob('*')}
    again = make_digits(copy, **SMALL)
    assert not again.made
    assert again.instances['train'] == len(load(copy, 'train')['annotations'])
    assert {path: path.stat().st_mtime_ns for path in copy.rglob('*')} == before


@pytest.mark.parametrize(
    'lost',
    [
        'train/000003.jpg',
        'semantic/val/000001.png',
        'foreground/val/000001.png',
        'annotations/instances_val.json',
    ],
)
def test_incomplete_folder_is_made_again(copy, data, lost):
    (copy / lost).unlink()
    assert make_digits(copy, **SMALL).made
    assert snapshot(copy) == snapshot(data.root)


def test_older_version_is_made_again(copy, monkeypatch):
    monkeypatch.setattr(digits, 'VERSION', digits.VERSION + 1)
    assert make_digits(copy, **SMALL).made


def test_other_arguments_replace_the_folder(copy):
    assert make_digits(copy, train=3, val=2, size=64).made
    assert len(list((copy / 'train').iterdir())) == 3
    assert len(load(copy, 'val')['images']) == 2
    assert json.loads((copy / 'demo.json').read_text())['arguments'] == dict(
        train=3, val=2, size=64, seed=0
    )
    assert [p.name for p in copy.parent.iterdir()] == ['digits']


def test_interruption_keeps_the_old_folder_and_leaves_nothing_behind(copy):
    before = snapshot(copy)

    def interrupt(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_digits(copy, train=5, val=1, size=64, progress=interrupt)
    assert snapshot(copy) == before
    with pytest.raises(KeyboardInterrupt):
        make_digits(copy.parent / 'fresh', train=5, val=1, size=64, progress=interrupt)
    assert [p.name for p in copy.parent.iterdir()] == ['digits']


def test_folder_that_appears_meanwhile_is_kept(tmp_path):
    def appear(done, total):
        (tmp_path / 'digits').mkdir(exist_ok=True)
        (tmp_path / 'digits' / 'thesis.txt').write_text('ten years of work')

    with pytest.raises(FileExistsError, match='not made by this tool'):
        make_digits(tmp_path / 'digits', train=1, val=1, size=64, progress=appear)
    assert snapshot(tmp_path) == {'digits/thesis.txt': b'ten years of work'}


@pytest.mark.parametrize(
    'marker', [None, 'not json', '{}', '[]', '{"generator": "another tool"}'], ids=str
)
def test_foreign_folder_is_refused_and_untouched(tmp_path, marker):
    (tmp_path / 'thesis.txt').write_text('ten years of work')
    if marker is not None:
        (tmp_path / 'demo.json').write_text(marker)
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match='not made by this tool.*choose another'):
        make_digits(tmp_path, train=1, val=1, size=64)
    assert snapshot(tmp_path) == before


def test_own_folder_with_foreign_files_is_not_replaced(copy):
    (copy / 'notes.txt').write_text('mine')
    before = snapshot(copy)
    with pytest.raises(FileExistsError, match=r'notes\.txt'):
        make_digits(copy, **{**SMALL, 'seed': 9})
    assert snapshot(copy) == before


def test_file_is_refused(tmp_path):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(FileExistsError, match='not a folder'):
        make_digits(tmp_path / 'file', train=1, val=1, size=64)
    assert (tmp_path / 'file').read_text() == 'mine'


def test_empty_folder_and_link_are_filled(tmp_path):
    (tmp_path / 'disk' / 'empty').mkdir(parents=True)
    (tmp_path / 'link').symlink_to(tmp_path / 'disk' / 'empty')
    made = make_digits(tmp_path / 'link', train=1, val=1, size=64)
    assert (tmp_path / 'link').is_symlink()
    assert made.root == tmp_path / 'disk' / 'empty'
    assert (tmp_path / 'link' / 'demo.json').is_file()


@pytest.mark.parametrize('wrong', [dict(train=0), dict(val=0), dict(size=63), dict(seed=-1)])
def test_wrong_arguments(tmp_path, wrong):
    with pytest.raises(ValueError, match=f'^{next(iter(wrong))} must be at least') as error:
        make_digits(tmp_path / 'digits', **{**SMALL, **wrong})
    assert '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_missing_scikit_learn_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmdense\[demo\]'"):
        make_digits(tmp_path / 'digits', **SMALL)
    assert not list(tmp_path.iterdir())


def test_import_leaves_scikit_learn_alone():
    code = 'import sys, mmdense.datasets; sys.exit("sklearn" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


# ------------------------------------------------------------------------------ command line


def command(out, **arguments):
    return ['--out', str(out), *(f'--{name}={value}' for name, value in arguments.items())]


def test_command_makes_the_same_files(main, data, tmp_path, capsys):
    assert main(command(tmp_path / 'digits', **SMALL)) == 0
    assert snapshot(tmp_path / 'digits') == snapshot(data.root)
    assert f'made: 12 train images with {data.instances["train"]} digits' in capsys.readouterr().out
    assert main(command(tmp_path / 'digits', **SMALL)) == 0
    assert 'is up to date' in capsys.readouterr().out


def test_command_defaults(main, monkeypatch):
    calls = {}

    def record(out, *, progress, **arguments):
        calls.update(out=out, **arguments)
        return digits.DigitsData(Path(out), True, {}, {})

    monkeypatch.setitem(main.__globals__, 'make_digits', record)
    assert main(['--out', 'data/digits']) == 0
    assert calls == dict(out='data/digits', train=800, val=200, size=192, seed=0)


def test_command_refuses_in_one_line(main, tmp_path, capsys, monkeypatch):
    (tmp_path / '[red]thesis.txt').write_text('mine')
    cases = [
        (command(tmp_path), 'was not made by this tool'),
        (command(tmp_path / 'a', train=0), 'train must be at least 1, got 0'),
        (command(tmp_path / '[red]thesis.txt' / 'b', train=1), '[red]thesis.txt'),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ''
        assert message in err
        assert err.startswith('error: ')
        assert err.count('\n') == 1
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    assert main(command(tmp_path / 'c')) == 2
    assert "pip install 'mmdense[demo]'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main(['--train', '3'])
    assert usage.value.code == 2


# ------------------------------------------------------------------------------ the frameworks


def test_mmdet_loads_boxes_and_masks(data):
    from mmdet.datasets import CocoDataset

    dataset = CocoDataset(
        data_root=str(data.root),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=CLASSES, palette=PALETTE),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='mmdet.PackDetInputs'),
        ],
    )
    assert len(dataset) == SMALL['train']
    for item, (_, annotations, masks) in zip(dataset, by_image(data.root, 'train'), strict=True):
        truth = item['data_samples'].gt_instances
        boxes = np.array([a['bbox'] for a in annotations])
        boxes[:, 2:] += boxes[:, :2]
        assert item['inputs'].shape == (3, SMALL['size'], SMALL['size'])
        assert np.array_equal(truth.bboxes.tensor.numpy(), boxes)
        assert truth.labels.tolist() == [a['category_id'] - 1 for a in annotations]
        assert np.array_equal(truth.masks.masks.astype(bool), masks)


def test_mmseg_loads_label_maps(data):
    from mmseg.datasets import BaseSegDataset

    dataset = BaseSegDataset(
        data_root=str(data.root),
        data_prefix=dict(img_path='val', seg_map_path='semantic/val'),
        metainfo=dict(classes=SEG_CLASSES, palette=SEG_PALETTE),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='mmseg.LoadAnnotations'),
            dict(type='mmseg.PackSegInputs'),
        ],
    )
    assert len(dataset) == SMALL['val']
    for item, (_, annotations, masks) in zip(dataset, by_image(data.root, 'val'), strict=True):
        labels = item['data_samples'].gt_sem_seg.data[0].numpy()
        for annotation, mask in zip(annotations, masks, strict=True):
            assert np.array_equal(labels[mask], np.full(mask.sum(), annotation['category_id']))
        assert np.array_equal(labels == 0, ~np.any(masks, axis=0))
