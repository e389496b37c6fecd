"""Backbones by name: all can be built and start from the weights of the recipes."""

import pytest
from mmengine.config import Config

from mmdense.benchmark.backbones import PRUNING, find_backbone, known_backbones, read_rows
from mmdense.config.channels import build_part
from mmdense.errors import UserError
from support import CONDENSED, DEMOS, ROOT

RECIPES = [
    path
    for path in sorted(ROOT.glob('configs/detection/*/faster-rcnn_*_1x_coco.py'))
    if 'mobilenet' not in path.name
]


@pytest.mark.parametrize('name', known_backbones())
def test_every_backbone_can_be_built(name):
    spec = find_backbone(name, pretrained=False)
    assert spec.name == name
    net = build_part(spec.config, 'mmdet')
    assert type(net).__name__ == spec.family
    assert net.out_strides == (4, 8, 16, 32)


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_weights_and_settings_are_those_of_the_recipes(path):
    backbone = Config.fromfile(path).model.backbone
    name, pretrained = path.stem.split('_')[1], backbone.get('init_cfg') is not None
    if not pretrained:
        with pytest.raises(UserError, match='has no weights to start from'):
            find_backbone(name, pretrained=True)
    spec = find_backbone(name, pretrained=pretrained)
    for key in ('type', 'arch', 'form', 'init_cfg', 'output_norm', 'tap'):
        assert spec.config.get(key) == backbone.get(key)
    assert not spec.hooks
    segmentor = find_backbone(spec.name, pretrained=pretrained, detection=False)
    assert 'output_norm' not in segmentor.config


def test_a_checkpoint_needs_no_weights_to_start_from():
    spec = find_backbone('densenet-264@a/b.pth', pretrained=True)
    assert (spec.name, spec.checkpoint) == ('densenet-264@a/b.pth', 'a/b.pth')
    assert find_backbone('condensenetv2-a@b.pth', pretrained=True).config['form'] == 'condensed'


def test_condensenetv2_learns_its_connections_from_scratch():
    spec = find_backbone('condensenetv2-a', pretrained=False)
    assert 'form' not in spec.config
    assert spec.hooks == (dict(type=PRUNING),)


def test_timm():
    spec = find_backbone('timm:resnet18', pretrained=True)
    assert (spec.name, spec.family) == ('timm:resnet18', 'timm')
    assert spec.config['init_cfg']['checkpoint'] == 'timm://resnet18'
    assert build_part(spec.config, 'mmdet').out_strides == (4, 8, 16, 32)
    assert spec.preprocessor['mean'] == pytest.approx([123.675, 116.28, 103.53])
    arguments = '?drop_path_rate=0.1&act_layer=silu&global_pool='
    spec = find_backbone(f'timm:resnet18{arguments}', pretrained=True)
    assert spec.name == f'timm:resnet18{arguments}'
    values = dict(drop_path_rate=0.1, act_layer='silu', global_pool='')
    assert spec.config['model_kwargs'] == values
    assert spec.config['init_cfg']['checkpoint'] == 'timm://resnet18'
    name = 'timm:tf_efficientnetv2_s.in1k'
    halves = find_backbone(name, pretrained=True).preprocessor
    assert halves == dict(mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True)
    assert not find_backbone(name, pretrained=False).preprocessor


ROWS = """
rows:
- backbone: timm:resnet18
- backbone: rdnet-t
  name: rdnet-t, drop path
  arguments: {drop_path_rate: 0.2}
  weights: my.pth
  epochs: 3
  options: {optim_wrapper.optimizer.lr: 0.01}
- {backbone: rdnet-t, weights: null}
"""


def test_rows_with_settings_of_their_own(tmp_path):
    file = tmp_path / 'rows.yml'
    file.write_text(ROWS)
    plain, changed, scratch = read_rows(str(file), pretrained=True)
    assert plain == find_backbone('timm:resnet18', pretrained=True)
    assert (changed.name, scratch.name) == ('rdnet-t, drop path', 'rdnet-t')
    assert changed.config['drop_path_rate'] == 0.2
    assert changed.config['init_cfg']['checkpoint'] == 'my.pth'
    assert {*changed.settings} == {'arguments', 'weights', 'epochs', 'options'}
    assert 'init_cfg' not in scratch.config
    file = tmp_path / 'rows.py'
    for text, message in (
        ('rows = 1', 'no list of rows'),
        ('rows = [dict(name="x")]', 'no list of rows'),
        ('rows = [dict(backbone="rdnet-t", epoch=3)]', "'epoch' of a row; did you mean 'epochs'"),
        ('rows = [dict(backbone="rdnet-q")]', "unknown backbone 'rdnet-q'"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_rows(str(file), pretrained=False)


def test_from_a_config_file():
    spec = find_backbone(str(CONDENSED), pretrained=False)
    assert (spec.name, spec.family) == ('condensenetv2-nano', 'CondenseNetV2')
    assert spec.config == Config.fromfile(CONDENSED).model.backbone
    assert [hook['type'] for hook in spec.hooks] == [PRUNING]
    recipe = str(RECIPES[0])
    assert find_backbone(recipe, pretrained=True).config['init_cfg']
    assert 'init_cfg' not in find_backbone(recipe, pretrained=False).config


@pytest.mark.parametrize(
    ('name', 'pretrained', 'message'),
    [
        ('rdnet-tiny', False, "unknown backbone 'rdnet-tiny'; did you mean 'rdnet-t'.*timm:"),
        ('timm:resnet19', False, "timm has no network 'resnet19'; close: .*resnet18"),
        ('densenet-264', True, 'densenet-264 has no weights to start from: add --from-scratch'),
        (str(DEMOS['detection']), True, 'has no weights to start from: add --from-scratch'),
        ('nowhere.py', False, 'no config nowhere.py'),
    ],
)
def test_errors(name, pretrained, message):
    with pytest.raises(UserError, match=message):
        find_backbone(name, pretrained=pretrained)
