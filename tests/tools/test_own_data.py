"""tools/own_data.py: its configs, its messages, and its way from data to predictions."""

import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from mmdense.config.read import load_config
from mmdense.errors import UserError
from support import DEMOS, ROOT, load_tool

TOOL = load_tool('own_data')
README = ROOT / 'README.md'
VOC = """<annotation><object><name>{name}</name><difficult>{difficult}</difficult><bndbox>
<xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>50</ymax></bndbox></object></annotation>"""


def write_image(file, value=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((64, 64), value, np.uint8)).save(file)


def write_coco(folder, names=('animals', 'cat'), categories=(2,)):
    for split, count in (('train', 6), ('val', 2)):
        images = [
            dict(id=i, file_name=f'{split}{i}.jpg', width=64, height=64) for i in range(count)
        ]
        for image in images:  # in one folder
            write_image(folder / 'images' / image['file_name'])
        objects = [
            dict(id=i, image_id=i, category_id=number, bbox=[8, 8, 30, 30], area=900, iscrowd=0)
            for i, number in zip(range(count), itertools.cycle(categories))
        ]
        content = dict(images=images, annotations=objects)
        content['categories'] = [dict(id=i, name=name) for i, name in enumerate(names, start=1)]
        (folder / f'{split}.json').write_text(json.dumps(content))


def write_voc(folder):
    for split, name, difficult in (('train', 'dog', 0), ('val', 'cat', 1)):
        write_image(folder / f'JPEGImages/{split}.png')
        for file, text in (
            (folder / f'Annotations/{split}.xml', VOC.format(name=name, difficult=difficult)),
            (folder / f'ImageSets/Main/{split}.txt', f'{split}\n'),
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


def write_maps(folder, values=(0, 255), suffix='_mask.png'):
    for split in ('train', 'val'):
        for i, value in enumerate(values):
            write_image(folder / f'images/{split}/{i}.png')
            write_image(folder / f'labels/{split}/{i}{suffix}', value)


COCO = '--annotations train.json val.json --images images images'
MAPS = '--annotations labels/train labels/val --images images/train images/val --classes road car'


def config_of(folder, options, **changes):
    args = TOOL.parser().parse_args(['--data', str(folder), *options.split()])
    args.out = folder / 'out'
    data = TOOL.read_data(args)
    file = folder / 'config.py'
    base = ROOT / 'configs' / TOOL.BASES[data.task]
    file.write_text(TOOL.make_config(data, base, **dict(epochs=None, flip=True) | changes))
    return data, load_config(str(file))


def test_coco(tmp_path):
    write_coco(tmp_path)
    data, cfg = config_of(tmp_path, f'{COCO} --masks')
    assert data.notes == ['no annotations, left out: animals']
    assert [file.name for file in data.val_images] == ['val0.jpg', 'val1.jpg']
    for loader in ('train', 'val', 'test'):
        assert cfg[f'{loader}_dataloader'].dataset.metainfo.classes == ('cat',)
    heads = cfg.model.roi_head
    assert heads.bbox_head.num_classes == heads.mask_head.num_classes == 1
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == str(tmp_path / 'val.json')
    # 3 steps an epoch: 100 epochs, and a warm-up that ends.
    assert cfg.train_cfg.max_epochs == TOOL.MAX_EPOCHS
    warm_up, steps = cfg.param_scheduler
    assert warm_up.end == 30
    assert steps.milestones == [67, 92]
    assert cfg.auto_scale_lr.enable
    _, cfg = config_of(tmp_path, COCO, epochs=5, flip=False)
    assert cfg.train_cfg.max_epochs == 5
    assert 'RandomFlip' not in str(cfg.train_dataloader)


def test_voc(tmp_path):
    write_voc(tmp_path)
    lists = '--annotations ImageSets/Main/train.txt ImageSets/Main/val.txt'
    data, cfg = config_of(tmp_path, lists)
    assert data.classes == ('dog',)
    assert data.notes == ['no annotations, left out: cat']
    (crowd,) = json.loads((tmp_path / 'out/val.json').read_text())['annotations']
    assert (crowd['bbox'], crowd['iscrowd']) == ([10, 20, 30, 30], 1)
    assert cfg.train_dataloader.dataset.ann_file == str(tmp_path / 'out/train.json')
    assert data.val_images == [tmp_path / 'JPEGImages/val.png']


def test_label_maps(tmp_path):
    write_maps(tmp_path)
    data, cfg = config_of(tmp_path, MAPS)
    assert data.notes == ['binary masks: 0 is road, 255 is car']
    dataset = cfg.train_dataloader.dataset
    assert (dataset.type, dataset['values']) == ('mmdense.LabelMapDataset', [0, 255])
    assert {*map(tuple, dataset.metainfo.palette)} & {(0, 0, 0)} == set()
    assert (dataset.img_suffix, dataset.seg_map_suffix) == ('.png', '_mask.png')
    heads = cfg.model.decode_head, cfg.model.auxiliary_head
    assert [head.num_classes for head in heads] == [2, 2]
    assert cfg.train_cfg.max_iters == TOOL.SEGMENTOR_STEPS[0]
    write_maps(tmp_path, (0, 1, 255))
    data, cfg = config_of(tmp_path, MAPS.replace('road', 'Background'))
    assert tuple(cfg.train_dataloader.dataset.metainfo.palette[0]) == (0, 0, 0)
    assert cfg.train_dataloader.dataset.type == 'BaseSegDataset'
    _, cfg = config_of(tmp_path, f'{MAPS} --values 1 0')
    assert cfg.train_dataloader.dataset['values'] == [1, 0]


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ('options', 'change', 'message'),
    [
        ('', None, 'no annotations .*instances_train.json: pass --data and --annotations'),
        ('--annotations train.json val.json', None, 'no image folder .*/train: pass --images'),
        (COCO, write('val.json', '{}'), 'val.json is not a COCO file: it needs images'),
        (COCO, write('train.json', 'x'), 'train.json is not a COCO file .JSONDecodeError'),
        (f'{COCO} --classes cow', None, 'no category cow in train.json: it has animals, cat'),
        (f'{COCO} --values 1', None, '--values is for label maps'),
        (MAPS.partition(' --classes')[0], None, 'label maps have no class names: pass --classes'),
        (f'{MAPS} --masks', None, '--masks is for COCO files'),
        (f'{MAPS} --values 1 2 3', None, '3 --values for 2 --classes'),
        (f'{MAPS} --values 1 1', None, '1 --values for 2 --classes'),
        (
            '--annotations images/train images/val --images images/train images/val',
            None,
            'images and annotations are the same: see docs/classification.md for classes',
        ),
        (
            '--annotations Annotations Annotations --images images/train images/val',
            write_voc,
            'Annotations has no label maps .PNG.: convert YOLO',
        ),
        (
            MAPS,
            remove('labels/val/0_mask.png'),
            '1 of 2 images in .*images/val have no label map in .*labels/val: 0_mask.png',
        ),
        (
            MAPS,
            lambda folder: write_image(folder / 'images/train/x.PNG'),
            'images/train has 2 .png, 1 .PNG images: mmseg reads one suffix',
        ),
        (
            MAPS,
            lambda folder: write_maps(folder, (0, 9)),
            'have the values 0, 9, but 2 classes: pass --classes for 0 to 9, or --values, one per',
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, options, change, message):
    write_coco(tmp_path)
    write_maps(tmp_path)
    if change:
        change(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        config_of(tmp_path, options)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['pets', 'roads'])
def test_the_readme_s_configs(name, tmp_path, call_tool, monkeypatch):
    write_coco(tmp_path / 'pets', ('cat', 'dog'), (1, 2))
    write_maps(tmp_path / 'roads')
    for image in (tmp_path / 'roads/images').rglob('*.png'):
        image.rename(image.with_suffix('.jpg'))
    (config,) = re.findall(rf'```python\n# {name}.py\n(.*?)```', README.read_text(), re.DOTALL)
    file = tmp_path / f'{name}.py'
    file.write_text(
        config.replace("_base_ = '", f"_base_ = '{ROOT}/").replace(
            f"'{name}/", f"'{tmp_path}/{name}/"
        )
    )
    status, output, _ = call_tool('check_dataset', file)
    assert status == 0, output
    assert '0 errors, 1 warnings' in output  # the same images in both


@pytest.mark.slow
@pytest.mark.parametrize('task', DEMOS)
def test_from_data_to_predictions(project, run_tool, tmp_path, task):
    """In a real process; started again after a failure, it begins anew."""
    base = DEMOS[task]
    if task == 'detection':
        write_coco(tmp_path)
        options = COCO.split()
    else:
        write_maps(tmp_path)
        options = MAPS.split()
    command = [sys.executable, ROOT / 'tools/own_data.py', '--data', tmp_path, *options]
    command += ['--base', base, '--out', tmp_path / 'out', '--backbones', base]
    short = ['--epochs', '1', '--', '--rounds', '1', '--pictures', '1', '--cfg-options']
    status, output = run_tool(*command, *short, 'optim_wrapper.optimizer.lr=-1')
    assert status == 1, output
    assert re.search(r'^rdnet-nano: .*Invalid learning rate: -1', output, re.M), output
    status, output = run_tool(*command, *short, 'optim_wrapper.optimizer.lr=0.001')
    assert status == 0, output
    assert output.splitlines()[-1].startswith('best: rdnet-nano, ')
    assert (tmp_path / 'out/report.html').stat().st_size
    dataset = json.loads((tmp_path / 'out/best/predictions.json').read_text())
    names = {image['file_name'].rpartition('/')[2] for image in dataset['images']}
    assert names == ({'val0.jpg', 'val1.jpg'} if task == 'detection' else {'0.png', '1.png'})


@pytest.mark.slow
@pytest.mark.parametrize('whole_group', [False, True])
def test_ctrl_c_ends_the_training_too(project, whole_group):
    """A terminal sends it to the whole group, `kill -INT` to the tool alone."""
    out = project / f'interrupted-{whole_group}'
    command = [sys.executable, ROOT / 'tools/own_data.py', '--data', 'data/digits', '--out', out]
    command += ['--base', DEMOS['detection'], '--backbones', 'rexnet-1.0', '--epochs', '1000']
    command += ['--', '--from-scratch']
    with subprocess.Popen(
        [*map(str, command)],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    ) as tool:
        log, end = out / 'runs/rexnet-1.0/output.log', time.monotonic() + 300
        while not (log.exists() and 'Epoch(train)' in log.read_text()):
            assert tool.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)
        (os.killpg if whole_group else os.kill)(tool.pid, signal.SIGINT)
        output, _ = tool.communicate(timeout=120)
    assert tool.returncode == 130
    assert output.splitlines()[-1] == 'interrupted'
    assert output.splitlines().count('interrupted') == 1
    assert 'Traceback' not in output
    with (log.parent / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the training has ended
