"""Every config builds, and its numbers agree with what the parts announce."""

from functools import cache

import pytest
import timm
import torch
import torchvision
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope, init_default_scope
from mmengine.runner.checkpoint import get_torchvision_models

import mmdense  # noqa: F401
from mmdense.config.validate import check_channels, check_neck
from mmdense.datasets import CLASSES, FOREGROUND_CLASSES, FOREGROUND_PALETTE, PALETTE
from support import ROOT

LEAVES = sorted(p for p in ROOT.glob('configs/*/*/*.py') if p.parent.name != '_base_')


@pytest.fixture(autouse=True)
def _scope():
    yield
    DefaultScope._instance_dict.clear()


@cache
def shapes_of(address):
    """Return the shapes of the network that these weights belong to, as its own library has it."""
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
    """Assert that the weights to begin with exist, and are those of this network."""
    if cfg.get('init_cfg') is None:
        return
    address = cfg.init_cfg.checkpoint
    if address.startswith('condensenetv2://'):
        assert address.endswith(f'/condensenetv2-{cfg.arch}_converted.pth')
        assert cfg.form == 'condensed'
        return
    theirs, ours = shapes_of(address), backbone.state_dict()
    strays = [key for key, value in ours.items() if theirs.get(key) != value.shape]
    assert not [key for key in strays if not key.startswith('output_norms.')]


@pytest.mark.parametrize('path', LEAVES, ids=lambda p: p.stem)
def test_config_builds_and_fits(path):
    cfg = Config.fromfile(path)
    assert cfg.custom_imports['imports'] == ['mmdense'], 'stock tools could not run it'
    assert cfg.default_scope == ('mmdet' if 'detection' in path.parts else 'mmseg')
    assert cfg.data_root.endswith('/')
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    check_channels(model, cfg.model)
    check_neck(model)
    check_weights(model.backbone, cfg.model.backbone)
    if cfg.model.type == 'DepthEstimator':
        return
    data = cfg.train_dataloader.dataset
    data = data.get('dataset', data)
    with DATASETS.switch_scope_and_registry(None) as registry:
        classes = data.get('metainfo', registry.get(data.type).METAINFO)['classes']
    heads = {n: m for n, m in model.named_modules() if hasattr(m, 'num_classes')}
    heads.pop('rpn_head', None)  # tells objects from background alone
    assert heads
    assert {n: m.num_classes for n, m in heads.items()} == dict.fromkeys(heads, len(classes))


@pytest.mark.parametrize('path', LEAVES, ids=lambda p: p.stem)
def test_no_parameter_is_left_without_a_gradient(path):
    """DDP would refuse it."""
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        backbone = MODELS.build({**cfg.model.backbone, 'init_cfg': None})
        maps = backbone(torch.empty(2, 3, 64, 64))
        if 'neck' in cfg.model:
            neck = MODELS.build(cfg.model.neck)
            maps = neck(maps)
        sum(m.square().sum() for m in maps).backward()
    assert not [n for n, p in backbone.named_parameters() if p.grad is None and p.requires_grad]
    assert 'neck' not in cfg.model or all(p.grad is not None for p in neck.parameters())


@pytest.mark.parametrize('algorithm', ['faster-rcnn', 'retinanet'])
def test_compared_recipes_differ_in_backbones_alone(algorithm):
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
    ('task', 'classes', 'palette'),
    [
        ('detection', CLASSES, PALETTE),
        ('segmentation', FOREGROUND_CLASSES, FOREGROUND_PALETTE),
    ],
)
def test_demo_configs_name_the_digits(task, classes, palette):
    cfg = Config.fromfile(ROOT / f'configs/{task}/_base_/digits_{task}.py')
    assert cfg.metainfo.classes == classes
    assert tuple(cfg.metainfo.palette) == palette
