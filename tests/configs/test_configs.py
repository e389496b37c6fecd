"""Every config builds, and its parts fit together. All of it runs on the meta device."""

import copy
from functools import cache
from importlib.util import find_spec

import pytest
import timm
import torch
import torchvision
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner.checkpoint import get_torchvision_models

import mmdense  # noqa: F401
from mmdense.config.channels import fill_channels
from mmdense.config.edit import drop_amp
from mmdense.config.validate import check_channels, check_neck
from mmdense.datasets.digits import CLASSES
from support import ROOT

SCOPES = dict(detection='mmdet', segmentation='mmseg', classification='mmpretrain')
needs_mmpretrain = pytest.mark.skipif(not find_spec('mmpretrain'), reason='needs mmpretrain')
# One classifier of each family and data set; their siblings differ in sizes.
FAST = (
    'condensenetv2-110_300e_cifar10',
    'condensenetv2-a',
    'densenet-121_cosine',
    'densenet-40-k12_300e_cifar100',
    'rdnet-nano',
    'rdnet-t',
    'rexnet-1.0',
)


def marks_of(path):
    if 'classification' not in path.parts:
        return []
    return [needs_mmpretrain, *([] if path.stem.startswith(FAST) else [pytest.mark.slow])]


CONFIGS = [
    pytest.param(path, id=path.stem, marks=marks_of(path))
    for path in sorted(ROOT.glob('configs/*/*/*.py'))
    if path.parent.name != '_base_'
]


@cache
def published_shapes(address):
    """Return the shapes of published weights, from the network in the library they belong to."""
    scheme, name = address.split('://')
    with torch.device('meta'):
        if scheme == 'timm':
            assert timm.is_model_pretrained(name)
            net = timm.create_model(name)
        else:
            assert name in get_torchvision_models()
            net = torchvision.models.get_model(name.split('.')[0])
    return {key: value.shape for key, value in net.state_dict().items()}


def check_weights(backbone, cfg):
    """Assert that the pretrained weights exist and fit the backbone."""
    if cfg.get('init_cfg') is None:
        return
    address = cfg.init_cfg.checkpoint
    if 'prefix' in cfg.init_cfg:  # of the demo's classifier, which users train
        return
    if address.startswith('condensenetv2://'):
        assert address.endswith(f'/condensenetv2-{cfg.arch}_converted.pth')
        assert cfg.form == 'condensed'
        return
    published = published_shapes(address)
    missing = [k for k, v in backbone.state_dict().items() if published.get(k) != v.shape]
    assert not [key for key in missing if not key.startswith('output_norms.')]


def check_classes(model, cfg):
    """Assert that every head has the classes of the data set."""
    data = cfg.train_dataloader.dataset
    data = data.get('dataset', data)
    with DATASETS.switch_scope_and_registry(None) as registry:
        classes = data.get('metainfo', registry.get(data.type).METAINFO)['classes']
    modules = model.named_modules()
    heads = {n: m for n, m in modules if isinstance(getattr(m, 'num_classes', None), int)}
    heads.pop('rpn_head', None)  # one class: object or background
    assert heads
    assert {n: m.num_classes for n, m in heads.items()} == dict.fromkeys(heads, len(classes))


def without_tuples(node):
    if isinstance(node, dict):
        return {key: without_tuples(value) for key, value in node.items()}
    return [*map(without_tuples, node)] if isinstance(node, list | tuple) else node


def check_auto(cfg):
    """Assert that ``in_channels='auto'`` gives the numbers of the config."""
    auto = copy.deepcopy(cfg)
    model = auto.model
    names = ['neck'] if 'neck' in model else ['decode_head', 'auxiliary_head']
    if model.type == 'ImageClassifier' and 'in_channels' not in model.neck:
        names = ['head']
    if 'neck' in model and model.neck.type == 'SSDNeck':
        names.append('bbox_head')
    for node in (model[name] for name in names if name in model):
        for key in {'in_channels', 'c1_in_channels'} & {*node}:
            node[key] = 'auto'
    assert 'auto' in str(model)
    fill_channels(auto)
    assert without_tuples(model.to_dict()) == without_tuples(cfg.model.to_dict())


CHECKED_GRADIENTS = set()


def check_gradients(model, cfg):
    """Assert that every parameter of the backbone and the neck has a gradient, which DDP needs."""
    parts = [model.backbone, *([model.neck] if 'neck' in cfg.model else [])]
    key = str([{**cfg.model.backbone, 'init_cfg': None}, cfg.model.get('neck')])
    if key in CHECKED_GRADIENTS:
        return
    CHECKED_GRADIENTS.add(key)
    maps = torch.empty(2, 3, 64, 64, device='meta')
    for part in parts:
        maps = part(maps)
    sum(x.square().sum() for x in maps).backward()
    for part in parts:
        assert not [n for n, p in part.named_parameters() if p.grad is None and p.requires_grad]


def check_loaders(cfg):
    """Assert that workers stay and, but for the demos, which train on CPUs, that memory is pinned.

    mmdet's and mmseg's tools read the same config.
    """
    for loader in ('train', 'val', 'test'):
        options = cfg[f'{loader}_dataloader']
        assert options.persistent_workers
        assert options.get('pin_memory', False) == ('digit' not in cfg.data_root)


def check_training(model, cfg):
    """Assert that the optimizer, the schedule, the hooks and the pipelines can be built."""
    drop_amp(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    for scheduler in cfg.param_scheduler:
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=wrapper, epoch_length=10))
    for name, hook in [*cfg.default_hooks.items(), *enumerate(cfg.get('custom_hooks', []))]:
        if name != 'visualization':  # it needs a runner
            HOOKS.build({k: v for k, v in hook.items() if k != 'priority'})
    for pipeline in (cfg.train_pipeline, cfg.test_pipeline):
        Compose(pipeline)


@pytest.mark.parametrize('path', CONFIGS)
def test_config(path):
    cfg = Config.fromfile(path)
    assert cfg.custom_imports['imports'] == ['mmdense'], 'mmdet and mmseg could not run it'
    assert cfg.default_scope == SCOPES[path.parts[-3]]
    assert cfg.data_root.endswith('/')
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    check_channels(model, cfg.model)
    check_neck(model)
    check_auto(cfg)
    check_weights(model.backbone, cfg.model.backbone)
    if cfg.model.type != 'DepthEstimator':
        check_classes(model, cfg)
    check_training(model, cfg)
    check_loaders(cfg)
    check_gradients(model, cfg)


@pytest.mark.parametrize('algorithm', ['faster-rcnn', 'retinanet'])
def test_compared_recipes_differ_only_in_the_backbone(algorithm):
    """As in the comparison that CondenseNetV2's detectors were published in."""
    folders = [ROOT / 'configs/detection' / name for name in ('condensenetv2', 'baselines')]
    settings = []
    for path in (p for f in folders for p in f.glob(f'{algorithm}_*_fpn_1x_coco.py')):
        cfg = Config.fromfile(path).to_dict()
        del cfg['model']['backbone'], cfg['model']['neck']['in_channels']
        settings.append(cfg)
    assert len(settings) == {'faster-rcnn': 7, 'retinanet': 3}[algorithm]
    assert all(cfg == settings[0] for cfg in settings)


@pytest.mark.parametrize(
    ('task', 'classes'), [('detection', CLASSES), ('segmentation', ('background', 'digit'))]
)
def test_demo_configs_have_the_classes_of_the_digits(task, classes):
    cfg = Config.fromfile(ROOT / f'configs/{task}/_base_/digits_{task}.py')
    assert cfg.metainfo.classes == classes
    assert len({*map(tuple, cfg.metainfo.palette)}) == len(cfg.metainfo.palette) == len(classes)


@pytest.mark.parametrize('name', sorted(p.stem for p in ROOT.glob('configs/*/*/*_cifar10.py')))
def test_recipes_of_cifar_differ_only_in_the_data(name):
    path = ROOT / 'configs/classification' / name.split('-')[0] / f'{name}.py'
    cfg, other = (Config.fromfile(p) for p in (path, path.with_stem(f'{name}0')))
    other.model.head.num_classes = 10
    for key in ('model', 'optim_wrapper', 'param_scheduler', 'train_cfg', 'auto_scale_lr'):
        assert cfg[key] == other[key]
    assert other.test_dataloader.dataset.type == 'CIFAR100'
    assert other.data_preprocessor.num_classes == 100


def test_fine_tuning_has_its_image_size_in_every_step():
    path = ROOT / 'configs/classification/rdnet/rdnet-l_finetune-amp-30e_in1k-384x384.py'
    cfg = Config.fromfile(path)
    train, test = (cfg[f'{x}_dataloader'].dataset.pipeline for x in ('train', 'test'))
    assert [x[0].scale for x in train[1].transforms] == [384, 384]
    assert (test[1].scale, test[2].crop_size) == (384, 384)
    assert train[3].policies == 'timm_increasing'
    assert cfg.model.train_cfg is None  # neither mixup nor cutmix
