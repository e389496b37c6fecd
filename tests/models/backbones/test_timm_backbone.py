"""TimmBackbone has timm's outputs and names; test_contract.py has what all families share."""

import copy

import pytest
import timm
import torch
from families import image, randomise, same_step, step
from timm.layers import convert_sync_batchnorm
from torch import nn

from mmdense.models.backbones.timm_backbone import TimmBackbone

# Layers after the last feature map in timm's classifiers.
HEADS = {
    'mobilenetv1_100': {'classifier'},
    'mobilenetv2_100': {'conv_head', 'bn2', 'classifier'},
    'mobilenetv3_small_050': {'conv_head', 'classifier'},
    'resnet18': {'fc'},
    'convnext_atto': {'head'},
}
SMALL = 'mobilenetv2_035'


@pytest.mark.parametrize('name', HEADS)
def test_equals_timm(name, tmp_path):
    """A checkpoint of the classifier loads; feature maps are those of ``features_only``."""
    classifier = randomise(timm.create_model(name)).state_dict()
    file = str(tmp_path / 'classifier.pth')
    torch.save(classifier, file)
    net = TimmBackbone(model_name=name, init_cfg=dict(type='Pretrained', checkpoint=file)).eval()
    net.init_weights()
    ours = net.state_dict()
    assert {key.split('.')[0] for key in classifier.keys() - ours.keys()} == HEADS[name]
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in net._net.named_parameters()]
    for key, value in ours.items():
        assert torch.equal(value, classifier[key]), key
    theirs = timm.create_model(name, features_only=True, out_indices=net.out_indices).eval()
    renamed = dict(zip(theirs.state_dict(), ours.values(), strict=True))  # in the same order
    theirs.load_state_dict(renamed)
    assert net.out_channels == tuple(theirs.feature_info.channels())
    assert net.out_strides == tuple(theirs.feature_info.reduction()) == (4, 8, 16, 32)
    x = torch.randn(1, 3, 45, 70)
    for a, b in zip(net(x), theirs(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ('name', 'size'),
    [
        ('swin_tiny_patch4_window7_224', 224),
        ('swinv2_tiny_window8_256', 256),
        ('maxvit_pico_rw_256', 256),
    ],
)
def test_transformers_take_images_of_any_size(name, size):
    """At the size that timm builds the network for, the feature maps are timm's."""
    net = TimmBackbone(model_name=name).eval()
    with torch.no_grad():
        sizes = [x.shape[2:] for x in net(torch.randn(1, 3, 97, 130))]
        assert sizes == [(25, 33), (13, 17), (7, 9), (4, 5)]
        plain = timm.create_model(name, num_classes=0).eval()
        plain.load_state_dict(net.state_dict(), strict=False)
        x = torch.randn(1, 3, size, size)
        options = dict(intermediates_only=True, indices=list(net.out_indices))
        for a, b in zip(net(x), plain.forward_intermediates(x, **options), strict=True):
            torch.testing.assert_close(a, b)
    if 'swin' in name:
        strict = TimmBackbone(model_name=name, model_kwargs=dict(strict_img_size=True))
        with pytest.raises(AssertionError, match="doesn't match model"):
            strict(torch.randn(1, 3, 96, 128))


@pytest.mark.parametrize('patch', [8, 14, 16, 32])
def test_plain_transformers_get_a_pyramid(patch, tmp_path):
    plain = randomise(timm.create_model('test_vit', patch_size=patch))
    file = str(tmp_path / 'vit.pth')
    torch.save(plain.state_dict(), file)
    options = dict(model_name='test_vit', model_kwargs=dict(patch_size=patch))
    net = TimmBackbone(**options, init_cfg=dict(type='Pretrained', checkpoint=file)).eval()
    net.init_weights()  # complete but for the pyramid
    channels = {8: (32, 64, 64, 64), 32: (8, 16, 32, 64)}.get(patch, (16, 32, 64, 64))
    assert (net.out_strides, net.out_channels) == ((4, 8, 16, 32), channels)
    with torch.no_grad():
        maps = net(torch.randn(1, 3, 97, 130))
        assert [x.shape[1] for x in maps] == [*channels]
        assert [x.shape[2:] for x in maps] == [(25, 33), (13, 17), (7, 9), (4, 5)]
        x = torch.randn(1, 3, 160, 160)
        maps = net(x)
        if patch == 14:  # 10 x 10 patches
            x = nn.functional.interpolate(x, (140, 140), mode='bilinear')
            plain.set_input_size((140, 140))
        (last,) = plain.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        torch.testing.assert_close(maps[{8: 1, 32: 3}.get(patch, 2)], last)
    assert net.layer_depth('pyramid.0.0.weight') == net.layer_depth('pyramid.0.0.weight', 'layer')
    assert net.layer_depth('pyramid.0.0.weight') == (7, 8)
    assert net.layer_depth('blocks.0.norm1.weight')[0] == 1
    assert TimmBackbone(**options, out_indices=(2,)).out_strides == (16,)


def test_blocks_of_a_plain_transformer_freeze_together():
    for stages in (0, 3):
        assert 'patch_embed.proj' not in trained(model_name='test_vit', frozen_stages=stages)
        assert 'blocks.0.norm1' in trained(model_name='test_vit', frozen_stages=stages)
    names = trained(model_name='test_vit', frozen_stages=4)
    assert {name.split('.')[0] for name in names} == {'pyramid'}


def test_names_have_no_prefix_inside_a_detector():
    detector = nn.ModuleDict(dict(backbone=TimmBackbone(model_name=SMALL)))
    assert 'backbone.conv_stem.weight' in detector.state_dict()
    assert 'backbone.conv_stem.weight' in dict(detector.named_parameters())


@pytest.mark.parametrize(('index', 'last'), [(0, 'blocks.0'), (3, 'blocks.4'), (4, 'blocks.6')])
def test_unneeded_layers_are_pruned(index, last):
    net = TimmBackbone(model_name=SMALL, out_indices=(index,))
    assert list(net.state_dict())[-1].startswith(last)


def test_layer_depth():
    net = TimmBackbone(model_name=SMALL)
    assert net.layer_depth('bn1.weight') == (0, 9)
    assert net.layer_depth('blocks.4.0.conv_pw.weight') == (5, 9)
    assert net.layer_depth('blocks.6.0.bn3.bias') == (7, 9)
    assert net.layer_depth('blocks.6.0.bn3.bias', 'layer') == (17, 19)
    with torch.device('meta'):
        net = TimmBackbone(model_name='convnext_atto')
    assert net.layer_depth('stem.0.weight') == (0, 6)
    assert net.layer_depth('stages.1.downsample.1.weight') == (2, 6)
    assert net.layer_depth('stages.3.blocks.1.gamma', 'layer') == (12, 14)


def trained(**options):
    with torch.device('meta'):
        net = TimmBackbone(**options).train()
    return {name.rsplit('.', 1)[0] for name, p in net.named_parameters() if p.requires_grad}


def test_stages_end_in_feature_maps():
    # Feature map 3 needs two of timm's stages.
    names = trained(model_name=SMALL, frozen_stages=4)
    assert {name[:8] for name in names} == {'blocks.5', 'blocks.6'}
    names = trained(model_name=SMALL, frozen_stages=3)
    assert {name[:8] for name in names} == {f'blocks.{i}' for i in (3, 4, 5, 6)}
    # A feature map of the stem leaves stage 1 empty.
    for stages in (0, 1):
        names = trained(model_name='resnet18', frozen_stages=stages)
        assert {name[:6] for name in names} == {f'layer{i}' for i in (1, 2, 3, 4)}
    names = trained(model_name='convnext_atto', frozen_stages=2)
    assert {name[:8] for name in names} == {'stages.2', 'stages.3'}


def test_parameters_outside_modules_freeze_too():
    assert 'pos_embed1' in trained(model_name='visformer_tiny')
    assert 'pos_embed1' not in trained(model_name='visformer_tiny', frozen_stages=1)
    assert 'pos_embed2' in trained(model_name='visformer_tiny', frozen_stages=1)


@pytest.mark.parametrize(
    'name', ['test_resnet', 'test_convnext', 'test_vit', 'mobilenetv3_small_050', 'hrnet_w18_small']
)
def test_recomputing_equals_the_plain_step(name):
    results = []
    for memory in ('plain', 'recompute'):
        torch.manual_seed(0)
        net = randomise(TimmBackbone(model_name=name, memory=memory)).train()
        results.append(step(net, image(64, 64, batch=2))[0])
    same_step(*results, 0)


def test_timms_network_has_the_same_mode():
    net = TimmBackbone(model_name=SMALL)
    assert not net.eval()._net.training
    assert net.train()._net.training


@pytest.mark.parametrize('with_cp', [False, True])
def test_copies_are_independent(with_cp):
    net = randomise(TimmBackbone(model_name=SMALL, with_cp=with_cp)).eval()
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    before = net(x)[-1]
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x)[-1], before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(net(x)[-1], before)
    assert not twin(x)[-1].any()


def test_replaced_norms_are_used():
    x = torch.randn(1, 3, 64, 64)
    for name, convert in (
        ('resnet18', nn.SyncBatchNorm.convert_sync_batchnorm),  # replaces one at the root
        (SMALL, convert_sync_batchnorm),
    ):
        net = randomise(TimmBackbone(model_name=name)).eval()
        expected = net(x)
        net = convert(net)
        assert net._net.bn1 is net.bn1
        assert isinstance(net.bn1, nn.SyncBatchNorm)
        for a, b in zip(net.train().eval()(x), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_norms_that_lost_their_activation_are_refused():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(TimmBackbone(model_name=SMALL))
    with pytest.raises(ValueError, match='bn1 lost its activation'):
        net.train()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(model_name='mobilenet1_100'), "no network 'mobilenet1_100'; close: .*mobilenetv1_"),
        (dict(model_name='hf-hub:someone/something'), 'no network'),
        (dict(model_name='resnet18.nonsense'), 'timm has no tag of'),
        (dict(model_name='mixer_s32_224'), 'no feature maps of several strides'),
        (dict(model_name='vit_tiny_r_s16_p8_224'), 'no feature maps of several strides'),
        (dict(model_name='pit_ti_224'), 'no group matcher'),
        (dict(model_name=SMALL, model_kwargs=dict(num_classes=2)), "'num_classes' is set"),
        (
            dict(model_name=SMALL, model_kwargs=dict(features_only=True)),
            "'features_only' is set",
        ),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message), torch.device('meta'):
        TimmBackbone(**options)
