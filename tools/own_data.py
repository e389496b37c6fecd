"""Train models on your own data, compare them, and predict with the best one.

The annotations determine the task: COCO files (.json) and lists of Pascal VOC (.txt) are for
detection, with --masks for instance segmentation; label maps are for semantic segmentation.
Writes DIR/config.py, checks all files (tools/check_dataset.py), trains the config with each
backbone (tools/benchmark.py sweep), and saves the predictions of the best model on the validation
images (tools/infer.py) in DIR/best. Run again, it continues where it stopped.
"""

import argparse
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from mmengine.config import Config
from PIL import Image
from rich.console import Console

from mmdense import cli
from mmdense.config.edit import set_length
from mmdense.config.read import load_config
from mmdense.errors import UserError, first_of, not_negative, one_line, positive
from mmdense.patches import find_config
from mmdense.runtime.images import IMAGE_SUFFIXES
from mmdense.visualization.draw import make_palette

ROOT = Path(__file__).parents[1]
BASES = dict(
    detection='detection/densenet/faster-rcnn_densenet-121_fpn_1x_coco.py',
    instance='detection/densenet/mask-rcnn_densenet-121_fpn_1x_coco.py',
    semantic='segmentation/densenet/upernet_densenet-121_160k_ade20k-512x512.py',
)
FOLDERS = dict(
    coco=('train', 'val'), voc=('JPEGImages', 'JPEGImages'), maps=('img/train', 'img/val')
)
MIN_STEPS, MAX_EPOCHS = 1000, 100  # small data are repeated until a detector has learned something
SEGMENTOR_STEPS, SEGMENTOR_EPOCHS = (2000, 20_000), 50
VALIDATIONS = 12  # during a training
SAMPLED_MAPS = 50


@dataclass
class Data:
    """The data as the config names them."""

    task: str  # a key of BASES
    classes: tuple[str, ...]
    images: int  # for training
    train: dict[str, Any]
    val: dict[str, Any]
    val_images: list[Path]
    notes: list[str] = field(default_factory=list)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **cli.example(
            'tools/own_data.py --data pets --annotations train.json val.json \\\n'
            '      --images images images\n'
            '  python tools/own_data.py --data roads --annotations labels/train labels/val \\\n'
            '      --images images/train images/val --classes background road'
        ),
    )
    pair = dict(nargs=2, metavar=('TRAIN', 'VAL'))
    parser.add_argument('--data', type=Path, required=True, metavar='DIR', help='data folder')
    parser.add_argument(
        '--annotations',
        **pair,
        default=('annotations/instances_train.json', 'annotations/instances_val.json'),
        help='in the data folder: COCO files, lists of Pascal VOC, or folders of label maps',
    )
    parser.add_argument(
        '--images', **pair, help='image folders in the data folder (train val; VOC: JPEGImages)'
    )
    parser.add_argument(
        '--classes', nargs='+', metavar='NAME', help='classes (label maps: in the order of values)'
    )
    parser.add_argument(
        '--values',
        nargs='+',
        type=not_negative,
        metavar='N',
        help='pixel value of each class in the label maps (0, 1, 2, ...; 255 is ignored)',
    )
    parser.add_argument('--masks', action='store_true', help='instance segmentation: Mask R-CNN')
    parser.add_argument(
        '--epochs', type=positive, metavar='N', help='length of training (by the number of images)'
    )
    parser.add_argument(
        '--no-flip', action='store_true', help='where mirrored objects differ, such as text'
    )
    parser.add_argument('--base', help='config of the model (DenseNet-121 on COCO or ADE20K)')
    parser.add_argument(
        '--backbones',
        nargs='+',
        default=['densenet-121', 'timm:resnet50'],
        metavar='NAME',
        help='backbones as in tools/benchmark.py sweep (%(default)s)',
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/own_data'),
        metavar='DIR',
        help='output folder (%(default)s)',
    )
    parser.add_argument(
        'sweep', nargs='*', metavar='OPTION', help='after --: options of tools/benchmark.py sweep'
    )
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    data = read_data(args)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    config = args.out / 'config.py'
    config.parent.mkdir(parents=True, exist_ok=True)
    base = find_config(str(args.base or ROOT / 'configs' / BASES[data.task])).resolve()
    config.write_text(make_config(data, base, args.epochs, flip=not args.no_flip))
    for note in data.notes:
        console.print(note)
    console.print(f'{data.images} training images, {len(data.classes)} classes; config: {config}')
    run_tool('check_dataset', config, '--loaders', 'train', 'val')
    sweep = ['sweep', '--config', config, '--out', args.out, '--backbones', *args.backbones]
    run_tool('benchmark', *sweep, *args.sweep)
    results = json.loads((args.out / 'results.json').read_text())
    metric = results['metrics'][0]
    best = max(results['rows'], key=lambda row: row['metrics'].get(metric, -1))
    checkpoint = (args.out / best['run'] / 'last_checkpoint').read_text().strip()
    run_tool(
        'infer', args.out / best['config'], checkpoint, *data.val_images, '--out', args.out / 'best'
    )
    console.print(f'best: {best["backbone"]}, {metric} {best["metrics"][metric]:.3f}')


def read_data(args: argparse.Namespace) -> Data:
    """Find out what the data are.

    Raises:
        UserError: Something is missing, or contradicts the options.
    """
    paths = [args.data / path for path in args.annotations]
    for path in paths:
        if not path.exists():
            raise UserError(f'no annotations {path}: pass --data and --annotations')
    maps = paths[0].is_dir()
    kind = 'maps' if maps else 'voc' if paths[0].suffix == '.txt' else 'coco'
    folders = args.images or FOLDERS[kind]
    for folder in folders:
        if not (args.data / folder).is_dir():
            raise UserError(f'no image folder {args.data / folder}: pass --images')
    if maps and args.masks:
        raise UserError('--masks is for COCO files: label maps have no instances')
    if args.values and not maps:
        raise UserError('--values is for label maps')
    if maps:
        return read_label_maps(args, folders)
    files = [Path(path) for path in args.annotations]
    if kind == 'voc':
        if args.masks:
            raise UserError('--masks is for COCO files: Pascal VOC has boxes')
        files = [args.out.resolve() / f'{split}.json' for split in ('train', 'val')]
        convert_voc(args.data, paths, folders, files)
    return read_coco(args, files, folders)


def read_coco(args: argparse.Namespace, files: Sequence[Path], folders: Sequence[str]) -> Data:
    contents = []
    for file in (args.data / file for file in files):
        try:
            content = json.loads(file.read_text())
            keys = {*content} & {'images', 'annotations', 'categories'}
        except (ValueError, TypeError) as error:
            raise UserError(f'{file} is not a COCO file ({one_line(error)})') from error
        if len(keys) < 3:
            raise UserError(f'{file} is not a COCO file: it needs images, annotations, categories')
        contents.append(content)
    train, val = contents
    names = [category['name'] for category in train['categories']]
    used = Counter(annotation['category_id'] for annotation in train['annotations'])
    unused = [c['name'] for c in train['categories'] if not used[c['id']]]
    classes = tuple(args.classes or (name for name in names if name not in unused))
    if missing := [name for name in classes if name not in names]:
        raise UserError(
            f'no category {first_of(missing)} in {files[0]}: it has {first_of(names, 20)}'
        )
    if not classes:
        raise UserError(f'{args.data / files[0]} has no annotations')
    notes = [f'no annotations, left out: {first_of(unused)}'] if unused and not args.classes else []
    parts = [
        dict(data_root=f'{args.data}/', ann_file=str(file), data_prefix=dict(img=f'{folder}/'))
        for file, folder in zip(files, folders, strict=True)
    ]
    images = [args.data / folders[1] / image['file_name'] for image in val['images']]
    task = 'instance' if args.masks else 'detection'
    return Data(task, classes, len(train['images']), *parts, images, notes)


def convert_voc(
    data: Path, lists: Sequence[Path], folders: Sequence[str], files: Sequence[Path]
) -> None:
    """Write COCO files for lists of images in Pascal VOC. Difficult objects become crowds."""
    splits = []
    for names, folder in zip(lists, folders, strict=True):
        images = {file.stem: file for file in find_images(data / folder)}
        rows = []
        for name in (line.split()[0] for line in names.read_text().splitlines() if line.strip()):
            xml = data / 'Annotations' / f'{name}.xml'
            if name not in images or not xml.is_file():
                raise UserError(f'{names}: no image {name} in {folder}, or no {xml}')
            try:
                rows.append((images[name], ElementTree.parse(xml).getroot()))
            except ElementTree.ParseError as error:
                raise UserError(f'{xml} cannot be read ({error})') from error
        splits.append(rows)
    found = {o.findtext('name') for rows in splits for _, xml in rows for o in xml.iter('object')}
    ids = {name: i for i, name in enumerate(sorted(map(str, found)), start=1)}
    for file, rows, folder in zip(files, splits, folders, strict=True):
        coco = dict(images=[], annotations=[])
        for number, (image, xml) in enumerate(rows, start=1):
            width, height = Image.open(image).size
            name = image.relative_to(data / folder).as_posix()
            coco['images'].append(dict(id=number, file_name=name, width=width, height=height))
            for item in xml.iter('object'):
                corners = [
                    float(item.findtext(f'bndbox/{k}')) for k in ('xmin', 'ymin', 'xmax', 'ymax')
                ]
                x, y = corners[0] - 1, corners[1] - 1  # pixels count from 1, both ends included
                box = [x, y, corners[2] - x, corners[3] - y]
                annotation = dict(id=len(coco['annotations']) + 1, image_id=number, bbox=box)
                annotation.update(category_id=ids[item.findtext('name')], area=box[2] * box[3])
                annotation.update(iscrowd=int(item.findtext('difficult') or 0))
                coco['annotations'].append(annotation)
        coco['categories'] = [dict(id=i, name=name) for name, i in ids.items()]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(coco))


def read_label_maps(args: argparse.Namespace, folders: Sequence[str]) -> Data:
    if [*args.annotations] == [*folders]:
        raise UserError(
            'images and annotations are the same: see docs/classification.md for classes'
        )
    for labels in args.annotations:
        if not any(find_images(args.data / labels)):
            raise UserError(
                f"{args.data / labels} has no label maps (PNG): convert YOLO's and other boxes to "
                "COCO's format"
            )
    if not args.classes:
        raise UserError('label maps have no class names: pass --classes')
    parts, images, numbers = [], [], set()
    for folder, labels in zip(folders, args.annotations, strict=True):
        files = sorted(find_images(args.data / folder))
        suffixes = Counter(file.suffix for file in files)
        if len(suffixes) != 1:
            have = ', '.join(f'{count} {suffix}' for suffix, count in suffixes.items())
            raise UserError(
                f'{args.data / folder} has {have or "no"} images: mmseg reads one suffix'
            )
        (suffix,) = suffixes
        map_suffix, maps = find_maps(files, args.data / folder, args.data / labels)
        step = math.ceil(len(maps) / SAMPLED_MAPS)
        for file in maps[::step]:
            numbers |= {*np.unique(np.asarray(Image.open(file))).tolist()}
        prefix = dict(img_path=f'{folder}/', seg_map_path=f'{labels}/')
        parts.append(dict(data_prefix=prefix, img_suffix=suffix, seg_map_suffix=map_suffix))
        images.append(files)
    count, notes = len(args.classes), []
    values = args.values
    if values is None and count == 2 and numbers == {0, 255}:
        values = [0, 255]
        notes = [f'binary masks: 0 is {args.classes[0]}, 255 is {args.classes[1]}']
    if values is None and numbers - {*range(count), 255}:
        raise UserError(
            f'the label maps have the values {first_of(sorted(numbers), 20)}, but {count} classes: '
            f'pass --classes for 0 to {max(numbers - {255})}, or --values, one per class'
        )
    if values and len({*values}) != count:
        raise UserError(f'{len({*values})} --values for {count} --classes')
    kind = (
        dict(type='mmdense.LabelMapDataset', values=values)
        if values
        else dict(type='BaseSegDataset')
    )
    parts = [dict(kind, data_root=f'{args.data}/', **part) for part in parts]
    return Data('semantic', tuple(args.classes), len(images[0]), *parts, images[1], notes)


def find_images(folder: Path) -> Iterator[Path]:
    files = (file for file in folder.rglob('*') if file.suffix.lower() in IMAGE_SUFFIXES)
    return (file for file in files if not file.name.startswith('.'))


def find_maps(images: Sequence[Path], folder: Path, labels: Path) -> tuple[str, list[Path]]:
    """Return the suffix of the label maps, such as '_mask.png', and the map of each image.

    Raises:
        UserError: An image has none.
    """
    stems = [file.relative_to(folder).with_suffix('').as_posix() for file in images]
    names = sorted(file.relative_to(labels).as_posix() for file in find_images(labels))
    suffixes = [
        name.removeprefix(stem) for stem in stems[:20] for name in names if name.startswith(stem)
    ]
    known = {*names}
    suffix = max(
        ['.png', *suffixes], key=lambda suffix: sum(stem + suffix in known for stem in stems)
    )
    missing = [stem + suffix for stem in stems if stem + suffix not in known]
    if missing:
        raise UserError(
            f'{len(missing)} of {len(stems)} images in {folder} have no label map in {labels}: '
            f'{first_of(missing)}'
        )
    return suffix, [labels / (stem + suffix) for stem in stems]


def make_config(data: Data, base: Path, epochs: int | None, *, flip: bool) -> str:
    """Return the text of a config: the base with these data, and a schedule for their number."""
    cfg = load_config(str(base))
    steps = math.ceil(data.images / cfg.train_dataloader.batch_size)
    if 'max_epochs' in cfg.train_cfg:
        shortest = max(cfg.train_cfg.max_epochs, math.ceil(MIN_STEPS / steps))
        unit, length = 'max_epochs', epochs or min(shortest, MAX_EPOCHS)
        set_length(cfg, epochs=length)
        warm_up = max(2, steps * length // 10)
        for scheduler in cfg.param_scheduler:
            if not scheduler.get('by_epoch', True):
                scheduler.end = min(scheduler.end, warm_up)
    else:
        shortest, longest = SEGMENTOR_STEPS
        default = min(max(SEGMENTOR_EPOCHS * steps, shortest), longest)
        unit, length = 'max_iters', steps * epochs if epochs else default
        set_length(cfg, iters=length)
    meta = dict(classes=data.classes)
    if data.task == 'semantic':
        colours = make_palette(len(data.classes))
        names = [name.strip('_').lower() for name in data.classes]
        meta['palette'] = [
            (0, 0, 0) if name == 'background' else colour
            for name, colour in zip(names, colours, strict=True)
        ]
    train, val = (dict(part, metainfo=meta) for part in (data.train, data.val))
    if not flip:
        pipeline = cfg.train_dataloader.dataset.pipeline
        train['pipeline'] = [step for step in pipeline if step.type != 'RandomFlip']
    settings = dict(
        train_dataloader=dict(dataset=train),
        val_dataloader=dict(dataset=val),
        test_dataloader=dict(dataset=val),
        model=set_classes(cfg.model, len(data.classes)),
        train_cfg={unit: length, 'val_interval': max(1, length // VALIDATIONS)},
        param_scheduler=cfg.param_scheduler,
    )
    if data.task != 'semantic':
        evaluator = dict(ann_file=str(Path(val['data_root'], val['ann_file'])))
        settings.update(val_evaluator=evaluator, test_evaluator=evaluator)
    if 'base_batch_size' in (cfg.get('auto_scale_lr') or {}):
        settings['auto_scale_lr'] = dict(enable=True)  # from the base batch size to the actual one
    return f"_base_ = '{base}'\n\n{Config(settings).pretty_text}"


def set_classes(node: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the settings that change ``num_classes`` everywhere in a model's config."""
    changed: dict[str, Any] = {'num_classes': count} if 'num_classes' in node else {}
    for key, child in node.items():
        if isinstance(child, list) and any('num_classes' in str(item) for item in child):
            # Such as the stages of a cascade: a list is replaced, not merged.
            changed[key] = [dict(item, **set_classes(item, count)) for item in child]
        elif isinstance(child, dict) and (inner := set_classes(child, count)):
            changed[key] = inner
    return changed


def run_tool(name: str, *arguments: str | Path) -> None:
    """Run tools/NAME.py; exit with its status if it fails. It does not outlive this process."""
    command = [sys.executable, ROOT / f'tools/{name}.py', *arguments]
    with subprocess.Popen([str(part) for part in command]) as process:
        try:
            process.wait()
        except BaseException as error:  # Ctrl-C and SIGTERM
            process.terminate()
            if process.wait() != cli.INTERRUPTED or not isinstance(error, KeyboardInterrupt):
                raise  # else Ctrl-C has reached the tool too, which says so
    if process.returncode:
        sys.exit(process.returncode)


if __name__ == '__main__':
    main()
