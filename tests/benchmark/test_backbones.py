"""Backbones by name: all can be built, and start from the weights that the recipes start from."""

import pytest
from mmengine.config import Config

from mmdense.benchmark.backbones import known_backbones, named_backbone
from mmdense.config.channels import build_part
from mmdense.errors import UserError
from support import CONDENSED, DEMOS, ROOT

RECIPES = [
    path
    for path in sorted(ROOT.glob('configs/detection/*/faster-rcnn_*_1x_coco.py'))
    if 'mobilenet' not in path.name
]


@pytest.mark.parametrize('name', known_backbones())
def test_every_name_is_a_backbone(name):
    named = named_backbone(name, pretrained=False)
    assert named.name == name
    net = build_part(named.config, 'mmdet')
    assert type(net).__name__ == named.family
    assert net.out_strides == (4, 8, 16, 32)


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_weights_are_those_of_the_recipes(path):
    backbone = Config.fromfile(path).model.backbone
    named = named_backbone(path.stem.split('_')[1], pretrained=True)
    assert named.config['type'] == backbone.type
    assert named.config['arch'] == backbone.arch
    assert named.config.get('form') == backbone.get('form')
    assert named.config['init_cfg'] == backbone.init_cfg
    for key in ('output_norm', 'tap'):
        assert named.config.get(key) == backbone.get(key)
    assert not named.hooks


def test_condensenetv2_learns_its_connections_from_scratch():
    named = named_backbone('condensenetv2-a', pretrained=False)
    assert 'form' not in named.config
    assert [hook['type'] for hook in named.hooks] == ['mmdense.CondenseScheduleHook']


def test_timm():
    named = named_backbone('timm:resnet18', pretrained=True)
    assert named.name == 'timm:resnet18'
    assert named.family == 'timm'
    assert named.config['init_cfg']['checkpoint'] == 'timm://resnet18'
    assert build_part(named.config, 'mmdet').out_strides == (4, 8, 16, 32)
    assert named.pixels['mean'] == pytest.approx([123.675, 116.28, 103.53])
    halves = named_backbone('timm:tf_efficientnetv2_s.in1k', pretrained=True).pixels
    assert halves == dict(mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True)
    assert not named_backbone('timm:tf_efficientnetv2_s.in1k', pretrained=False).pixels


def test_output_norms_are_for_detectors():
    for detects in (True, False):
        config = named_backbone('rdnet-t', pretrained=True, detects=detects).config
        assert ('output_norm' in config) == detects


def test_of_a_config_file():
    named = named_backbone(str(CONDENSED), pretrained=False)
    assert (named.name, named.family) == ('condensenetv2-nano', 'CondenseNetV2')
    assert named.config == Config.fromfile(CONDENSED).model.backbone
    assert [hook['type'] for hook in named.hooks] == ['mmdense.CondenseScheduleHook']
    recipe = str(RECIPES[0])
    assert named_backbone(recipe, pretrained=True).config['init_cfg']
    assert 'init_cfg' not in named_backbone(recipe, pretrained=False).config


@pytest.mark.parametrize(
    ('name', 'pretrained', 'said'),
    [
        (
            'rdnet-tiny',
            False,
            "unknown backbone 'rdnet-tiny'; did you mean 'rdnet-t'.*timm:",
        ),
        ('timm:resnet19', False, "timm has no network 'resnet19'; close: .*resnet18"),
        ('densenet-264', True, 'no published weights: .*--from-scratch'),
        (str(DEMOS['detection']), True, 'has no weights to begin with: add --from-scratch'),
        ('nowhere.py', False, 'no config nowhere.py'),
    ],
)
def test_what_cannot_be_had(name, pretrained, said):
    with pytest.raises(UserError, match=said):
        named_backbone(name, pretrained=pretrained)
