"""Bad images, annotations and label maps: found before training, named during it."""

import json
import sys

import numpy as np
import pytest
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

import bad_data as bad
from mmdense.config.read import load_config
from mmdense.datasets.files import check_data
from mmdense.engine.bad_samples import naming
from mmdense.engine.runner import build_runner
from mmdense.errors import UserError
from support import DEMOS, ROOT

DIGITS = tuple('0123456789')
MASKS = 'train_dataloader.dataset.pipeline.1.with_mask=True'

# Annotations of image 1, 96 x 64 pixels, by the kind of finding.
LEFT_OUT = {
    'empty box': bad.box(20, bbox=(8, 8, 0, 30)),
    'box outside': bad.box(21, bbox=(200, 8, 40, 30)),
}
TRAINED = {
    None: bad.box(30, category=3, bbox=(10, 20, 40, 30)),
    'box crosses border': bad.box(31, category=4, bbox=(80, 40, 40, 40)),
}
IGNORED = {
    None: bad.box(40, iscrowd=1, bbox=(50, 4, 30, 30)),
    'short polygon': bad.box(41, bbox=(4, 4, 30, 30), segmentation=[[4, 4, 34, 34]]),
}
ERRORS = {
    'invalid field': bad.box(50) | dict(bbox=None),
    'unknown image': bad.box(51, image=99),
    'unknown category': bad.box(52, category=77),
    'invalid mask': bad.box(53, segmentation=dict(size=[9, 9], counts=[81])),
    'duplicate id': bad.box(50),
}


def detection(folder, files, annotations, split='train', classes=DIGITS):
    """Write images 1, 2, ... and their annotation file."""
    for name, (content, *_) in files.items():
        bad.write(folder / split, name, content)
    sizes = [rest[0] if len(rest) == 2 else (96, 64) for _, *rest in files.values()]
    images = [(i + 1, name, *sizes[i]) for i, name in enumerate(files)]
    content = bad.coco(images, annotations, classes)
    bad.write_json(folder / f'annotations/instances_{split}.json', content)


def full_boxes(files):
    """Return a box as large as the image for each image but the first."""
    sizes = [size for _, size, _ in files.values()]
    return [bad.box(100 + i, i, bbox=(0, 0, *sizes[i - 1])) for i in range(2, len(files) + 1)]


def segmentation(folder, split, maps, content=bad.INTACT):
    """Write copies of one image with their label maps."""
    for name, label_map in maps.items():
        bad.write(folder / split, f'{name}.jpg', content)
        bad.write(folder / 'foreground' / split, f'{name}.png', label_map)


LABELS = np.tile([[0, 1], [1, 255]], (32, 48)).astype(np.uint8)
MAPS = {
    'good': (bad.png(LABELS), None),
    'unknown': (bad.png(LABELS * 7), 'unknown label'),
    'small': (bad.png(LABELS[:, :90]), 'size mismatch'),
    'colour': (bad.png(bad.PIXELS), 'not a label map'),
    'deep': (bad.png(LABELS.astype(np.uint16) * 300), 'not a label map'),
    'ignored': (bad.png(LABELS * 0 + 255), 'no labels'),
    'truncated': (bad.encode('PNG')[:4000], 'damaged file'),
    'missing': (None, 'missing file'),
}


@pytest.fixture
def check(call_tool, tmp_path):
    """Run check_dataset.py; return (status, output, {kind: [(file, id)]})."""

    def run(task, *options):
        file = tmp_path / 'findings.json'
        status, output, error = call_tool(
            *('check_dataset', DEMOS[task], '--json', file, '--workers', 2),
            *('--cfg-options', f'data_root={tmp_path}', *options),
        )
        assert '100%' in error
        findings = {}
        for row in json.loads(file.read_text()):
            assert row['severity'] in ('error', 'warning')
            assert row['fix']
            findings.setdefault(row['kind'], []).append((row['file'], row['id']))
        return status, output, findings

    return run


def test_all_faults_of_detection_data_are_found_in_one_run(check, tmp_path):
    files = {**bad.USABLE, **bad.UNUSABLE}
    faults = {**LEFT_OUT, **TRAINED, **IGNORED, **ERRORS}
    detection(tmp_path, files, [*faults.values(), *full_boxes(bad.USABLE)])
    detection(tmp_path, {'intact.jpg': bad.USABLE['intact.jpg']}, [bad.box(1)], 'val')
    status, output, findings = check('detection', MASKS)
    assert status == 1, output
    ids = {name: f'image {i}' for i, name in enumerate(files, 1)}
    for name, (*_, kind) in files.items():
        row = (str(tmp_path / 'train' / name), ids[name])
        assert [k for k, rows in findings.items() if row in rows] == ([kind] if kind else []), name
    file = str(tmp_path / 'annotations/instances_train.json')
    for kind, annotation in faults.items():
        parts = [part for name, part in findings.get(kind, ()) if name == file]
        assert not kind or any(f'annotation {annotation["id"]}' in part for part in parts), kind
    assert {part for _, part in findings['no objects']} == {ids[name] for name in bad.UNUSABLE}
    for kind, rows in findings.items():  # the text shows the first of each kind
        assert f'{kind}\n' in output
        assert rows[0][0] in output
    assert output.splitlines()[-1].startswith(f'{len(files) + 1} images: ')


def test_all_faults_of_label_maps_are_found_in_one_run(check, tmp_path):
    segmentation(tmp_path, 'train', {name: content for name, (content, _) in MAPS.items()})
    segmentation(tmp_path, 'val', dict(good=MAPS['good'][0]))
    status, output, findings = check('segmentation')
    assert status == 1, output
    for name, (_, kind) in MAPS.items():
        row = (str(tmp_path / f'foreground/train/{name}.png'), '')
        assert [k for k, rows in findings.items() if row in rows] == ([kind] if kind else []), name
    assert output.splitlines()[-1] == f'{len(MAPS) + 1} images: 7 errors, 3 warnings'


@pytest.mark.slow
def test_intact_data_have_no_findings(call_tool, run_tool):
    arguments = ['--loaders', 'train', '--workers', 1]
    status, output, _ = call_tool('check_dataset', DEMOS['detection'], *arguments)
    assert (status, output.splitlines()[-1]) == (0, '16 images: 0 errors, 0 warnings')
    command = [sys.executable, ROOT / 'tools/check_dataset.py', DEMOS['segmentation'], *arguments]
    status, output = run_tool(*command)
    assert (status, output.splitlines()[-1]) == (0, '16 images: 0 errors, 0 warnings')


class Recorder(Hook):
    """Records the model's inputs by the name of the image, and the loss."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        samples = zip(data_batch['inputs'], data_batch['data_samples'], strict=True)
        self.inputs = {sample.img_path.split('/')[-1]: (x, sample) for x, sample in samples}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.loss = outputs['loss'].item()


def train(task, folder, *, workers=0, **options):
    """Train on one batch in this process; return the recorder."""
    config = load_config(
        str(DEMOS[task]),
        options={
            'data_root': str(folder),
            'train_dataloader.batch_size': 16,
            'train_dataloader.num_workers': workers,
            'train_dataloader.persistent_workers': False,
            'train_dataloader.sampler.shuffle': False,
            'val_dataloader.num_workers': 0,
            'val_dataloader.persistent_workers': False,
            **({'train_cfg.max_epochs': 1} if task == 'detection' else {'train_cfg.max_iters': 1}),
            **options,
        },
        work_dir=str(folder / 'work'),
    )
    runner = build_runner(config, loaders=('train', 'val'))
    recorder = Recorder()
    runner.register_hook(recorder)
    runner.train()
    return recorder


@pytest.mark.slow
def test_training_continues_where_the_check_only_warns(tmp_path):
    annotations = [*LEFT_OUT.values(), *TRAINED.values(), *IGNORED.values()]
    annotations += full_boxes(bad.USABLE)[:-1]  # the last image has no object
    detection(tmp_path, bad.USABLE, annotations)
    detection(tmp_path, {'intact.jpg': bad.USABLE['intact.jpg']}, [bad.box(1)], 'val')
    recorder = train('detection', tmp_path, **dict([MASKS.split('=')]))
    assert set(recorder.inputs) == set(bad.USABLE)
    assert np.isfinite(recorder.loss)
    # Images have their size after rotation, scaled to 192 pixels.
    shapes = {name: tuple(x.shape) for name, (x, _) in recorder.inputs.items()}
    assert shapes.pop('rotated.jpg') == (3, 192, 128)
    assert shapes.pop('dot.png') == (3, 192, 192)
    assert shapes.pop('line.png') == (3, 1, 192)
    assert shapes.pop('side-116.png') == (3, 139, 192)
    assert set(shapes.values()) == {(3, 128, 192)}
    # Every format has the colours of the same picture.
    picture = recorder.inputs['opaque.png'][0].int()
    for name, allowed in (
        ('clear.png', 0),
        ('deep.png', 0),
        ('deep.tif', 1),
        ('intact.jpg', 6),
        ('progressive.jpg', 6),
        ('cmyk.jpg', 6),
    ):
        difference = (recorder.inputs[name][0].int() - picture).abs().float().mean()
        assert difference <= allowed, name
    grey = recorder.inputs['deep-grey.png'][0]
    assert (grey == grey[:1]).all()
    assert (grey[0].int() == picture[0]).all()
    upright = recorder.inputs['rotated.jpg'][0].int()
    stored = recorder.inputs['intact.jpg'][0].int()
    assert (upright.rot90(1, (1, 2)) - stored).abs().float().mean() < 2
    # Boxes are clipped; crowds and polygons of two points are ignored.
    sample = recorder.inputs['intact.jpg'][1]
    assert sample.gt_instances.bboxes.tensor.tolist() == [[20, 40, 100, 100], [160, 80, 192, 128]]
    assert sample.gt_instances.labels.tolist() == [2, 3]
    ignored = sample.ignored_instances.bboxes.tensor.tolist()
    assert ignored == [[100, 8, 160, 68], [8, 8, 68, 68]]
    assert recorder.inputs['rotated.jpg'][1].gt_instances.bboxes.tensor.tolist() == [
        [0, 0, 128, 192]
    ]
    assert len(recorder.inputs['line.png'][1].gt_instances) == 0


@pytest.mark.slow
def test_training_stops_with_one_line(run_tool, tmp_path):
    """In a worker process, as users run it."""
    files = {name: {**bad.USABLE, **bad.UNUSABLE}[name] for name in ('intact.jpg', 'truncated.png')}
    for split in ('train', 'val'):
        detection(tmp_path, files, [bad.box(1)], split)
    status, output = run_tool(
        *(
            sys.executable,
            ROOT / 'tools/train.py',
            DEMOS['detection'],
            '--work-dir',
            tmp_path / 'work',
        ),
        *('--cfg-options', f'data_root={tmp_path}'),
    )
    assert status == 2, output
    assert 'Traceback' not in output
    assert output.splitlines()[-1].startswith(
        f'error: {tmp_path}/train/truncated.png: image 2: damaged ('
    )
    assert 'tools/check_dataset.py' in output.splitlines()[-1]


def loader(task, folder, workers=0, check=False, **options):
    """Build the training loader as the tools do, with one batch."""
    options = {f'train_dataloader.{key}': value for key, value in options.items()}
    config = load_config(str(DEMOS[task]), options={'data_root': str(folder), **options})
    config.train_dataloader.update(
        batch_size=16,
        num_workers=workers,
        persistent_workers=bool(workers),
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    if check:
        check_data(config, ('train',))
    with DefaultScope.overwrite_default_scope(config.default_scope):
        return naming(Runner).build_dataloader(config.train_dataloader, seed=0)


def stops(task, folder, workers=0, **options):
    """Return the one-line error of reading a batch."""
    with pytest.raises(UserError) as error:
        next(iter(loader(task, folder, workers, **options)))
    assert '\n' not in str(error.value)
    assert 'tools/check_dataset.py' in str(error.value)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('name', bad.UNUSABLE)
def test_training_names_an_image_that_it_cannot_use(name, tmp_path):
    detection(tmp_path, {name: bad.UNUSABLE[name]}, [bad.box(1)])
    if name == 'zeros.jpg':  # OpenCV fills in the missing pixels without a warning
        assert next(iter(loader('detection', tmp_path)))['inputs'][0].shape == (3, 128, 192)
        return
    assert stops('detection', tmp_path).startswith(f'{tmp_path}/train/{name}: image 1: ')


@pytest.mark.parametrize(
    ('name', 'workers'),
    [('unknown', 0), ('small', 0), ('colour', 0), ('deep', 0), ('truncated', 0), ('missing', 1)],
)
def test_training_names_a_label_map_that_it_cannot_use(name, workers, tmp_path):
    segmentation(tmp_path, 'train', dict(good=MAPS['good'][0], wrong=MAPS[name][0]))
    line = stops('segmentation', tmp_path, workers)
    assert line.startswith(f'{tmp_path}/foreground/train/wrong.png: ')


@pytest.mark.slow
def test_training_asks_for_classes_that_are_in_the_file(tmp_path):
    file = tmp_path / 'annotations/instances_train.json'
    for classes, missing in (
        (DIGITS[:9], 'no category 9 (it has 0, 1, 2, 3, 4, 5, 6, 7, 8)'),
        (('cat', 'dog'), 'no category 0, 1, 2, 3, 4 and 5 more (it has cat, dog)'),
    ):
        detection(tmp_path, {'intact.jpg': bad.USABLE['intact.jpg']}, [bad.box(1)], classes=classes)
        assert stops('detection', tmp_path, check=True).startswith(f'{file}: {missing}: ')
    # mmdet drops every image, and numpy has nothing to concatenate.
    filters = {'dataset.filter_cfg': dict(filter_empty_gt=True)}
    line = stops('detection', tmp_path, check=True, **filters)
    assert line.startswith(f'{file}: {missing}: ')


def test_training_names_the_fault_of_an_annotation_file(tmp_path):
    image = {'intact.jpg': bad.USABLE['intact.jpg']}
    file = tmp_path / 'annotations/instances_train.json'
    for annotations, message in (
        ([bad.box(1), bad.box(1)], 'annotation 1: annotations[1] has the same id: '),
        ([bad.box(1) | dict(bbox=None)], 'image 1, annotation 1: bbox is None, area is 1200: '),
    ):
        detection(tmp_path, image, annotations)
        assert stops('detection', tmp_path, check=True).startswith(f'{file}: {message}')
    file.write_bytes(file.read_bytes()[:-20])
    line = stops('detection', tmp_path, check=True)
    assert line.startswith(f'{file}: JSONDecodeError: ')


def shrink(content):
    for annotation in content['annotations']:
        annotation['bbox'] = [value / 96 for value in annotation['bbox']]


def reverse(content):
    content['categories'].reverse()


def merge(content):
    content['categories'][1]['name'] = '0'


def write_floats(content):
    for record in content['images'] + content['annotations'] + content['categories']:
        record.update({key: float(record[key]) for key in record if key.endswith('id')})


EXCHANGED = "val_dataloader.dataset: label 0 is '9', but '0' in train_dataloader.dataset: list the"
CHANGES = {  # of the training or validation file, or both -> status of train.py, line
    (shrink, 'train'): (2, '2 of 2 boxes lie between 0 and 1, such as [0.083, 0.083, 0.417, 0.31'),
    (reverse, 'val'): (2, EXCHANGED),
    (reverse, 'train val'): (2, "label 0 is '9', but '0' in metainfo.classes: order metainfo.clas"),
    (merge, 'train val'): (2, "2 categories are '0', and mmdet gives each its own label: give all"),
    (write_floats, 'train val'): (0, '2 images: 0 errors, '),
}


@pytest.mark.parametrize(('change', 'splits'), CHANGES)
def test_mistakes_in_whole_annotation_files(change, splits, call_tool, tmp_path):
    image = {'intact.jpg': bad.USABLE['intact.jpg']}
    for split in ('train', 'val'):
        detection(tmp_path, image, [bad.box(1), bad.box(2, category=2)], split)
        file = tmp_path / f'annotations/instances_{split}.json'
        content = json.loads(file.read_text())
        if split in splits:
            change(content)
        bad.write_json(file, content)
    status, line = CHANGES[change, splits]
    options = ['--cfg-options', f'data_root={tmp_path}']
    code, output, _ = call_tool('check_dataset', DEMOS['detection'], '--workers', 1, *options)
    assert code == (status > 0), output
    assert line.partition(': ')[0] in output
    if status:
        work = ['--work-dir', tmp_path / 'work']
        code, output, error = call_tool('train', DEMOS['detection'], *work, *options)
        assert code == status
        assert line in error
        assert len(error.splitlines()) == 1


def test_binary_masks_stop_training(call_tool, tmp_path):
    for split in ('train', 'val'):
        segmentation(tmp_path, split, dict(a=bad.png((LABELS > 1).astype(np.uint8) * 255)))
    options = ['--work-dir', tmp_path / 'work', '--cfg-options', f'data_root={tmp_path}']
    status, _, error = call_tool('train', DEMOS['segmentation'], *options)
    assert status == 2
    assert 'train_dataloader.dataset: the label maps contain only 0, 255: no pixel of ' in error
