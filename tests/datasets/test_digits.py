"""The demo dataset: its files, its folder and its command."""

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

from mmdense.datasets import digits, make_digits
from support import ROOT, load_tool

SPLITS = ('train', 'val')
SMALL = dict(train=12, val=6, size=96, seed=3)
TINY = dict(train=1, val=1, size=64)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp('data') / 'digits', **SMALL)


@pytest.fixture
def copy(data, tmp_path):
    """A folder that a test may change."""
    return Path(shutil.copytree(data.root, tmp_path / 'digits'))


def load(root, split):
    return json.loads((root / f'annotations/instances_{split}.json').read_text())


def by_image(root, split):
    """Yield (image's record, its annotations, their masks)."""
    content = load(root, split)
    for image in content['images']:
        rows = [a for a in content['annotations'] if a['image_id'] == image['id']]
        yield image, rows, [coco_mask.decode(a['segmentation']).astype(bool) for a in rows]


def snapshot(root):
    """Return each file's bytes by its relative path."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob('*') if p.is_file()}


# Files


def test_layout_and_counts(data):
    expected = {'demo.json'}
    for split in SPLITS:
        expected.add(f'annotations/instances_{split}.json')
        for i in range(SMALL[split]):
            expected.add(f'{split}/{i:06d}.jpg')
            expected |= {f'{maps}/{split}/{i:06d}.png' for maps in ('semantic', 'foreground')}
        assert data.images[split] == SMALL[split]
        assert data.instances[split] == len(load(data.root, split)['annotations'])
    assert set(snapshot(data.root)) == expected
    assert data.made
    assert [p.name for p in data.root.parent.iterdir()] == ['digits'], 'temporary folder left over'


@pytest.mark.parametrize('split', SPLITS)
def test_annotations_agree_with_masks_and_label_maps(data, split):
    coco = COCO(data.root / f'annotations/instances_{split}.json')
    assert [(c['id'], c['name']) for c in coco.loadCats(coco.getCatIds())] == [
        (i + 1, str(i)) for i in range(10)
    ]
    ids = coco.getAnnIds()
    assert sorted(ids) == list(range(1, data.instances[split] + 1))  # COCOeval ignores id 0
    for image, annotations, masks in by_image(data.root, split):
        assert (image['height'], image['width']) == (SMALL['size'],) * 2
        labels = np.zeros((SMALL['size'],) * 2, dtype=np.uint8)
        assert 2 <= len(annotations) <= 6
        for annotation, mask in zip(annotations, masks, strict=True):
            assert (coco.annToMask(annotation) == mask).all()
            assert annotation['bbox'] == list(cv2.boundingRect(mask.astype(np.uint8)))
            assert annotation['area'] == mask.sum() > 0
            assert annotation['iscrowd'] == 0
            labels[mask] = annotation['category_id']
        boxes = np.array([a['bbox'] for a in annotations], dtype=float)
        overlap = coco_mask.iou(boxes, boxes, [0] * len(boxes))
        assert (overlap == np.eye(len(boxes))).all()
        for maps, expected in (('semantic', labels), ('foreground', labels > 0)):
            path = (data.root / maps / split / image['file_name']).with_suffix('.png')
            assert (cv2.imread(str(path), cv2.IMREAD_UNCHANGED) == expected).all()


def test_counts_and_sizes_vary(data):
    counts = [len(annotations) for _, annotations, _ in by_image(data.root, 'train')]
    heights = [a['bbox'][3] for a in load(data.root, 'train')['annotations']]
    assert len(set(counts)) >= 3
    assert max(heights) > 1.7 * min(heights)
    assert 0.08 * SMALL['size'] < min(heights) < max(heights) < 0.4 * SMALL['size']


def test_digits_stand_out_and_keep_their_class_and_holes(data):
    from sklearn.datasets import load_digits

    truth, distances, holes = load_digits().target, [], []
    for split in SPLITS:
        for image, annotations, masks in by_image(data.root, split):
            picture = cv2.imread(str(data.root / split / image['file_name'])).astype(float)
            for annotation, mask in zip(annotations, masks, strict=True):
                assert annotation['category_id'] == truth[annotation['scan']] + 1
                inner, outer = (
                    cv2.dilate(mask.astype(np.uint8), np.ones((n, n))) > 0 for n in (3, 9)
                )
                around = picture[outer & ~inner].mean(axis=0)
                distances.append(np.abs(picture[mask].mean(axis=0) - around).max())
                if annotation['category_id'] == 1:
                    outside = np.pad(~mask, 1, constant_values=True).astype(np.uint8)
                    holes.append(cv2.connectedComponents(outside)[0] - 2)
    assert np.min(distances) > 25
    assert np.median(distances) > 70
    assert np.mean(holes) > 0.5


def test_no_scan_is_in_both_splits(data):
    train, val = ({a['scan'] for a in load(data.root, s)['annotations']} for s in SPLITS)
    assert not train & val


# Reproducibility


def test_the_seed_decides_and_the_number_of_images_does_not(data, tmp_path):
    calls = []
    options = dict(SMALL, train=2, val=3, progress=lambda *numbers: calls.append(numbers))
    few = make_digits(tmp_path / 'few', **options).root
    assert calls == [(i, 5) for i in range(1, 6)]
    expected = snapshot(data.root)
    for name, content in snapshot(few).items():
        if name.endswith(('.jpg', '.png')):
            assert content == expected[name], name
    annotations = load(few, 'val')['annotations']
    assert annotations == load(data.root, 'val')['annotations'][: len(annotations)]
    other = snapshot(make_digits(tmp_path / 'other', **{**SMALL, 'seed': 4}).root)
    assert all(other[name] != expected[name] for name in expected)


def test_size_scales_the_digits(data, tmp_path):
    large = make_digits(tmp_path / 'large', **{**SMALL, 'size': 160, 'train': 6, 'val': 1})
    heights = [
        np.mean([a['bbox'][3] for a in load(root, 'train')['annotations']])
        for root in (large.root, data.root)
    ]
    assert cv2.imread(str(large.root / 'train/000000.jpg')).shape == (160, 160, 3)
    assert heights[0] / heights[1] == pytest.approx(160 / 96, rel=0.25)


# The folder


def test_a_folder_that_is_up_to_date_stays(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob('*')}
    again = make_digits(copy, **SMALL)
    assert not again.made
    assert again.instances['train'] == len(load(copy, 'train')['annotations'])
    assert {path: path.stat().st_mtime_ns for path in copy.rglob('*')} == before


@pytest.mark.parametrize('file', ['semantic/val/000001.png', 'annotations/instances_val.json'])
def test_an_incomplete_folder_is_replaced(copy, data, file):
    (copy / file).unlink()
    assert make_digits(copy, **SMALL).made
    assert snapshot(copy) == snapshot(data.root)  # the same arguments give the same bytes


def test_older_versions_and_other_arguments_are_replaced(copy, monkeypatch):
    assert make_digits(copy, **TINY).made
    assert len(list((copy / 'train').iterdir())) == 1
    assert json.loads((copy / 'demo.json').read_text())['arguments'] == dict(TINY, seed=0)
    assert [p.name for p in copy.parent.iterdir()] == ['digits']
    monkeypatch.setattr(digits, 'VERSION', digits.VERSION + 1)
    assert make_digits(copy, **TINY).made


def test_an_interruption_keeps_the_old_folder(copy):
    before = snapshot(copy)

    def interrupt(done, total):
        raise KeyboardInterrupt

    for folder in (copy, copy.parent / 'fresh'):
        with pytest.raises(KeyboardInterrupt):
            make_digits(folder, **TINY, progress=interrupt)
    assert snapshot(copy) == before
    assert [p.name for p in copy.parent.iterdir()] == ['digits']


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    def appear(done, total):
        (tmp_path / 'digits').mkdir(exist_ok=True)
        (tmp_path / 'digits/thesis.txt').write_text('ten years of work')

    with pytest.raises(FileExistsError, match='not made by this tool'):
        make_digits(tmp_path / 'digits', **TINY, progress=appear)
    assert snapshot(tmp_path) == {'digits/thesis.txt': b'ten years of work'}


@pytest.mark.parametrize('marker', [None, 'not json', '[]', '{"generator": "other"}'], ids=str)
def test_a_foreign_folder_is_refused(tmp_path, marker):
    (tmp_path / 'thesis.txt').write_text('ten years of work')
    if marker is not None:
        (tmp_path / 'demo.json').write_text(marker)
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match='not made by this tool.*choose another'):
        make_digits(tmp_path, **TINY)
    assert snapshot(tmp_path) == before
    with pytest.raises(FileExistsError, match='not a folder'):
        make_digits(tmp_path / 'thesis.txt', **TINY)


def test_foreign_files_in_the_folder_are_not_deleted(copy):
    (copy / 'notes.txt').write_text('mine')
    before = snapshot(copy)
    with pytest.raises(FileExistsError, match=r'notes\.txt'):
        make_digits(copy, **TINY)
    assert snapshot(copy) == before


def test_an_empty_folder_behind_a_link_is_filled(tmp_path):
    (tmp_path / 'disk/empty').mkdir(parents=True)
    (tmp_path / 'link').symlink_to(tmp_path / 'disk/empty')
    assert make_digits(tmp_path / 'link', **TINY).root == tmp_path / 'disk/empty'
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'link/demo.json').is_file()


@pytest.mark.parametrize('wrong', [dict(train=0), dict(val=0), dict(size=63), dict(seed=-1)])
def test_arguments_out_of_range(tmp_path, wrong):
    with pytest.raises(ValueError, match=f'^{next(iter(wrong))} must be at least'):
        make_digits(tmp_path / 'digits', **{**SMALL, **wrong})
    assert not list(tmp_path.iterdir())


def test_scikit_learn_is_imported_only_when_needed(tmp_path, monkeypatch):
    code = 'import sys, mmdense.datasets; sys.exit("sklearn" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmdense\[demo\]'"):
        make_digits(tmp_path / 'digits', **SMALL)
    assert not list(tmp_path.iterdir())


# The command


def test_the_command_makes_the_same_files(data, tmp_path, call_tool):
    arguments = [f'--{name}={value}' for name, value in SMALL.items()]
    status, output, _ = call_tool('make_demo_dataset', '--out', tmp_path / 'digits', *arguments)
    assert status == 0
    assert f'made: 12 train images with {data.instances["train"]} digits' in output
    assert snapshot(tmp_path / 'digits') == snapshot(data.root)
    _, output, _ = call_tool('make_demo_dataset', '--out', tmp_path / 'digits', *arguments)
    assert 'is up to date' in output
    defaults = vars(load_tool('make_demo_dataset').parser().parse_args(['--out', 'x']))
    assert defaults == dict(out='x', train=800, val=200, size=192, seed=0, crops=None)


def test_the_command_fails_with_one_line(tmp_path, call_tool, monkeypatch):
    (tmp_path / '[red]thesis.txt').write_text('mine')

    def fails(message, *arguments):
        status, output, error = call_tool('make_demo_dataset', *arguments)
        assert (status, output, error.count('\n')) == (2, '', 1)
        assert error.startswith('error: ')
        assert message in error

    fails('not made by this tool', '--out', tmp_path)
    fails('train must be at least 1, got 0', '--out', tmp_path / 'a', '--train', 0)
    fails('[red]thesis.txt', '--out', tmp_path / '[red]thesis.txt/b')
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    fails("pip install 'mmdense[demo]'", '--out', tmp_path / 'c')
