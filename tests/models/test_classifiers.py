"""Complete released classifiers: the logits of timm, torchvision and the rebuilt networks."""

import pytest
import timm
import torch
import torchvision
from families import difference, image, randomise, run
from timm.models.rexnet import RexNet

import published
from checkpoints import error_of
from mmdense.apis import convert_weights, deploy
from mmdense.models import CondenseNetV2, DenseNet, RDNet, ReXNet
from mmdense.weights.files import read_checkpoint
from mmdense.weights.loading import load_checked
from support import forget_runs

pytest.importorskip('mmpretrain', reason='needs the extra classification')

from mmengine.config import Config
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


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmpretrain')
    yield
    forget_runs()


def build(config):
    net = MODELS.build(config)
    net.init_weights()
    return net.eval()


def from_torchvision(arch):
    shape = DenseNet.archs[arch]
    return torchvision.models.DenseNet(shape.growth_rate, shape.layers, shape.inputs()[0])


def from_timm(family, arch):
    name = f'rdnet_{arch}' if family is RDNet else f'rexnet_{arch.replace(".", "")}0'
    return timm.create_model(name) if timm.is_model(name) else RexNet(width_mult=float(arch))


# Name -> family, arch, options, and what makes the published network.
REFERENCES = {
    f'timm-{family.__name__}-{arch}': (family, arch, {}, lambda f=family, a=arch: from_timm(f, a))
    for family in (RDNet, ReXNet)
    for arch in family.archs
    if 'lite' not in arch
}
REFERENCES |= {
    f'torchvision-DenseNet-{arch}': (DenseNet, arch, {}, lambda a=arch: from_torchvision(a))
    for arch in DenseNet.archs
}
REFERENCES['mmpretrain-DenseNet-121'] = (DenseNet, '121', {}, published.mmpretrain_densenet)
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
    assert max(errors) <= 1e-8, errors


def test_a_converted_file_has_the_classifier(tmp_path):
    """With the config of a classifier; without one it has the backbone alone."""
    torch.manual_seed(0)
    source, target = tmp_path / 'clovaai.pth', tmp_path / 'converted.pth'
    theirs = randomise(published.ClovaaiReXNet('1.0')).eval()
    torch.save(theirs.state_dict(), source)
    config = Config(dict(model=classifier(ReXNet, 'lite-1.0'), default_scope='mmpretrain'))
    done = convert_weights(str(source), target, config=config)
    assert (done.dropped, done.report.share()) == ((), 1)
    ours = build(config.model)
    ours.load_state_dict(read_checkpoint(target)['state_dict'])
    x = image(64, 96)
    assert difference(run(ours, x), run(theirs.logits, x)) <= 1e-5
    done = convert_weights(str(source), tmp_path / 'backbone.pth')
    assert all(key.startswith('output.') for key in done.dropped)


def test_other_classes(tmp_path):
    """Training on other classes starts from the backbone and the neck."""
    theirs = published.CondenseNetV2('a')
    net = build(classifier(CondenseNetV2, 'a', classes=5, form='condensed'))
    load_checked(net, theirs.state_dict(), source='the file', part='backbone.')
    assert torch.equal(net.neck.fc.weight, theirs.state['fc.weight'])
    assert net.head.fc.weight.shape == (5, 828)
    text = error_of(load_checked, net, theirs.state_dict(), source='the file')
    assert 'wrong shape: head.fc.weight (file: [1000, 828]; model: [5, 828])' in text


def test_necks():
    """Maps become features; each argument has an effect."""
    maps = (None, image(7, 5, batch=2, channels=32))
    for options, channels in (
        (dict(type='RDNetNeck', in_channels=32), 32),
        (dict(type='CondenseNetV2Neck', in_channels=32), 32),
        (dict(type='CondenseNetV2Neck', in_channels=32, hidden_channels=6), 6),
        (dict(type='ReXNetNeck'), 32),
        (dict(type='ReXNetNeck', in_channels=32, hidden_channels=6), 6),
    ):
        neck = MODELS.build(dict(options, type=f'mmdense.{options["type"]}'))
        (features,) = neck(maps)
        assert features.shape == (2, channels)
    dropped = MODELS.build(dict(type='mmdense.ReXNetNeck', drop_rate=0.9))
    assert (dropped(maps)[0] == 0).float().mean() > 0.5
