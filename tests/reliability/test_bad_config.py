"""Mistakes in a config: one line that names them, before any data are read."""

import inspect

import pytest
import torch
from mmengine.dataset import BaseDataset
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import METRICS, MODELS, TRANSFORMS, DefaultScope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmdense.config import read, validate
from mmdense.config.channels import build_part
from mmdense.config.parts import build_error, check_parts
from mmdense.engine import runner as engine
from mmdense.errors import UserError
from support import DEMOS, ROOT

DETECTOR, SEGMENTOR = DEMOS['detection'], DEMOS['segmentation']
CASCADE = ROOT / 'configs/detection/rdnet/cascade-mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco.py'
RETINANET = ROOT / 'configs/detection/rdnet/retinanet_rdnet-t_fpn_1x_coco.py'


def message_of(file=DETECTOR, **options):
    """Return the one line that a config or its parts are refused with."""
    with pytest.raises(UserError) as error:
        check_parts(read.load_config(str(file), options=options))
    assert '\n' not in str(error.value)
    return str(error.value)


def check_model(file, loaders=('train',), **options):
    """Check the model of a config, as a runner does after building it."""
    cfg = read.load_config(str(file), options=options)
    validate.check_prefixes(cfg, loaders)
    model = build_part(cfg.model, cfg.default_scope)
    validate.check_channels(model, cfg.model)
    validate.check_neck(model)
    validate.check_classes(model, cfg, loaders)


@pytest.fixture(autouse=True)
def _no_data_set_is_read(monkeypatch):
    """Every mistake must be reported before: the files do not exist."""

    def fail(self):
        raise AssertionError('a data set was read')

    monkeypatch.setattr(BaseDataset, 'full_init', fail)


def leaf(tmp_path, text, base=DETECTOR):
    """Write a config that inherits another."""
    file = tmp_path / 'leaf.py'
    file.write_text(f'_base_ = {str(base)!r}\n{text}\n')
    return file


# Types and arguments

MISSPELT_KEYS = {
    'model.backbone.frozen_stage': ('RDNet', 'frozen_stages'),
    'model.neck.num_out': ('FPN', 'num_outs'),
    'model.rpn_head.feat_channel': ('RPNHead', 'feat_channels'),  # passed on by two constructors
    'model.rpn_head.anchor_generator.scale': ('AnchorGenerator', 'scales'),
    'model.bakbone': ('FasterRCNN', 'backbone'),
    'train_dataloader.dataset.filter_config': ('CocoDataset', 'filter_cfg'),
    'train_dataloader.dataset.pipeline.0.color_typ': ('LoadImageFromFile', 'color_type'),
    'log_processor.windw_size': ('LogProcessor', 'window_size'),
    'default_hooks.checkpoint.intervall': ('CheckpointHook', 'interval'),  # **kwargs takes any
    'val_evaluator.metrics': ('CocoMetric', 'metric'),
    'optim_wrapper.optimizer.weight_decy': ('AdamW', 'weight_decay'),
    'optim_wrapper.clip_gradd': ('OptimWrapper', 'clip_grad'),
    'param_scheduler.0.start_facto': ('LinearLR', 'start_factor'),
    'train_cfg.max_epoch': ('EpochBasedTrainLoop', 'max_epochs'),
}


@pytest.mark.parametrize('key', MISSPELT_KEYS)
def test_misspelt_arguments(key):
    part, name = MISSPELT_KEYS[key]
    place, _, wrong = key.rpartition('.')
    assert message_of(**{key: 1}).startswith(
        f'{place}: {part} has no argument {wrong!r}; did you mean {name!r}? (known: ['
    )


@pytest.mark.parametrize(
    ('key', 'value', 'close'),
    [
        ('model.type', 'FasterRCNNN', 'FasterRCNN'),
        ('model.neck.type', 'FPNN', 'FPN'),
        ('model.backbone.type', 'RDNet', 'mmdense.RDNet'),
        ('model.backbone.type', 'mmdense.RDNett', 'mmdense.RDNet'),
        ('model.rpn_head.bbox_coder.type', 'DeltaXYWHBoxCoder', 'DeltaXYWHBBoxCoder'),
        ('model.neck.norm_cfg.type', 'SyncBNN', 'SyncBN'),
        ('train_dataloader.dataset.type', 'CocoDatasett', 'CocoDataset'),
        ('train_dataloader.dataset.pipeline.0.type', 'LoadImageFromFil', 'LoadImageFromFile'),
        ('default_hooks.logger.type', 'LogerHook', 'LoggerHook'),
        ('train_cfg.type', 'EpochBasedTrainLop', 'EpochBasedTrainLoop'),
    ],
)
def test_misspelt_types(key, value, close):
    assert message_of(**{key: value}) == (
        f'{key}: nothing is registered as {value!r}; did you mean {close!r}?'
    )


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('default_hooks = dict(chekpoint=dict(x=5))', 'default_hooks.chekpoint has no type, but'),
        ('model = dict(neck=dict(_delete_=True, x=1))', "model.neck has no type, but only ['x']"),
        ('train_dataloader = dict(num_worker=0)', "DataLoader has no argument 'num_worker'; did"),
    ],
)
def test_parts_without_a_type(text, message, tmp_path):
    assert message in message_of(leaf(tmp_path, text))


def test_unusual_configs_pass(tmp_path):
    text = """
custom_hooks = [dict(type='mmdense.NaNGuardHook', priority='LOW')]
model = dict(
    neck=dict(norm_cfg=dict(type='BN', requires_grad=False)),
    test_cfg=dict(rcnn=dict(nms=dict(type='nms'))),
)
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0), optimizer=dict(type='Lion', lrr=1))
default_hooks = dict(visualization=None)
"""
    check_parts(read.load_config(str(leaf(tmp_path, text))))


def test_a_part_that_cannot_be_built():
    with pytest.raises(UserError, match="has no argument 'dept'; did you mean 'depth'"):
        build_part(dict(type='ResNet', dept=50), 'mmdet')
    with pytest.raises(UserError, match=r'^cannot build ResNet: KeyError: .invalid depth 51'):
        build_part(dict(type='ResNet', depth=51), 'mmdet')


# Errors of constructors


def build_error_of(part, registry=MODELS):
    with pytest.raises((AssertionError, KeyError, RuntimeError, TypeError, ValueError)) as error:
        registry.build(part)
    return build_error(error.value)


def test_a_missing_package_comes_with_the_command(monkeypatch):
    message = build_error_of(dict(type='mmdet.LVISMetric'), METRICS)
    assert 'Please run "pip install git+https://github.com/lvis-dataset' in message
    assert 'pip install lvis' not in message
    monkeypatch.setattr('mmdet.datasets.transforms.transforms.Compose', None)
    message = build_error_of(dict(type='mmdet.Albu', transforms=[]), TRANSFORMS)
    assert message.startswith('cannot build from the config: RuntimeError: albumentations is not ')
    assert message.endswith(': pip install albumentations')


@pytest.mark.parametrize(
    ('part', 'message'),
    [
        (dict(), "TypeError: FPN.__init__() missing 3 required positional arguments: 'in_channel"),
        (dict(colour='red'), "FPN.__init__() got an unexpected keyword argument 'colour'"),
        (dict(in_channels=64, out_channels=8, num_outs=3), ': assert isinstance(in_channels, '),
        (dict(type='mmdet.Pyramid'), "KeyError: 'mmdet.Pyramid is not in the "),
        (dict(type='mmdense.RDNet', arch='smal'), "ValueError: unknown arch 'smal'; did you mean"),
    ],
)
def test_errors_of_constructors_are_one_line(part, message):
    error = build_error_of(dict(dict(type='mmdet.FPN'), **part))
    assert error.startswith('cannot build from the config: ')
    assert message in error
    assert '\n' not in error


def test_a_runner_makes_all_checks(tmp_path, monkeypatch):
    checks = []
    names = ['data_files', 'metric_files', 'parts', 'loops', 'data', 'channels', 'neck', 'classes']
    for name in names:
        room = engine if hasattr(engine, f'check_{name}') else engine.validate
        monkeypatch.setattr(room, f'check_{name}', lambda *_, name=name: checks.append(name))
    cfg = read.load_config(str(DETECTOR), work_dir=str(tmp_path))
    engine.build_runner(cfg, loaders=('test',))
    assert checks == names


class Faulty(torch.nn.Module):
    def __init__(self, wrong, **kwargs):
        super().__init__()
        wrong(**kwargs)


@pytest.mark.parametrize(
    'wrong',
    [lambda: torch.nn.Linear(2, 2, biass=True), lambda: int('x'), lambda: {}['x']],
)
def test_a_bug_inside_a_model_keeps_its_traceback(wrong):
    with pytest.raises((TypeError, ValueError, KeyError)) as error:
        MODELS.build(dict(type=Faulty, wrong=wrong))
    assert build_error(error.value) is None


@pytest.mark.parametrize(
    ('options', 'images', 'labels', 'advice'),
    [
        ({}, (1, 3), True, 'batch norm cannot train on a single value: set train_dataloader.batch'),
        ({}, (2, 4), True, "the backbone's, mean and std to the images' channels"),
        ({'backbone.in_channels': 4}, (2, 3), True, "set a part's in_channels to what it reads"),
        (
            {'decode_head.loss_decode.class_weight': [1.0, 2.0, 3.0]},
            (2, 3),
            True,
            "a loss's class_weight needs one value for each output",
        ),
        ({}, (2, 3), False, 'the samples lack what the model learns: LoadAnnotations needs'),
        ({'decode_head.align_corners': 'x'}, (2, 3), True, ''),
    ],
)
def test_errors_of_libraries_in_a_run_are_one_line(options, images, labels, advice, tmp_path):
    options = {f'model.{key}': value for key, value in options.items()}
    cfg = read.load_config(str(SEGMENTOR), options=options)
    log = MMLogger.get_instance(tmp_path.name, log_file=str(tmp_path / 'run.log'))
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    number, channels = images
    truth = PixelData(data=torch.zeros(1, 64, 64, dtype=torch.long))
    sample = SegDataSample(gt_sem_seg=truth) if labels else SegDataSample()
    data = dict(inputs=[torch.zeros(channels, 64, 64)] * number, data_samples=[sample] * number)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises((AttributeError, RuntimeError, TypeError, ValueError)) as error:
        model.train_step(data, wrapper)
    message = build_error(error.value)
    assert message.startswith(f'the run stops: {error.type.__name__}: ')
    assert advice in message
    assert message.endswith(f'; the traceback is in {log.log_file}')
    assert 'Traceback' in (tmp_path / 'run.log').read_text()


def test_four_channels_are_normalized():
    node = dict(type='mmdet.DetDataPreprocessor', mean=[1.0, 2.0, 3.0, 4.0], std=[2.0] * 4)
    inputs = MODELS.build(node)(dict(inputs=[torch.full((4, 2, 2), 5)], data_samples=None))
    assert inputs['inputs'][0, :, 0, 0].tolist() == [2.0, 1.5, 1.0, 0.5]


# Channels and numbers of classes


@pytest.mark.parametrize(
    ('file', 'key', 'value', 'message'),
    [
        (DETECTOR, 'neck.in_channels', [64, 96], 'neck expects [64, 96] channels, but the backbo'),
        (SEGMENTOR, 'decode_head.in_channels', [1, 2, 3], 'decode_head expects [1, 2, 3] '),
        (SEGMENTOR, 'auxiliary_head.in_channels', 7, 'auxiliary_head expects 7 channels'),
        (SEGMENTOR, 'decode_head.in_index', [0, 1, 3], 'backbone returns 3 feature maps'),
        (DETECTOR, 'neck.out_channels', 32, 'model.rpn_head.in_channels is 48, but the neck gives'),
        (DETECTOR, 'rpn_head.in_channels', 32, 'model.rpn_head.in_channels is 32, but the neck'),
        (
            DETECTOR,
            'roi_head.bbox_roi_extractor.out_channels',
            32,
            '_roi_extractor.out_channels is',
        ),
        (DETECTOR, 'roi_head.bbox_head.num_classes', 80, '80, but train_dataloader.dataset has 10'),
        (SEGMENTOR, 'decode_head.num_classes', 150, 'decode_head.num_classes is 150, but'),
        (SEGMENTOR, 'auxiliary_head.num_classes', 150, 'auxiliary_head.num_classes is 150, but'),
        (CASCADE, 'roi_head.bbox_head.2.num_classes', 10, 'bbox_head.2.num_classes is 10, but'),
        (CASCADE, 'roi_head.mask_head.num_classes', 10, 'mask_head.0.num_classes is 10, but'),
        (RETINANET, 'bbox_head.num_classes', 10, '10, but train_dataloader.dataset has 80 cla'),
        (SEGMENTOR, 'decode_head.num_classes', 1, 'decode_head.num_classes is 1, but'),
    ],
)
def test_parts_that_do_not_fit(file, key, value, message):
    with pytest.raises(UserError) as error:
        check_model(file, **{f'model.{key}': value})
    assert message in str(error.value)


IGNORED = 'train_dataloader.dataset.ignore_index'
PREFIX = 'train_dataloader.dataset.data_prefix'


@pytest.mark.parametrize(
    ('file', 'options', 'message'),
    [
        (SEGMENTOR, {IGNORED: 250}, '255 in model.data_preprocessor.seg_pad_val, model.decode_hea'),
        (SEGMENTOR, {IGNORED: 250}, '; 250 in train_dataloader.dataset.ignore_index: set all to'),
        (
            SEGMENTOR,
            {'model.decode_head.ignore_index': 0},
            '; 0 in model.decode_head.ignore_index: set all',
        ),
        (
            SEGMENTOR,
            {'model.decode_head.loss_decode': dict(type='DiceLoss', ignore_index=3)},
            '3 in model.decode_head.loss_decode.ignore_index',
        ),
        (SEGMENTOR, {'val_evaluator.ignore_index': 1}, '1 in val_evaluator.ignore_index'),
        (
            SEGMENTOR,
            {'val_evaluator': dict(metrics=[dict(type='IoUMetric', ignore_index=1)])},
            '1 in val_evaluator.metrics.0.ignore_index',
        ),
        (DETECTOR, {'train_dataloader.dataset.metainfo.palette': [(0, 0, 0)]}, 'has 1 colours for'),
        (
            SEGMENTOR,
            {'train_dataloader.dataset.metainfo.palette': [(0, 0, 0)]},
            'or set palette=[]',
        ),
        (
            DETECTOR,
            {'val_evaluator.metric': ['bbox', 'segm']},
            "'segm', but FasterRCNN predicts no",
        ),
        (
            DETECTOR,
            {f'{PREFIX}.img_path': 'x'},
            'data_prefix: CocoDataset reads img and seg, not i',
        ),
        (SEGMENTOR, {f'{PREFIX}.img': 'x'}, 'reads img_path and seg_map_path, not img'),
        (SEGMENTOR, {f'{PREFIX}.ann': 'x'}, 'reads img_path and seg_map_path, not ann'),
    ],
)
def test_settings_that_must_agree(file, options, message):
    with pytest.raises(UserError) as error:
        check_model(file, loaders=('train', 'val'), **options)
    assert message in str(error.value)


def test_bases_without_a_source(monkeypatch):
    """Since Python 3.12 that is typing.Generic, a base of all data sets."""
    source = inspect.getsource

    def getsource(kind):
        if kind.__module__ == 'typing':
            raise OSError('could not find class definition')
        return source(kind)

    monkeypatch.setattr(inspect, 'getsource', getsource)
    validate.check_prefixes(read.load_config(str(DETECTOR)), ('train', 'val'))


def test_settings_that_agree():
    labels = {'decode_head.ignore_index', 'auxiliary_head.ignore_index'}
    options = {f'model.{key}': 250 for key in (*labels, 'data_preprocessor.seg_pad_val')}
    options |= {IGNORED: 250, 'val_dataloader.dataset.ignore_index': 250}
    check_model(
        SEGMENTOR, loaders=('train', 'val'), **options, **{'val_evaluator.ignore_index': 250}
    )
    del options['model.data_preprocessor.seg_pad_val']  # only training pads label maps
    options |= {'test_dataloader.dataset.ignore_index': 250, 'test_evaluator.ignore_index': 250}
    check_model(SEGMENTOR, loaders=('test',), **options)


def test_a_concatenating_head_states_each_channel():
    head = dict(type='FCNHead', in_index=[0, 1], input_transform='resize_concat')
    options = {f'model.auxiliary_head.{key}': value for key, value in head.items()}
    check_model(SEGMENTOR, **options, **{'model.auxiliary_head.in_channels': [64, 96]})
    with pytest.raises(UserError, match=r'expects .64, 97. channels, .*gives .64, 96.'):
        check_model(SEGMENTOR, **options, **{'model.auxiliary_head.in_channels': [64, 97]})


@pytest.mark.parametrize(
    'neck',
    [
        dict(type='DilatedEncoder', in_channels=144),
        dict(type='YOLOV3Neck', in_channels=[144, 96, 64]),
        [dict(type='FPN', in_channels=[64, 96, 144]), dict(type='BFP', in_channels=48)],
        None,
    ],
)
def test_other_necks_pass(neck):
    model = torch.nn.Module()
    model.backbone = torch.nn.Identity()
    model.backbone.out_channels = (64, 96, 144)
    validate.check_channels(model, dict(neck=neck))


def test_classes_of_wrapped_data():
    cfg = read.load_config(str(DETECTOR))
    dataset = cfg.train_dataloader.dataset
    other = {**dataset.copy(), 'metainfo': dict(classes=('cat', 'dog'))}
    joined = dict(type='ConcatDataset', datasets=[dataset, other])
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=joined)
    model = build_part(cfg.model, cfg.default_scope)
    with pytest.raises(UserError, match=r'dataset.dataset.datasets\[1\] has 2 classes'):
        validate.check_classes(model, cfg, ('train',))
    with pytest.raises(UserError, match=r"write \('cat',\)"):
        validate.compare_classes(model, dict(classes='cat'), 'data')


@pytest.mark.parametrize(
    ('attributes', 'metainfo'),
    [
        (dict(num_classes=2), dict(classes=('a', 'b'))),
        (dict(num_classes=3), dict(classes=('a', 'b'), thing_classes=('a',))),  # panoptic
        (dict(num_classes=3), dict()),
        (dict(num_classes=1, max_depth=10), dict(classes=('a', 'b'))),  # depth
        (dict(num_classes=2, out_channels=1), dict(classes=('a', 'b'))),
    ],
)
def test_classes_that_fit(attributes, metainfo):
    model = torch.nn.Module()
    model.decode_head, model.rpn_head = torch.nn.Module(), torch.nn.Module()
    vars(model.decode_head).update(attributes)
    model.rpn_head.num_classes = 1
    validate.compare_classes(model, metainfo, 'data')


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
    message = message_of(leaf(tmp_path, f'{wrong} = dict(x=1)'))
    assert f"nothing reads '{wrong}'; did you mean '{right}'?" in message
    message = message_of(**{f'{wrong}.x': 1})
    assert f"nothing reads '{wrong}'; did you mean '{right}'? (known: [" in message


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('modle.backbone.arch', 'tiny', "nothing reads 'modle'; did you mean 'model'?"),
        ('default_hooks.checkpont.interval', 1, "no 'checkpont' yet; did you mean 'checkpoint'?"),
        ('model.test_cfg.rcnn.score_th', 0.5, "no 'score_th' yet; did you mean 'score_thr'?"),
        ('train_dataloader.num_worker', 0, "no 'num_worker' yet; did you mean 'num_workers'?"),
        ('custom_imports.imports', 'os', 'must be named in a config file'),
        ('custom_hooks.7.type', 'EMAHook', 'exceeds the length'),
        ('train_dataloader.batch_size.x', 5, 'cannot inherit'),
        ('model', 5, 'model must be a dict'),
        ('size', 4, "'size' is a variable of "),
    ],
)
def test_options_without_effect(key, value, message, tmp_path):
    assert message in message_of(leaf(tmp_path, 'size = 3'), **{key: value})


BROKEN = {
    'syntax.py': (
        'a = 1\nb = (\n',
        "syntax.py: SyntaxError: '(' was never closed (<unknown>, line 2",
    ),
    'name.py': (
        'a = 1\nb = undefined\n',
        "NameError: name 'undefined' is not defined (NAME, line 2",
    ),
    'raises.py': ('model = dict()\nx = [model[k] for k in "a"]', "KeyError: 'a' (NAME, line 2)"),
    'binary.py': (b'PK\x03\x04\xff\xfe', 'binary.py: UnicodeDecodeError'),
    'data.json': ('{"model": ', 'JSONDecodeError: '),
    'config.txt': ('model = 1', 'config.txt: OSError: Only py/yml/yaml/json'),
    'loop.py': ("_base_ = './loop.py'", 'inherits itself'),
    'gone.py': ("_base_ = './nowhere.py'", "No such file or directory: '"),
    'inside.py': (
        "model = dict()\ncustom_imports = dict(imports=['sound.broken'])",
        "inside.py: ModuleNotFoundError: No module named 'nowhere' (PACKAGE, line 2)",
    ),
    'imports.py': (
        "model = dict()\ncustom_imports = dict(imports=['nowhere'])",
        "imports.py: ModuleNotFoundError: No module named 'nowhere': run from the folder that",
    ),
}


@pytest.mark.parametrize(
    'name',
    [*(n for n in BROKEN if n != 'loop.py'), pytest.param('loop.py', marks=pytest.mark.slow)],
)
def test_files_that_are_no_configs(name, tmp_path, monkeypatch):
    text, expected = BROKEN[name]
    file, package = tmp_path / name, tmp_path / 'sound/broken.py'
    package.parent.mkdir()
    package.write_text('import math\nimport nowhere\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    expected = expected.replace('NAME', str(file)).replace('PACKAGE', str(package))
    assert expected in message_of(file)
    if name not in ('imports.py', 'inside.py', 'config.txt', 'loop.py'):
        assert expected in message_of(leaf(tmp_path, '', base=file))
