"""Complete released classifiers: the logits of timm, torchvision and the rebuilt networks."""

import pytest
import timm
import torch
import torchvision
from families import difference, image, randomise
from timm.models.rexnet import RexNet

import published
from mmdense.apis import deploy
from mmdense.models import CondenseNetV2, DenseNet, RDNet, ReXNet

pytest.importorskip('mmpretrain', reason='needs the extra classification')

from mmengine.registry import MODELS, init_default_scope

NECKS = dict(
    RDNet=lambda c, arch: dict(type='mmdense.RDNetNeck', in_channels=c),
    DenseNet=lambda c, arch: dict(type='GlobalAveragePooling'),
    ReXNet=lambda c, arch: dict(
        type='mmdense.ReXNetNeck',
        **(dict(in_channels=c, hidden_channels=1024) if 'lite' in arch else {}),
    ),
    CondenseNetV2=lambda c, arch: dict(
        type='mmdense.CondenseNetV2Neck',
        in_channels=c,
        hidden_channels=published.CONDENSENETV2[arch][3],
    ),
)


def classifier(family, arch, classes=1000, **options):
    last = 5 if family is ReXNet else -1
    backbone = dict(arch=arch, out_indices=(last,), **options)
    with torch.device('meta'):
        channels = family(**backbone).out_channels[0]
    neck = NECKS[family.__name__](channels, arch)
    width = neck.get('hidden_channels', channels)
    return dict(
        type='ImageClassifier',
        backbone=dict(type=f'mmdense.{family.__name__}', **backbone),
        neck=neck,
        head=dict(type='LinearClsHead', num_classes=classes, in_channels=width),
    )


def build(config):
    init_default_scope('mmpretrain')
    net = MODELS.build(config)
    net.init_weights()
    return net.eval()


def from_torchvision(arch):
    shape = DenseNet.archs[arch]
    return torchvision.models.DenseNet(shape.growth_rate, shape.layers, shape.inputs()[0])


def from_timm(family, arch):
    name = {
        RDNet: f'rdnet_{arch}',
        DenseNet: f'densenet{arch}',
        ReXNet: f'rexnet_{arch.replace(".", "")}0',
    }[family]
    return timm.create_model(name) if timm.is_model(name) else RexNet(width_mult=float(arch))


# Name -> family, arch, options, and what makes the published network.
REFERENCES = {
    f'timm-{family.__name__}-{arch}': (family, arch, {}, lambda f=family, a=arch: from_timm(f, a))
    for family in (RDNet, DenseNet, ReXNet)
    for arch in family.archs
    if family is not DenseNet or timm.is_model(f'densenet{arch}')
    if 'lite' not in arch
}
REFERENCES |= {
    f'torchvision-DenseNet-{arch}': (DenseNet, arch, {}, lambda a=arch: from_torchvision(a))
    for arch in DenseNet.archs
}
REFERENCES['mmpretrain-DenseNet-121'] = (DenseNet, '121', {}, published.MMPretrainDenseNet)
REFERENCES['clovaai-ReXNet-1.0'] = (ReXNet, '1.0', {}, published.ClovaaiReXNet)
REFERENCES |= {
    f'clovaai-ReXNet-lite-{width}': (
        ReXNet,
        f'lite-{width}',
        {},
        lambda width=width: published.ClovaaiReXNet(width),
    )
    for width in published.LITE
}
REFERENCES |= {
    f'released-CondenseNetV2-{arch}-{form}': (
        CondenseNetV2,
        arch,
        dict(form=form),
        lambda arch=arch, form=form: published.CondenseNetV2(arch, form),
    )
    for arch in CondenseNetV2.archs
    for form in ('learned', 'condensed')
}
SLOW = (
    'RDNet-small',
    'RDNet-base',
    'RDNet-large',
    '264',
    '232',
    '201',
    'timm-DenseNet-1',
    'ReXNet-3',
)


def test_every_arch_has_a_reference():
    found = {(family, arch) for family, arch, *_ in REFERENCES.values()}
    assert found == {
        (f, arch) for f in (RDNet, DenseNet, ReXNet, CondenseNetV2) for arch in f.archs
    }


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[pytest.mark.slow] * any(part in name for part in SLOW))
        for name in REFERENCES
    ],
)
@torch.no_grad()
def test_logits_are_equal(name, tmp_path):
    """Of a file that fills a classifier by init_cfg, and of the deployed form."""
    family, arch, options, source = REFERENCES[name]
    torch.manual_seed(0)
    theirs = source()
    if isinstance(theirs, torch.nn.Module):
        for weight in theirs.parameters():
            if weight.ndim == 4:  # torch's initial values let the features fade
                torch.nn.init.kaiming_normal_(weight)
        randomise(theirs).eval()
    file = tmp_path / 'released.pth'
    torch.save(dict(state_dict=theirs.state_dict()), file)
    config = classifier(family, arch, **options)
    ours = build(dict(config, init_cfg=dict(type='Pretrained', checkpoint=str(file), min_loaded=1)))
    file.unlink()
    x = image(64, 96, batch=2)
    if isinstance(theirs, torch.nn.Module):
        theirs.double()
    expected = getattr(theirs, 'logits', theirs)(x.double())
    assert expected.shape == (2, 1000)
    assert difference(*expected) > 1e-4  # between the images
    errors = [difference(ours.double()(x.double()), expected)]
    deploy(ours)
    errors.append(difference(ours(x.double()), expected))
    assert max(errors) <= 1e-9, errors
