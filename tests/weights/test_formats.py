"""The key maps: installed sources, documented layouts of the others, and what must be refused."""

import re
from functools import cache

import pytest
import timm
import torch
import torchvision
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.nn import functional as F

from mmdense.errors import UserError
from mmdense.models import CondenseNetV2, DenseNet, RDNet, ReXNet
from mmdense.weights import files
from mmdense.weights.formats import FORMATS, convert, recognise, state_dict_of
from mmdense.weights.loading import load_into
from published import ClovaaiReXNet, Fork
from support import ROOT

pytestmark = [
    pytest.mark.filterwarnings('ignore:.*which is a no-op:UserWarning'),
    pytest.mark.filterwarnings('ignore:threshold is not defined:UserWarning'),
    pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore``:UserWarning'),
]

RECIPES = dict(
    mmdet='detection/rdnet/cascade-mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco.py',
    mmseg='segmentation/rdnet/upernet_rdnet-t_amp-160k_ade20k-512x512.py',
)
TINY = dict(layers=(1, 2), growth=(4, 8), groups=4, gated_from=1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def randomised(net):
    """Give norms, biases and scales random values: fresh ones are alike. In double precision."""
    for name, value in net.state_dict().items():
        if value.ndim == 1:
            low = 0.5 if name.endswith(('weight', 'running_var', 'gamma')) else -0.5
            value.uniform_(low, low + 1)
    return net.double().eval()


def on_meta(make, *args, **options):
    with torch.device('meta'):
        return make(*args, **options)


def image():
    return torch.randn(2, 3, 64, 96).double()


@torch.no_grad()
def check_maps(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert theirs.std() > 0
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def check_full(report):
    assert report.share() == 1.0
    assert report.loaded
    faults = (report.missing, report.unexpected, report.wrong_shape)
    assert not any(faults), report.table()


def loaded(net, checkpoint, **options):
    """Return our network with all of a checkpoint's weights, and its report."""
    _, report = load_into(net, checkpoint, **options)
    check_full(report)
    return net.double().eval(), report


# Installed sources.


@pytest.mark.parametrize(
    ('name', 'ours'),
    [
        ('rdnet_tiny', RDNet),
        ('densenet121', DenseNet),
        ('rexnet_100', lambda: ReXNet(out_indices=range(1, 6))),
    ],
)
@torch.no_grad()
def test_timm_classifiers(name, ours):
    theirs = randomised(timm.create_model(name))
    net, report = loaded(ours(), theirs.state_dict())
    classifier = [k for k in theirs.state_dict() if k.startswith(('head.', 'classifier.'))]
    assert list(report.dropped) == classifier
    x = image()
    indices = [i for i, info in enumerate(theirs.feature_info) if info['reduction'] >= 4]
    last, maps = theirs.forward_intermediates(x, indices=indices)
    check_maps(net(x), [*maps, last] if name == 'rexnet_100' else maps)


@pytest.mark.parametrize(
    ('name', 'ours'), [('rdnet_tiny', RDNet), ('densenet121', DenseNet), ('rexnet_100', ReXNet)]
)
@torch.no_grad()
def test_timm_feature_extractors(name, ours):
    theirs = randomised(timm.create_model(name, features_only=True))
    net, report = loaded(ours(), theirs.state_dict())
    assert report.dropped == ()
    x = image()
    check_maps(net(x), theirs(x)[-4:])


def named_as_in_2017(state):
    return {
        re.sub(r'(denselayer\d+\.(?:norm|conv))([12])\.', r'\1.\2.', key): value
        for key, value in state.items()
        if not key.endswith('num_batches_tracked')
    }


@pytest.mark.parametrize('rename', [dict, named_as_in_2017])
@torch.no_grad()
def test_torchvision(rename):
    theirs = randomised(torchvision.models.densenet121())
    maps = {}
    for block in (1, 2, 3):
        module = theirs.features.get_submodule(f'denseblock{block}')
        module.register_forward_hook(lambda _, __, y, block=block: maps.update({block: y}))
    state = rename(theirs.state_dict())
    old = rename is named_as_in_2017
    assert ('features.denseblock1.denselayer1.norm.1.weight' in state) == old
    net, report = loaded(DenseNet(), state)
    assert report.dropped == ('classifier.weight', 'classifier.bias')
    x = image()
    last = F.relu(theirs.features(x))
    check_maps(net(x), [maps[1], maps[2], maps[3], last])


@torch.no_grad()
def test_navers_own_names():
    theirs = randomised(timm.create_model('rdnet_tiny'))
    state = {re.sub(r'^stem\.', 'stem.stem.', k): v for k, v in theirs.state_dict().items()}
    assert sum(key.startswith('stem.stem.') for key in state) == 4
    net, _ = loaded(RDNet(), dict(model=state))
    x = image()
    check_maps(net(x), theirs.forward_intermediates(x, intermediates_only=True))


# mmpretrain, from the facts page.


class DenseLayer(nn.Module):
    def __init__(self, channels, growth):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(self.norm1(x).relu())
        return torch.cat([x, self.conv2(self.norm2(y).relu())], 1)


class Stage(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, x):
        return self.block(x)


class Transition(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x):
        return F.avg_pool2d(self.conv(self.norm(x).relu()), 2)


class MMPretrainDenseNet(nn.Module):
    """DenseNet-121 as a classifier; its maps lie behind the transitions."""

    def __init__(self):
        super().__init__()
        stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)]
        stem += [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        stages, transitions, channels = nn.ModuleList(), nn.ModuleList(), 64
        for number in (6, 12, 24, 16):
            stages.append(Stage(*(DenseLayer(channels + 32 * j, 32) for j in range(number))))
            channels += 32 * number
            transitions.append(Transition(channels))
            channels //= 2
        transitions[-1] = nn.Sequential(nn.BatchNorm2d(1024), nn.ReLU())
        backbone = dict(stem=nn.Sequential(*stem), stages=stages, transitions=transitions)
        self.backbone = nn.ModuleDict(backbone)
        self.head = nn.ModuleDict(dict(fc=nn.Linear(1024, 1000)))

    def forward(self, x):
        x = self.backbone['stem'](x)
        for stage, transition in zip(
            self.backbone['stages'], self.backbone['transitions'], strict=True
        ):
            x = transition(stage(x))
        return x


@pytest.mark.parametrize('prefix', ['backbone.', ''])
@torch.no_grad()
def test_mmpretrain(prefix):
    theirs = randomised(MMPretrainDenseNet())
    state = {k.replace('backbone.', prefix): v for k, v in theirs.state_dict().items()}
    assert len(state) == 727
    net, report = loaded(DenseNet(arch='121'), dict(meta={}, state_dict=state))
    assert report.format.name == 'densenet-mmpretrain'
    assert report.dropped == ('head.fc.weight', 'head.fc.bias')
    x = image()
    check_maps(net(x)[-1:], [theirs(x)])


def test_mmpretrain_as_backbone_weights():
    theirs = MMPretrainDenseNet()
    net, _ = loaded(DenseNet(), theirs.state_dict(), prefix='backbone.')
    assert torch.equal(
        net.get_parameter('features.denseblock4.denselayer16.conv2.weight'),
        theirs.get_parameter('backbone.stages.3.block.15.conv2.weight').double(),
    )


# clovaai's ReXNet 1.0.


def test_clovaai():
    theirs = randomised(ClovaaiReXNet())
    state = theirs.state_dict()
    assert len(state) == 413
    assert state['output.1.weight'].shape == (1000, 1280, 1, 1)
    net, report = loaded(ReXNet(arch='1.0', out_indices=range(6)), state)
    assert report.format.name == 'rexnet-clovaai'
    assert report.dropped == ('output.1.weight', 'output.1.bias')
    x = image()
    with torch.no_grad():
        check_maps(net(x), theirs(x))


def unet():
    from mmdense.models.heads.rexunet import ReXUNetHead

    encoder = ReXNet(taps='unet')
    head = ReXUNetHead(in_channels=encoder.out_channels, num_classes=2, out_channels=1)
    return nn.ModuleDict(dict(backbone=encoder, decode_head=head))


# The released detectors and segmentors: names of mmdet 2.25 and mmseg 0.22.

MAPS = (256, 440, 744, 1040)


def affine(name, *shape):
    return {f'{name}.weight': shape, f'{name}.bias': shape[:1]}


def conv_bn(name, out, inp, size):
    statistics = {f'{name}.bn.{k}': (out,) for k in ('running_mean', 'running_var')}
    return {
        f'{name}.conv.weight': (out, inp, size, size),
        **affine(f'{name}.bn', out),
        **statistics,
        f'{name}.bn.num_batches_tracked': (),
    }


def rdnet_tiny(stem, stage, head=False):
    """Return names and shapes of RDNet-T, given how its outer modules are called."""
    channels = 64
    shapes = {**affine(f'{stem}.0', channels, 3, 4, 4), **affine(f'{stem}.1', channels)}
    for i, growth in enumerate((64, 104, 128, 128, 128, 128, 224)):
        at = stage.format(i)
        if i:
            size = 2 if i in (1, 2, 6) else 1
            half = channels // 2 // 8 * 8
            shapes |= affine(f'{at}.0', channels) | affine(f'{at}.1', half, channels, size, size)
            channels = half
        for b in range(3):
            block = f'{at}.{2 if i else 0}.dense_block{b}'
            layer = f'{block}.layers.layers'
            shapes[f'{block}.gamma'] = (growth,)
            shapes |= affine(f'{layer}.0', channels, 1, 7, 7) | affine(f'{layer}.1', channels)
            shapes |= affine(f'{layer}.2', 4 * channels, channels, 1, 1)
            shapes |= affine(f'{layer}.4', growth, 4 * channels, 1, 1)
            if i >= 2:
                shapes |= affine(f'{layer}.5.fc', growth, growth, 1, 1)
            channels += growth
    if head:
        shapes |= affine('head.norm', channels) | affine('head.fc', 1000, channels)
    return shapes


EXTRACTOR = rdnet_tiny('backbone.timm_model.stem.stem', 'backbone.timm_model.dense_stages_{}')


def cascade():
    shapes = dict(EXTRACTOR)
    for i, channels in enumerate(MAPS):
        shapes |= affine(f'backbone.norm_modules.{i}', channels)
        shapes |= conv_bn(f'neck.lateral_convs.{i}', 256, channels, 1)
        shapes |= conv_bn(f'neck.fpn_convs.{i}', 256, 256, 3)
    shapes |= affine('rpn_head.rpn_conv', 256, 256, 3, 3)
    shapes |= affine('rpn_head.rpn_cls', 3, 256, 1, 1) | affine('rpn_head.rpn_reg', 12, 256, 1, 1)
    for stage in range(3):
        box, mask = (f'roi_head.{head}.{stage}' for head in ('bbox_head', 'mask_head'))
        shapes |= affine(f'{box}.fc_cls', 81, 1024) | affine(f'{box}.fc_reg', 320, 1024)
        for i in range(4):
            shapes |= conv_bn(f'{box}.shared_convs.{i}', 256, 256, 3)
            shapes |= affine(f'{mask}.convs.{i}.conv', 256, 256, 3, 3)
        shapes |= affine(f'{box}.shared_fcs.0', 1024, 256 * 7 * 7)
        shapes |= affine(f'{mask}.upsample', 256, 256, 2, 2)
        shapes |= affine(f'{mask}.conv_logits', 80, 256, 1, 1)
    return shapes


def upernet():
    shapes = dict(EXTRACTOR)
    shapes |= affine('decode_head.conv_seg', 150, 512, 1, 1)
    for i in range(4):
        shapes |= conv_bn(f'decode_head.psp_modules.{i}.1', 512, MAPS[-1], 1)
    shapes |= conv_bn('decode_head.bottleneck', 512, MAPS[-1] + 4 * 512, 3)
    for i in range(3):
        shapes |= conv_bn(f'decode_head.lateral_convs.{i}', 512, MAPS[i], 1)
        shapes |= conv_bn(f'decode_head.fpn_convs.{i}', 512, 512, 3)
    shapes |= conv_bn('decode_head.fpn_bottleneck', 512, 4 * 512, 3)
    shapes |= affine('auxiliary_head.conv_seg', 150, 256, 1, 1)
    return shapes | conv_bn('auxiliary_head.convs.0', 256, MAPS[2], 3)


RELEASED = dict(mmdet=cascade, mmseg=upernet)


def numbered(shapes):
    """Return a state dict whose i-th tensor is i throughout, and takes no memory."""
    return {
        name: torch.tensor(i if name.endswith('tracked') else float(i)).expand(shape)
        for i, (name, shape) in enumerate(shapes.items(), 1)
    }


def averages(state):
    """Return what mmcv's EMAHook adds: a buffer per parameter."""
    buffers = ('running_mean', 'running_var', 'num_batches_tracked')
    return {
        f'ema_{name.replace(".", "_")}': torch.tensor(-1.0).expand(value.shape)
        for name, value in state.items()
        if not name.endswith(buffers)
    }


def check_landed(net, state, names):
    """Check that each tensor of ours is filled with the number of theirs."""
    values = net.state_dict()
    assert set(names) == set(values)
    for ours, theirs in names.items():
        assert (values[ours] == state[theirs].flatten()[0]).all(), (ours, theirs)


def released_names(state):
    """Return their name for each of ours."""
    spelled = (
        ('.timm_model.stem.stem.', '.stem.'),
        ('.timm_model.dense_stages_', '.dense_stages.'),
        ('.norm_modules.', '.output_norms.'),
    )
    names = {}
    for theirs in state:
        ours = theirs
        for before, after in spelled:
            ours = ours.replace(before, after)
        names[ours] = theirs
    return names


def build(scope):
    pytest.importorskip(scope)
    init_default_scope(scope)
    config = Config.fromfile(ROOT / 'configs' / RECIPES[scope])
    config.model.backbone.init_cfg = None
    return MODELS.build(config.model)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_released_models_load_whole(scope):
    state = numbered(RELEASED[scope]())
    ema = averages(state)
    assert 'ema_backbone_timm_model_dense_stages_6_2_dense_block2_gamma' in ema
    names = released_names(state)
    assert names['backbone.stem.1.bias'] == 'backbone.timm_model.stem.stem.1.bias'
    net = build(scope)
    for extra in ({}, ema):
        for value in net.state_dict().values():
            value.zero_()
        _, report = load_into(net, dict(meta={}, state_dict={**state, **extra}, optimizer={}))
        check_full(report)
        assert report.format.name == 'rdnet-mmlab'
        assert list(report.dropped) == list(extra)
        assert set(report.loaded) == set(net.state_dict())
        check_landed(net, state, names)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_released_models_as_backbone_weights(scope, tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'REPEATED', 1e6)  # numbers that are repeated make a small file
    state = numbered(RELEASED[scope]())
    normed = scope == 'mmdet'
    file = tmp_path / 'released.pth'
    torch.save(dict(meta={}, state_dict={**state, **averages(state)}), file)
    names = {
        ours.removeprefix('backbone.'): theirs
        for ours, theirs in released_names(state).items()
        if ours.startswith('backbone.')
    }
    net = RDNet(
        output_norm=normed,
        init_cfg=dict(type='Pretrained', checkpoint=str(file), prefix='backbone.'),
    )
    net.init_weights()
    check_landed(net, state, names)


def test_output_norms_of_a_detector_are_left_over_in_other_backbones():
    net = on_meta(RDNet)
    _, report = load_into(net, numbered(cascade()), prefix='backbone.')
    assert report.share() == 1.0
    expected = [name for i in range(4) for name in affine(f'output_norms.{i}', 1)]
    assert list(report.unexpected) == expected


def test_output_norms_start_afresh_beside_a_segmentor():
    net = RDNet(output_norm=True)
    _, report = load_into(net, numbered(upernet()), prefix='backbone.')
    check_full(report)
    assert all((norm.weight == 1).all() for norm in net.output_norms.values())


def test_a_detector_without_its_output_norms_is_incomplete():
    state = {k: v for k, v in state_of('cascade').items() if '.norm_modules.' not in k}
    assert load_into(network_of('cascade'), state)[1].share() < 1


# Samples of every format, on the meta device where values don't matter.


def described_condensenetv2(form):
    """Our own names are the released ones; what is behind the features, by the facts page."""
    net = CondenseNetV2(arch=TINY, form=form, out_indices=None)
    last = net.out_channels[-1]
    shapes = affine('features.norm_last', last)
    shapes |= {f'features.norm_last.{k}': (last,) for k in ('running_mean', 'running_var')}
    shapes |= {f'features.se_last.fc.{i}.weight': (1, 1) for i in (0, 2)}
    shapes |= affine('fc', 8, last) | affine('classifier', 1000, 8)
    return {**net.state_dict(), **numbered(shapes)}


def meta_state(make, *args, **options):
    return on_meta(make, *args, **options).state_dict()


# Sample -> format, what makes it, and a network of ours that it fills.
SAMPLES = dict(
    rdnet=('rdnet', lambda: meta_state(timm.create_model, 'rdnet_tiny'), RDNet),
    rdnet_features=(
        'rdnet',
        lambda: meta_state(timm.create_model, 'rdnet_tiny', features_only=True),
        RDNet,
    ),
    naver=('rdnet', lambda: numbered(rdnet_tiny('stem.stem', 'dense_stages.{}', True)), RDNet),
    cascade=('rdnet-mmlab', lambda: numbered(cascade()), lambda: build('mmdet')),
    upernet=('rdnet-mmlab', lambda: numbered(upernet()), lambda: build('mmseg')),
    densenet=('densenet', lambda: meta_state(torchvision.models.densenet121), DenseNet),
    densenet_features=(
        'densenet',
        lambda: meta_state(timm.create_model, 'densenet121', features_only=True),
        DenseNet,
    ),
    densenet_2017=(
        'densenet',
        lambda: named_as_in_2017(meta_state(torchvision.models.densenet121)),
        DenseNet,
    ),
    mmpretrain=('densenet-mmpretrain', lambda: meta_state(MMPretrainDenseNet), DenseNet),
    condensenetv2_learned=(
        'condensenetv2',
        lambda: described_condensenetv2('learned'),
        lambda: CondenseNetV2(arch=TINY, out_indices=None),
    ),
    condensenetv2_condensed=(
        'condensenetv2',
        lambda: described_condensenetv2('condensed'),
        lambda: CondenseNetV2(arch=TINY, form='condensed', out_indices=None),
    ),
    rexnet=(
        'rexnet',
        lambda: meta_state(timm.create_model, 'rexnet_100'),
        lambda: ReXNet(out_indices=range(6)),
    ),
    rexnet_features=(
        'rexnet',
        lambda: meta_state(timm.create_model, 'rexnet_100', features_only=True),
        ReXNet,
    ),
    clovaai=(
        'rexnet-clovaai',
        lambda: meta_state(ClovaaiReXNet),
        lambda: ReXNet(out_indices=range(6)),
    ),
    unet=('rexnet-unet', lambda: meta_state(Fork), unet),
)
every_sample = pytest.mark.parametrize('sample', SAMPLES)


@cache
def state_of(sample):
    return SAMPLES[sample][1]()


def network_of(sample):
    if sample in ('cascade', 'upernet', 'unet'):
        pytest.importorskip('mmdet' if sample == 'cascade' else 'mmseg')
    if sample.startswith('condensenetv2'):
        return SAMPLES[sample][2]()
    return on_meta(SAMPLES[sample][2])


def test_every_format_has_a_sample():
    assert {known for known, *_ in SAMPLES.values()} == set(FORMATS)


@every_sample
def test_a_sample_is_of_one_format(sample):
    known, state = SAMPLES[sample][0], state_of(sample)
    assert [name for name, f in FORMATS.items() if f.recognises(state)] == [known]
    assert recognise(state) is FORMATS[known]


@every_sample
def test_the_same_tensors_and_nothing_changed(sample):
    state = dict(state_of(sample))
    before = [(key, value, value._version) for key, value in state.items()]
    weights = convert(state)
    load_into(network_of(sample), dict(state_dict=state))
    after = [(key, value, value._version) for key, value in state.items()]
    for (key, value, version), (old_key, old, old_version) in zip(after, before, strict=True):
        assert (key, version) == (old_key, old_version)
        assert value is old
    given = {id(value) for value in state.values()}
    # Those are changed in type where a released file has floats, and so are always copies.
    copied = ('_mask', '_count', '_stage')
    for name, value in weights.items():
        assert id(value) in given or name.endswith(copied), name


CLASSIFIER = re.compile(r'(?:head|output|fc|classifier|features\.(?:norm|se)_last)\.')


def renamings(key):
    yield key + 'x'
    yield key[:-1]
    for digits in re.finditer(r'\d+', key):
        yield f'{key[: digits.start()]}99{key[digits.end() :]}'


@every_sample
def test_a_renamed_key_is_reported(sample):
    """Keys are mapped one by one: beside an anchor, which bears the sign, each is tried alone."""
    known, state = FORMATS[SAMPLES[sample][0]], state_of(sample)
    anchors = [k for k in state if re.match(known.sign, k)]
    if known.name == 'condensenetv2':  # whose form is told by masks or indices
        anchors = [k for k in anchors if k.endswith(('_mask', '.sfr.index'))]

    def others(anchor, key):
        return convert({anchor: state[anchor], key: state[original]}).keys() - {ours[anchor]}

    ours = {k: next(iter(convert({k: state[k]}))) for k in anchors[:2]}
    silent = []
    for original in state:
        anchor = next(k for k in ours if k != original)
        name = others(anchor, original)
        assert len(name) == (0 if CLASSIFIER.match(original) else 1)
        for renamed in renamings(original):
            try:
                # A name that the network doesn't want leaves the wanted one missing.
                reported = others(anchor, renamed) != name
            except ValueError as error:
                reported = renamed in str(error)
            if not reported:
                silent.append(f'{original} -> {renamed}')
    assert silent == []


@every_sample
def test_the_report_names_what_is_dropped_or_renamed(sample):
    state, net = state_of(sample), network_of(sample)
    weights, report = load_into(net, state)
    check_full(report)
    keys = list(state)
    for key in {*keys[:: len(keys) // 15], keys[0], keys[-1]}:
        without = {k: v for k, v in state.items() if k != key}
        left, report = load_into(net, without)
        name = tuple(weights.keys() - left.keys())
        assert len(name) == (0 if CLASSIFIER.match(key) else 1)
        # As in files of old: torch asks for no such counter.
        missing = () if key.endswith('num_batches_tracked') else name
        assert report.missing == missing, key
        assert (report.share() < 1) == bool(missing)
        assert report.unexpected == ()
        _, report = load_into(net, {**without, f'{key}x': state[key]})
        assert report.missing == missing, key
        assert len(report.unexpected) == 1, key


@every_sample
def test_leftovers_are_refused(sample):
    known, state = SAMPLES[sample][0], state_of(sample)
    extra = {**state, 'backbone.extra.weight': torch.zeros(1)}
    with pytest.raises(ValueError, match=r"^1 keys are not of .*\['backbone.extra.weight'\]$"):
        convert(extra)
    if known != 'condensenetv2':  # whose form is asked for first
        with pytest.raises(ValueError, match=rf'^{len(state)} keys are not of'):
            convert({f'net.{k}': v for k, v in state.items()}, known)


LAYER = 'features.denseblock1.denselayer1.'
BLOCK = 'dense_stages.0.0.dense_block0.'
SIGNS = {
    'rdnet': 'dense_stages.1.0.weight',
    'rdnet-mmlab': 'backbone.timm_model.dense_stages_1.0.weight',
    'densenet': 'features.denseblock1.denselayer2.conv1.weight',
    'densenet-mmpretrain': 'backbone.stages.1.block.0.norm1.weight',
    'rexnet': 'features.1.conv_dw.bn.weight',
}


@pytest.mark.parametrize(
    ('known', 'first', 'second', 'ours'),
    [
        ('rdnet', 'stem.0.weight', 'stem_0.weight', 'stem.0.weight'),
        ('rdnet', 'stem.stem.1.bias', 'timm_model.stem_1.bias', 'stem.1.bias'),
        ('rdnet', f'{BLOCK}gamma', 'dense_stages_0.0.dense_block0.gamma', f'{BLOCK}gamma'),
        ('rdnet', 'norm_modules.0.bias', 'output_norms.0.bias', 'output_norms.0.bias'),
        (
            'rdnet-mmlab',
            'backbone.timm_model.stem_0.bias',
            'backbone.timm_model.stem.stem.0.bias',
            'backbone.stem.0.bias',
        ),
        ('densenet', f'{LAYER}norm1.bias', f'{LAYER}norm.1.bias', f'{LAYER}norm1.bias'),
        ('densenet', 'features.norm5.bias', 'features_norm5.bias', 'features.norm5.bias'),
        (
            'densenet-mmpretrain',
            'stem.0.weight',
            'backbone.stem.0.weight',
            'features.conv0.weight',
        ),
        (
            'densenet-mmpretrain',
            'backbone.transitions.3.0.bias',
            'transitions.3.0.bias',
            'features.norm5.bias',
        ),
        ('rexnet', 'stem.conv.weight', 'stem_conv.weight', 'stem.conv.weight'),
        ('rexnet', 'features.0.se.bn.bias', 'features_0.se.bn.bias', 'features.0.se.bn.bias'),
    ],
)
def test_two_keys_for_one_name_are_refused(known, first, second, ours):
    tensor = torch.zeros(1)
    for key in (first, second):
        state = {SIGNS[known]: tensor, key: tensor}
        assert recognise(state).name == known
        assert ours in convert(state)
    with pytest.raises(ValueError, match=f'^{first} and {second} are both {ours}$'):
        convert({SIGNS[known]: tensor, first: tensor, second: tensor})


def test_two_keys_for_one_name_stop_a_load():
    state = {**state_of('densenet'), LAYER + 'norm.1.weight': torch.zeros(64)}
    with pytest.raises(UserError, match='are both features.denseblock1.denselayer1.norm1.weight'):
        load_into(on_meta(DenseNet), state)


# Ours are known as well.

SMALL = dict(growth_rate=4, layers=(1, 2, 1))
OWN = dict(
    rdnet=('rdnet', RDNet),
    rdnet_normed=('rdnet', lambda: RDNet(output_norm=True)),
    rdnet_first=('rdnet', lambda: RDNet(out_indices=(0,), output_norm=True)),
    densenet=('densenet', DenseNet),
    densenet_activated=('densenet', lambda: DenseNet(tap='activated', out_indices=(0, 1))),
    densenet_deep=('densenet', lambda: DenseNet(arch=SMALL, stem='deep')),
    densenet_cifar=('densenet', lambda: DenseNet(arch=SMALL, stem='cifar', bottleneck=False)),
    condensenetv2=('condensenetv2', lambda: CondenseNetV2(arch=TINY, out_indices=None)),
    condensed=(
        'condensenetv2',
        lambda: CondenseNetV2(arch=TINY, form='condensed', out_indices=None),
    ),
    rexnet=('rexnet', ReXNet),
    rexnet_unet=('rexnet', lambda: ReXNet(taps='unet')),
    rexnet_first=('rexnet', lambda: ReXNet(out_indices=(0,))),
)


@pytest.mark.parametrize('own', OWN)
def test_ours_are_mapped_onto_themselves(own):
    known, make = OWN[own]
    state = make().state_dict()
    assert [name for name, f in FORMATS.items() if f.recognises(state)] == [known]
    mapped = FORMATS[known].map(state)
    assert (mapped.dropped, mapped.unknown) == ([], [])
    assert list(mapped.weights) == list(state)
    for name, value in mapped.weights.items():
        assert value.dtype == state[name].dtype
        if value.is_floating_point() or name.endswith('num_batches_tracked'):
            assert value is state[name], name
        else:  # CondenseNetV2's masks and counters
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    'names',
    [
        list(timm.create_model('resnet18').state_dict()),
        ['backbone.stem.0.weight', 'backbone.dense_stages.0.0.dense_block0.gamma'],
        ['weight', 'bias'],
        ['features.0.weight', 'classifier.1.weight'],
        ['xdense_stages.0.0.dense_block0.gamma', 'my.features.0.out.0.weight'],
    ],
)
def test_other_names_are_of_no_format(names):
    state = {name: torch.zeros(1) for name in names}
    assert recognise(state) is None
    with pytest.raises(ValueError, match=f'keys such as .*{names[0]}.* are of no known format'):
        convert(state)


def test_no_such_format():
    with pytest.raises(ValueError, match="no format 'resnet'"):
        convert(state_of('rdnet'), 'resnet')


# Where weights are in a checkpoint.

HOLDERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')


def states(number):
    return [{'weight': torch.full((1,), float(i))} for i in range(number)]


@pytest.mark.parametrize('first', range(4))
@pytest.mark.parametrize('empty', [None, {}, 'absent'])
def test_averages_come_first(first, empty):
    held = dict(zip(HOLDERS, states(4), strict=True))
    for holder in HOLDERS[:first]:
        if empty == 'absent':
            del held[holder]
        else:
            held[holder] = empty
    checkpoint = dict(epoch=3, optimizer={}, **dict(reversed(held.items())))
    before = {k: dict(v) if isinstance(v, dict) else v for k, v in checkpoint.items()}
    assert state_dict_of(checkpoint)['weight'].item() == first
    assert state_dict_of(checkpoint)['weight'] is held[HOLDERS[first]]['weight']
    assert checkpoint == before


@pytest.mark.parametrize(
    'prefix',
    [
        '',
        'module.',
        '_orig_mod.',
        'module._orig_mod.',
        '_orig_mod.module.',
    ],
)
@pytest.mark.parametrize('holder', [None, 'state_dict'])
def test_wrappers_are_taken_off(prefix, holder):
    state = state_of('clovaai')
    wrapped = {prefix + k: v for k, v in state.items()}
    taken = state_dict_of({holder: wrapped} if holder else wrapped)
    assert list(taken) == list(state)
    assert all(taken[k] is v for k, v in state.items())
    assert list(wrapped)[0] == prefix + list(state)[0]


def test_a_compiled_part_is_named_as_it_was():
    state = {'backbone._orig_mod.stem.0.weight': torch.zeros(1), 'neck.bias': torch.zeros(1)}
    assert list(state_dict_of(state)) == ['backbone.stem.0.weight', 'neck.bias']


def test_an_unknown_key_with_a_name_of_ours_is_no_leftover_that_hides():
    state = {**state_of('clovaai'), 'stem.conv.weight': torch.zeros(7)}
    with pytest.raises(UserError, match='features.0.weight and stem.conv.weight are both'):
        load_into(network_of('clovaai'), state)


def test_a_prefix_of_some_keys_is_no_wrapper():
    state = {'module.weight': torch.zeros(1), 'weight': torch.zeros(1), 'model': torch.zeros(2)}
    assert list(state_dict_of(state)) == list(state)


@pytest.mark.parametrize(
    ('checkpoint', 'message'),
    [
        (None, 'a NoneType is no checkpoint'),
        ([torch.zeros(1)], 'a list is no checkpoint'),
        ({}, 'no state dict: empty'),
        ({0: torch.zeros(2)}, 'no state dict: 0 is of type Tensor'),
        (dict(state_dict={}), "no state dict: 'state_dict' is of type dict"),
        (dict(epoch=3), "no state dict: 'epoch' is of type int"),
        (dict(model=dict(weight=[1.0])), "no state dict: 'weight' is of type list"),
        (dict(state_dict=dict(weight=torch.zeros(1), epoch=3)), "'epoch' is of type int"),
    ],
)
def test_no_weights(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        state_dict_of(checkpoint)
    with pytest.raises(UserError, match=message):
        load_into(nn.Linear(1, 1), checkpoint)
