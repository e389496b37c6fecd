"""Configs with a mistake: one line that names it, before any data are read."""

import json
import sys

import pytest
import torch
from mmengine.dataset import BaseDataset
from mmengine.registry import MODELS

from mmdense.config import read, validate
from mmdense.config.channels import build_part
from mmdense.config.explain import explain
from mmdense.engine import resume
from mmdense.engine import runner as run
from mmdense.errors import UserError
from support import DEMOS, ROOT

DETECTOR, SEGMENTOR = DEMOS['detection'], DEMOS['segmentation']
CASCADE = ROOT / 'configs/detection/rdnet/cascade-mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco.py'
RETINANET = ROOT / 'configs/detection/rdnet/retinanet_rdnet-t_fpn_1x_coco.py'


@pytest.fixture(autouse=True)
def _no_data_are_read(monkeypatch):
    """Annotations that were read would come too early, and from files that aren't there."""

    def fail(self):
        raise AssertionError('a data set was read')

    monkeypatch.setattr(BaseDataset, 'full_init', fail)
    monkeypatch.setattr(run, 'check_data', lambda *_: None)


def mistake(tmp_path, file=DETECTOR, loaders=('train', 'val'), **options):
    """Return what is said of a config, which is one line."""

    def begin():
        cfg = read.load_config(str(file), options=options, work_dir=str(tmp_path))
        cfg.log_level = 'ERROR'
        run.build_runner(cfg, loaders=loaders)

    with pytest.raises(UserError) as error:
        begin()
    said = str(error.value)
    assert '\n' not in said
    return said


def leaf(tmp_path, text, base=DETECTOR, name='leaf.py'):
    """Write a config that inherits another."""
    file = tmp_path / name
    file.write_text(f'_base_ = {str(base)!r}\n{text}\n')
    return file


MISSPELT = {
    'model.backbone.frozen_stage': ('mmdense.RDNet', 'frozen_stages'),
    'model.neck.num_out': ('FPN', 'num_outs'),
    'model.rpn_head.feat_channel': ('RPNHead', 'feat_channels'),  # through three constructors
    'model.rpn_head.anchor_generator.scale': ('AnchorGenerator', 'scales'),
    'model.bakbone': ('FasterRCNN', 'backbone'),
    'train_dataloader.dataset.filter_config': ('CocoDataset', 'filter_cfg'),
    'train_dataloader.dataset.pipeline.0.color_typ': ('LoadImageFromFile', 'color_type'),
    'log_processor.windw_size': ('LogProcessor', 'window_size'),
    'default_hooks.checkpoint.intervall': ('mmdense.CheckpointHook', 'interval'),  # any is taken
    'val_evaluator.metrics': ('CocoMetric', 'metric'),
}


@pytest.mark.parametrize('key', MISSPELT)
def test_misspelt_keys(key, tmp_path):
    part, name = MISSPELT[key]
    said = mistake(tmp_path, **{key: 1})
    wrong = key.rpartition('.')[2]
    assert said.startswith(f'{part} has no argument {wrong!r}; did you mean {name!r}? (known: [')


@pytest.mark.parametrize(
    ('section', 'value', 'part', 'name'),
    [
        ('optim_wrapper', dict(optimizer=dict(type='AdamW', lr=1.0, weight_decy=0)), 'AdamW', 0),
        ('optim_wrapper', dict(type='OptimWrapper', clip_gradd=1), 'OptimWrapper', 'clip_grad'),
        ('param_scheduler', dict(type='LinearLR', start_facto=0.1), 'LinearLR', 'start_factor'),
        ('train_cfg', dict(by_epoch=True, max_epoch=3), 'EpochBasedTrainLoop', 'max_epochs'),
    ],
    ids=['optimizer', 'optimizer wrapper', 'scheduler', 'loop'],
)
def test_misspelt_keys_of_what_training_builds(section, value, part, name, tmp_path, project):
    """These are built when a run starts: the tools end with the same line then."""
    options = dict(data_root=str(project / 'data/digits'))
    cfg = read.load_config(str(DETECTOR), options=options, work_dir=str(tmp_path))
    cfg.log_level = 'ERROR'
    runner = run.build_runner(cfg, loaders=('train',))
    runner.optim_wrapper = runner.build_optim_wrapper(dict(optimizer=dict(type='SGD', lr=1)))
    build = dict(
        optim_wrapper=runner.build_optim_wrapper,
        param_scheduler=runner.build_param_scheduler,
        train_cfg=runner.build_train_loop,
    )[section]
    if section == 'optim_wrapper':
        value.setdefault('optimizer', dict(type='SGD', lr=1))
    with pytest.raises(TypeError) as error:
        build(value)
    said = str(explain(error.value))
    assert said.startswith(f'{part} has no argument ')
    assert f'did you mean {name or "weight_decay"!r}?' in said


@pytest.mark.parametrize(
    ('key', 'value', 'close'),
    [
        ('model.type', 'FasterRCNNN', 'FasterRCNN'),
        ('model.neck.type', 'FPNN', 'FPN'),
        ('model.backbone.type', 'RDNet', 'mmdense.RDNet'),
        ('model.backbone.type', 'mmdense.RDNett', 'mmdense.RDNet'),
        ('model.rpn_head.bbox_coder.type', 'DeltaXYWHBoxCoder', 'DeltaXYWHBBoxCoder'),
        ('train_dataloader.dataset.type', 'CocoDatasett', 'CocoDataset'),
        ('train_dataloader.dataset.pipeline.0.type', 'LoadImageFromFil', 'LoadImageFromFile'),
        ('default_hooks.logger.type', 'LogerHook', 'LoggerHook'),
        ('model.neck.norm_cfg.type', 'SyncBNN', 'SyncBN'),
    ],
)
def test_types_that_are_not_registered(key, value, close, tmp_path):
    assert f'did you mean {close}?' in mistake(tmp_path, **{key: value}).replace("'", '')
    # A config file may name what is not registered, by its path: there it is said on building.
    cfg = read.load_config(str(DETECTOR), work_dir=str(tmp_path))
    cfg.log_level = 'ERROR'
    cfg.merge_from_dict({key: value})
    with pytest.raises(UserError, match=f"^nothing is registered as '{value}'; did you mean '"):
        run.build_runner(cfg, loaders=('train',))


def test_parts_without_a_type(tmp_path):
    file = leaf(tmp_path, 'default_hooks = dict(chekpoint=dict(interval=5))')
    assert 'a part of the config has no type: {' in mistake(tmp_path, file)


def test_missing_and_impossible_arguments(tmp_path):
    neck = 'model = dict(neck=dict(_delete_=True, type="FPN", in_channels=[64, 96, 144]))'
    said = mistake(tmp_path, leaf(tmp_path, neck))
    assert said == "FPN lacks 'out_channels' and 'num_outs'"
    said = mistake(tmp_path, **{'model.backbone.arch': 'smal'})
    assert "unknown arch 'smal'; did you mean 'small'? (known: ['tiny', 'small', " in said
    said = mistake(tmp_path, **{'model.neck.in_channels': 64})
    assert said.startswith('cannot build FPN: assert isinstance(in_channels, ')
    assert 'expects [64, 96] channels' in mistake(tmp_path, **{'model.neck.in_channels': [64, 96]})


# Numbers of classes


def test_classes_of_detectors(tmp_path):
    said = mistake(tmp_path, **{'model.roi_head.bbox_head.num_classes': 80})
    assert said.startswith(
        'model.roi_head.bbox_head.num_classes is 80, but train_dataloader.dataset has 10 such '
    )
    said = mistake(tmp_path, loaders=('test',), **{'model.roi_head.bbox_head.num_classes': 80})
    assert 'test_dataloader.dataset has 10' in said


def test_classes_of_each_cascade_head_of_masks_and_of_one_stage(tmp_path):
    for file, head in (
        (CASCADE, 'roi_head.bbox_head.2'),
        (CASCADE, 'roi_head.mask_head'),
        (RETINANET, 'bbox_head'),
    ):
        said = mistake(tmp_path, file, **{f'model.{head}.num_classes': 10})
        assert said.startswith(f'model.{head}'.removesuffix('.mask_head'))
        assert 'num_classes is 10, but train_dataloader.dataset has 80 such classes' in said


@pytest.mark.parametrize('head', ['decode_head', 'auxiliary_head'])
def test_classes_of_segmentors(head, tmp_path):
    said = mistake(tmp_path, SEGMENTOR, **{f'model.{head}.num_classes': 150})
    assert f'model.{head}.num_classes is 150, but train_dataloader.dataset has 2' in said


def test_classes_of_wrapped_data(tmp_path):
    cfg = read.load_config(str(DETECTOR), work_dir=str(tmp_path))
    cfg.log_level = 'ERROR'
    data = cfg.train_dataloader.dataset
    other = {**data.copy(), 'metainfo': dict(classes=('cat', 'dog'))}
    joined = dict(type='ConcatDataset', datasets=[data, other])
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=joined)
    with pytest.raises(UserError, match=r'dataset.dataset.datasets\[1\] has 2 such classes'):
        run.build_runner(cfg, loaders=('train',))


def test_classes_in_a_text(tmp_path):
    said = mistake(tmp_path, **{'train_dataloader.dataset.metainfo.classes': 'cat'})
    assert "write ('cat',)" in said


class Head(torch.nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ('attributes', 'meta', 'fits'),
    [
        (dict(num_things_classes=8, num_stuff_classes=5, num_classes=6), 'panoptic', True),
        (dict(num_things_classes=8, num_stuff_classes=4, num_classes=5), 'panoptic', False),
        (dict(num_things_classes=7, num_stuff_classes=5, num_classes=6), 'panoptic', False),
        (dict(num_classes=8), 'panoptic', True),
        (dict(num_classes=13), 'panoptic', False),
        (dict(num_things_classes=6, num_stuff_classes=7, num_classes=13), 'plain', True),
        (dict(num_things_classes=6, num_stuff_classes=6, num_classes=12), 'plain', False),
        (dict(num_classes=1, out_channels=1), 'plain', True),  # depth
    ],
)
def test_classes_of_panoptic_and_depth_heads(attributes, meta, fits):
    model = torch.nn.Module()
    model.semantic_head = Head(**attributes)
    model.rpn_head = Head(num_classes=1)
    classes = tuple(map(str, range(13)))
    meta = dict(
        panoptic=dict(classes=classes, thing_classes=classes[:8], stuff_classes=classes[8:]),
        plain=dict(classes=classes),
    )[meta]
    if fits:
        validate._compare_classes(model, meta, 'data')
    else:
        with pytest.raises(UserError, match='semantic_head.num_'):
            validate._compare_classes(model, meta, 'data')


# Sections, options, files


@pytest.mark.parametrize(
    ('wrong', 'right'),
    [
        ('optim_wraper', 'optim_wrapper'),
        ('train_dataloder', 'train_dataloader'),
        ('default_hook', 'default_hooks'),
    ],
)
def test_misspelt_sections(wrong, right, tmp_path):
    said = mistake(tmp_path, leaf(tmp_path, f'{wrong} = dict(x=1)'))
    assert f"nothing reads '{wrong}'; did you mean '{right}'?" in said
    said = mistake(tmp_path, **{f'{wrong}.x': 1})
    assert f"nothing reads '{wrong}'; did you mean '{right}'? (known: [" in said


def test_variables_of_every_recipe_are_let_through():
    files = [p for p in sorted((ROOT / 'configs').glob('*/*/*.py')) if p.parent.name != '_base_']
    assert files
    for file in files[::7]:
        read.load_config(str(file))


def test_options_that_nothing_reads(tmp_path):
    said = mistake(tmp_path, **{'modle.backbone.arch': 'tiny'})
    assert "nothing reads 'modle'; did you mean 'model'?" in said
    said = mistake(tmp_path, **{'default_hooks.checkpont.interval': 1})
    assert "there is no 'checkpont' yet; did you mean 'checkpoint'?" in said
    said = mistake(tmp_path, **{'model.test_cfg.rcnn.score_th': 0.5})
    assert "there is no 'score_th' yet; did you mean 'score_thr'?" in said
    file = leaf(tmp_path, 'size = 3')
    assert "'size' is a variable of " in mistake(tmp_path, file, size=4)
    assert 'exceeds the length' in mistake(tmp_path, **{'custom_hooks.7.type': 'EMAHook'})
    assert 'cannot inherit' in mistake(tmp_path, **{'train_dataloader.batch_size.x': 5})
    assert 'model must be a dict' in mistake(tmp_path, model=5)


BROKEN = {
    'syntax.py': ('a = 1\nb = (\n', r'syntax.py, line \d: '),
    'name.py': ('a = 1\nb = undefined\n', "name.py, line 2: NameError: name 'undefined'"),
    'raises.py': ('model = dict()\nx = [model[k] for k in "a"]', 'raises.py, line 2: KeyError'),
    'binary.py': (b'PK\x03\x04\xff\xfe', 'binary.py is no config (UnicodeDecodeError'),
    'data.json': ('{"model": ', 'data.json is no config (JSONDecodeError: '),
    'data.yaml': ('model: [', 'data.yaml is no config (ParserError: '),
    'config.txt': ('model = 1', 'config.txt: OSError: Only py/yml/yaml/json'),
    'loop.py': ("_base_ = './loop.py'", 'loop.py inherits itself'),
    'gone.py': ("_base_ = './nowhere.py'", 'gone.py inherits a config that does not exist'),
    'imports.py': (
        "model = dict()\ncustom_imports = dict(imports=['nowhere'])",
        'imports.py: custom_imports names what cannot be imported (ImportError: Failed to import n',
    ),
}


@pytest.mark.parametrize('name', BROKEN)
def test_files_that_are_no_configs(name, tmp_path):
    text, expected = BROKEN[name]
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = mistake(tmp_path, file)
    if '\\d' in expected:
        assert 'syntax.py, line ' in said
    else:
        assert expected in said
    if name.endswith('.py') and name not in ('loop.py', 'gone.py', 'imports.py'):
        assert expected.partition(' ')[0].rstrip(',') in mistake(
            tmp_path, leaf(tmp_path, '', base=file)
        )


def test_two_bases_with_the_same_section(tmp_path):
    for name in 'ab':
        (tmp_path / f'{name}.py').write_text('model = dict()')
    file = tmp_path / 'leaf.py'
    file.write_text("_base_ = ['./a.py', './b.py']")
    assert 'Duplicate key is not allowed among bases' in mistake(tmp_path, file)


def test_a_config_of_json(tmp_path):
    cfg = read.load_config(str(DETECTOR))
    file = tmp_path / 'whole.json'
    file.write_text(json.dumps(cfg.to_dict()))
    assert read.load_config(str(file)).model.neck == cfg.model.neck


def test_checkpoints_that_are_not_there(tmp_path):
    (tmp_path / 'epoch_8.pth').touch()
    cfg = read.load_config(str(DETECTOR))
    wrong, right = tmp_path / 'epoch_08.pth', tmp_path / 'epoch_8.pth'
    with pytest.raises(UserError, match=f'^no checkpoint {wrong}; did you mean {right}\\?'):
        resume.use_checkpoint(cfg, None, str(wrong))


# What is no mistake of a config keeps its traceback


class Faulty(torch.nn.Module):
    def __init__(self, wrong, **kwargs):
        super().__init__()
        wrong(**kwargs)


def calls_wrongly():
    torch.nn.Linear(2, 2, biass=True)


@pytest.mark.parametrize(
    ('wrong', 'kind'),
    [
        (calls_wrongly, TypeError),
        (lambda: int('x'), ValueError),
        (lambda: {}['x'], KeyError),
        (lambda: MODELS.get, None),
    ],
)
def test_a_fault_inside_a_model_is_none_of_the_config(wrong, kind):
    if kind is None:
        MODELS.build(dict(type=Faulty, wrong=wrong))
        return
    with pytest.raises(kind) as error:
        MODELS.build(dict(type=Faulty, wrong=wrong))
    assert explain(error.value) is None


def test_a_part_that_cannot_be_built():
    with pytest.raises(UserError, match="has no argument 'dept'; did you mean 'depth'"):
        build_part(dict(type='ResNet', dept=50), 'mmdet')


# The command lines


@pytest.mark.slow
def test_tools_end_with_one_line(run_tool, tmp_path):
    backbone = ['--cfg-options', 'model.backbone.frozen_stage=1']
    said_of_backbone = "error: mmdense.RDNet has no argument 'frozen_stage'; did you mean 'frozen_s"
    broken = tmp_path / 'broken.py'
    broken.write_text('model = (')
    loader = ['--cfg-options', 'train_dataloader.num_worker=0']
    for tool, arguments, expected in (
        (
            'train.py',
            [DETECTOR, *loader],
            'error: --cfg-options train_dataloader.num_worker: ',
        ),
        ('test.py', [DETECTOR, 'x.pth', *backbone], said_of_backbone),
        ('export_onnx.py', [broken, '--out', 'x.onnx'], f'error: {broken}, line 1: '),
    ):
        status, said = run_tool(sys.executable, ROOT / 'tools' / tool, *arguments)
        assert status == 2, said
        assert said.splitlines()[-1].startswith(expected), said
        assert 'Traceback' not in said
