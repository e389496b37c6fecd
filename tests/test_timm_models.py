"""Networks that mmdense registers with timm."""

import pytest
import timm
import torch
from families import difference, image, randomise
from timm.data import resolve_model_data_config

import mmdense.timm_models  # noqa: F401
import published
from mmdense.models import CondenseNetV2, DenseNet

NAMES = {f'condensenetv2_{arch}': (CondenseNetV2, arch) for arch in 'abc'}
NAMES |= {
    f'densenet{arch.replace("-", "_")}': (DenseNet, arch) for arch in ('264', '232-k48', '264-k48')
}


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[pytest.mark.slow] * name.endswith(('_b', '_c', '_k48')))
        for name in NAMES
    ],
)
def test_interface(name):
    family, arch = NAMES[name]
    assert timm.is_model(name)
    with torch.device('meta'):
        net = timm.create_model(name, num_classes=7, in_chans=4, drop_rate=0.1)
        assert net.get_classifier().out_features == net.num_classes == 7
        x = torch.zeros(2, 4, 64, 96)
        assert net(x).shape == (2, 7)
        features = net.forward_head(net.forward_features(x), pre_logits=True)
        assert features.shape == (2, net.head_hidden_size)
        net.reset_classifier(0)
        assert net(x).shape == features.shape
        assert net.forward_features(x).shape == (2, net.num_features, 2, 3)
        for indices in (None, (1, 3)) if family is CondenseNetV2 else ((1, 3),):
            chosen = {} if indices is None else dict(out_indices=indices)
            net = timm.create_model(name, features_only=True, **chosen)
            maps = net(x[:, :3])
            assert [y.shape[1] for y in maps] == net.feature_info.channels()
            assert [64 // y.shape[2] for y in maps] == net.feature_info.reduction()
            if family is CondenseNetV2:
                channels = [family.archs[arch].outputs()[i] for i in indices or range(5)]
                assert net.feature_info.channels() == channels
    names = [name for name, _ in net.named_parameters()]
    assert not any('block5' in name or 'block_5' in name for name in names)
    assert net.pretrained_cfg['architecture'] == name
    data = resolve_model_data_config(net)
    assert (data['input_size'], data['interpolation']) == ((3, 224, 224), 'bilinear')
    with pytest.raises(RuntimeError, match='No pretrained weights'):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize('form', ['learned', 'condensed'])
@torch.no_grad()
def test_released_weights(form, tmp_path):
    file = tmp_path / 'released.pth'
    theirs = published.CondenseNetV2('a', form)
    torch.save(dict(state_dict=theirs.state_dict()), file)
    load = dict(form=form, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    net = timm.create_model('condensenetv2_a', **load).eval()
    x = image(64, 96)
    assert difference(net.double()(x.double()), theirs.logits(x.double())) <= 1e-9
    for y, z in zip(
        timm.create_model('condensenetv2_a', features_only=True, **load).eval()(x),
        theirs(x),
        strict=True,
    ):
        assert difference(y, z) <= 1e-5
    other = timm.create_model('condensenetv2_a', num_classes=5, **load).eval()  # fine-tuning
    assert torch.equal(other.neck.fc.weight, net.neck.fc.weight.float())
    torch.save(randomise(net).state_dict(), file)
    again = timm.create_model('condensenetv2_a', **load).eval()
    assert torch.equal(again.head.fc.weight, net.head.fc.weight.float())
    torch.save(dict(a=torch.zeros(1)), file)
    with pytest.raises(RuntimeError, match='Missing key'):
        timm.create_model('condensenetv2_a', **load)


def test_training():
    """All parameters get gradients, in the feature extractor too; connections are pruned."""
    for options in ({}, dict(features_only=True, out_indices=(1, 2)), dict(memory='lean')):
        net = timm.create_model('condensenetv2_a', **options)
        outputs = net(image(64, 64, batch=2))
        sum(y.sum() for y in (outputs if isinstance(outputs, list) else [outputs])).backward()
        assert all(p.grad is not None for p in net.parameters())
    net.backbone.prune_to(0.5)
    net.backbone.condense()
    assert net(image(64, 64, batch=2)).shape == (2, 1000)
