"""The key maps: the same feature maps as published networks, and no key that goes unnoticed.

timm, torchvision and mmpretrain are installed; ``published.py`` rebuilds the other networks.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import timm
import torch
import torchvision
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.nn import functional as F

import published
from checkpoints import assert_same, error_of
from mmdense.models import CondenseNetV2, DenseNet, RDNet, ReXNet
from mmdense.weights.formats import FORMATS, convert, recognise, state_dict_of
from mmdense.weights.loading import load_into
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
TINY = dict(layers=(1, 1, 1, 1, 2), growth=(4, 4, 4, 8, 4), groups=4)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# Samples of all formats


@dataclass
class Sample:
    """Published weights.

    Attributes:
        format: Name of their format.
        source: Makes the published network, or the state dict.
        net: Makes the network of mmdense that they fill.
        run: The published network's feature maps of an image.
        rename: Changes the state dict.
    """

    format: str
    source: Callable
    net: Callable
    run: Callable | None = None
    rename: Callable = dict


def from_timm(name, **options):
    return lambda: timm.create_model(name, **options)


def intermediates(net, x):
    indices = [i for i, info in enumerate(net.feature_info) if info['reduction'] >= 4]
    return net.forward_intermediates(x, indices=indices, intermediates_only=True)


def features(net, x):
    return net(x)[-4:]


def outputs(net, x):
    return net(x)


def last_stage(net, x):
    """mmpretrain's other feature maps are those after transitions."""
    return [None, None, None, *net.backbone(x)]


def torchvision_blocks(net, x):
    blocks = {}
    for number in (1, 2, 3):
        module = net.features.get_submodule(f'denseblock{number}')
        module.register_forward_hook(lambda _, __, y, number=number: blocks.update({number: y}))
    last = F.relu(net.features(x))
    return [*blocks.values(), last]


def named_as_in_2017(state):
    return {
        re.sub(r'(denselayer\d+\.(?:norm|conv))([12])\.', r'\1.\2.', key): value
        for key, value in state.items()
        if not key.endswith('num_batches_tracked')
    }


def named_as_by_gpleiss(state):
    return {key.replace('norm5', 'norm_final'): value for key, value in state.items()}


def named_as_by_naver(state):
    return {re.sub(r'^stem\.', 'stem.stem.', key): value for key, value in state.items()}


def without_backbone(state):
    return {key.removeprefix('backbone.'): value for key, value in state.items()}


def numbered(shapes):
    """Return a state dict whose i-th tensor is i throughout, and takes no memory."""
    return {
        name: torch.tensor(i if name.endswith('tracked') else float(i)).expand(shape)
        for i, (name, shape) in enumerate(shapes.items(), 1)
    }


def build(scope):
    pytest.importorskip(scope)
    init_default_scope(scope)
    config = Config.fromfile(ROOT / 'configs' / RECIPES[scope])
    config.model.backbone.init_cfg = None
    return MODELS.build(config.model)


def unet():
    pytest.importorskip('mmseg')
    from mmdense.models.heads.rexunet import ReXUNetHead

    encoder = ReXNet(taps='unet')
    head = ReXUNetHead(in_channels=encoder.out_channels, num_classes=2, out_channels=1)
    return nn.ModuleDict(dict(backbone=encoder, decode_head=head))


def condensenetv2(form, arch=TINY):
    return lambda: CondenseNetV2(arch=arch, form=form, out_indices=None)


def released_condensenetv2(form, arch='tiny'):
    return lambda: published.CondenseNetV2(arch, form)


SAMPLES = dict(
    rdnet=Sample('rdnet', from_timm('rdnet_tiny'), RDNet, intermediates),
    rdnet_features=Sample('rdnet', from_timm('rdnet_tiny', features_only=True), RDNet, features),
    naver=Sample('rdnet', from_timm('rdnet_tiny'), RDNet, intermediates, named_as_by_naver),
    cascade=Sample('rdnet-mmlab', lambda: numbered(published.cascade()), lambda: build('mmdet')),
    upernet=Sample('rdnet-mmlab', lambda: numbered(published.upernet()), lambda: build('mmseg')),
    densenet=Sample('densenet', from_timm('densenet121'), DenseNet, intermediates),
    densenet_features=Sample(
        'densenet', from_timm('densenet121', features_only=True), DenseNet, features
    ),
    torchvision=Sample('densenet', torchvision.models.densenet121, DenseNet, torchvision_blocks),
    torchvision_2017=Sample(
        'densenet', torchvision.models.densenet121, DenseNet, torchvision_blocks, named_as_in_2017
    ),
    gpleiss=Sample(
        'densenet',
        torchvision.models.densenet121,
        DenseNet,
        torchvision_blocks,
        named_as_by_gpleiss,
    ),
    mmpretrain=Sample('densenet-mmpretrain', published.mmpretrain_densenet, DenseNet, last_stage),
    mmpretrain_backbone=Sample(
        'densenet-mmpretrain', published.mmpretrain_densenet, DenseNet, last_stage, without_backbone
    ),
    condensenetv2_learned=Sample(
        'condensenetv2', released_condensenetv2('learned'), condensenetv2('learned'), outputs
    ),
    condensenetv2_condensed=Sample(
        'condensenetv2', released_condensenetv2('condensed'), condensenetv2('condensed'), outputs
    ),
    rexnet=Sample(
        'rexnet',
        from_timm('rexnet_100'),
        lambda: ReXNet(out_indices=range(1, 6)),
        lambda net, x: [*intermediates(net, x), net.forward_features(x)],
    ),
    rexnet_features=Sample('rexnet', from_timm('rexnet_100', features_only=True), ReXNet, features),
    clovaai=Sample(
        'rexnet-clovaai', published.ClovaaiReXNet, lambda: ReXNet(out_indices=range(6)), outputs
    ),
    lite=Sample(
        'rexnet-lite',
        lambda: published.ClovaaiReXNet('1.0'),
        lambda: ReXNet(arch='lite-1.0', out_indices=range(6)),
        outputs,
    ),
    unet=Sample('rexnet-unet', published.ReXUNet, unet, outputs),
)
CLASSIFIER = re.compile(r'(?:head|output|fc|classifier|features\.(?:norm|se)_last)\.')
every_sample = pytest.mark.parametrize('sample', SAMPLES)


@cache
def state_of(sample):
    """Return a sample's state dict, on the meta device where values don't matter."""
    with torch.device('cpu' if 'condensenetv2' in sample else 'meta'):
        source = SAMPLES[sample].source()
    return SAMPLES[sample].rename(source if isinstance(source, dict) else source.state_dict())


@cache
def net_of(sample):
    with torch.device('cpu' if 'condensenetv2' in sample else 'meta'):
        return SAMPLES[sample].net()


def check_full(report):
    faults = (report.missing, report.unexpected, report.wrong_shape)
    assert not any(faults), report.table()
    assert report.share() == 1.0
    assert report.loaded


# The same feature maps


def randomised(net):
    """Give norms, biases and scales random values: fresh ones are alike. In double precision."""
    if isinstance(net, nn.Module):
        for name, value in net.state_dict().items():
            if value.ndim == 1:
                low = 0.5 if name.endswith(('weight', 'running_var', 'gamma')) else -0.5
                value.uniform_(low, low + 1)
        net.double().eval()
    return net


@torch.no_grad()
def check_feature_maps(feature_maps, expected):
    for x, y in zip(feature_maps, expected, strict=True):
        if y is not None:
            assert x.shape == y.shape
            assert y.std() > 0
            assert (x - y).abs().max() <= 1e-9 * y.abs().max()


@pytest.mark.parametrize('sample', [name for name, sample in SAMPLES.items() if sample.run])
@torch.no_grad()
def test_feature_maps_are_equal(sample):
    kind = SAMPLES[sample]
    source, net = randomised(kind.source()), kind.net()
    state = kind.rename(source.state_dict())
    _, report = load_into(net, dict(state_dict=state, meta={}))
    check_full(report)
    assert report.format.name == kind.format
    assert list(report.dropped) == [key for key in state if CLASSIFIER.match(key)]
    net.double().eval()
    x = torch.randn(2, 3, 64, 96).double()
    feature_maps = net['decode_head'](net['backbone'](x)) if sample == 'unet' else net(x)
    check_feature_maps(feature_maps, kind.run(source, x))


def test_descriptions():
    """The rebuilt networks have as many tensors as the published ones."""
    assert {*published.rdnet_tiny('stem.stem', 'dense_stages.{}', True)} == {*state_of('naver')}
    assert len(state_of('clovaai')) == 413
    assert state_of('clovaai')['output.1.weight'].shape == (1000, 1280, 1, 1)
    assert len(state_of('lite')) == 303
    assert len(state_of('unet')) == 547
    assert sum(value.numel() for key, value in state_of('unet').items() if not is_buffer(key)) == (
        4_009_167
    )


def is_buffer(key):
    return key.endswith(('running_mean', 'running_var', 'num_batches_tracked'))


# Keys


def test_every_format_has_a_sample():
    assert {sample.format for sample in SAMPLES.values()} == set(FORMATS)


@every_sample
def test_a_sample_is_of_one_format_and_keeps_its_tensors(sample):
    name, state = SAMPLES[sample].format, dict(state_of(sample))
    assert [known for known, f in FORMATS.items() if f.recognises(state)] == [name]
    assert recognise(state) is FORMATS[name]
    before = [(key, id(value), value._version) for key, value in state.items()]
    weights = convert(state)
    load_into(net_of(sample), dict(state_dict=state))
    assert [(key, id(value), value._version) for key, value in state.items()] == before
    ids = {id(value) for value in state.values()}
    # CondenseNetV2's masks, counters and indices change in type.
    changed = ('_mask', '_count', '_stage', 'sfr.index')
    assert all(id(v) in ids or key.endswith(changed) for key, v in weights.items())
    with pytest.raises(ValueError, match=r"^1 keys are not of .*\['backbone.extra.weight'\]$"):
        convert({**state, 'backbone.extra.weight': torch.zeros(1)})
    if name != 'condensenetv2':  # which looks for masks or indices first
        with pytest.raises(ValueError, match=rf'^{len(state)} keys are not of'):
            convert({f'net.{k}': v for k, v in state.items()}, name)


def renamings(key):
    yield key + 'x'
    yield key[:-1]
    for digits in re.finditer(r'\d+', key):
        yield f'{key[: digits.start()]}99{key[digits.end() :]}'


@every_sample
def test_every_renamed_key_is_reported(sample):
    """Keys are mapped one by one: each is tried beside an anchor, which has the format's sign."""
    known, state = FORMATS[SAMPLES[sample].format], state_of(sample)
    anchors = [k for k in state if re.match(known.sign, k)]
    if known.name == 'condensenetv2':  # its form is recognised by masks or indices
        anchors = [k for k in anchors if k.endswith(('_mask', '.sfr.index'))]
    targets = {k: next(iter(convert({k: state[k]}))) for k in anchors[:2]}

    def converted(anchor, key):
        return convert({anchor: state[anchor], key: state[original]}).keys() - {targets[anchor]}

    silent = []
    for original in state:
        anchor = next(k for k in targets if k != original)
        name = converted(anchor, original)
        assert len(name) == (0 if CLASSIFIER.match(original) else 1)
        for renamed in renamings(original):
            try:
                # A name that the network doesn't expect leaves the expected one missing.
                reported = converted(anchor, renamed) != name
            except ValueError as error:
                reported = renamed in str(error)
            if not reported:
                silent.append(f'{original} -> {renamed}')
    assert silent == []


LAYER = 'features.denseblock1.denselayer1.'
BLOCK = 'dense_stages.0.0.dense_block0.'
SIGNS = {
    'rdnet': 'dense_stages.1.0.weight',
    'densenet': 'features.denseblock1.denselayer2.conv1.weight',
    'densenet-mmpretrain': 'backbone.stages.1.block.0.norm1.weight',
    'rexnet': 'features.1.conv_dw.bn.weight',
}


@pytest.mark.parametrize(
    ('known', 'first', 'second', 'name'),
    [
        ('rdnet', 'stem.stem.1.bias', 'timm_model.stem_1.bias', 'stem.1.bias'),
        ('rdnet', f'{BLOCK}gamma', 'dense_stages_0.0.dense_block0.gamma', f'{BLOCK}gamma'),
        ('rdnet', 'norm_modules.0.bias', 'output_norms.0.bias', 'output_norms.0.bias'),
        ('densenet', f'{LAYER}norm1.bias', f'{LAYER}norm.1.bias', f'{LAYER}norm1.bias'),
        (
            'densenet-mmpretrain',
            'backbone.transitions.3.0.bias',
            'transitions.3.0.bias',
            'features.norm5.bias',
        ),
        ('rexnet', 'features.0.se.bn.bias', 'features_0.se.bn.bias', 'features.0.se.bn.bias'),
    ],
)
def test_two_keys_for_one_name_are_refused(known, first, second, name):
    tensor = torch.zeros(1)
    for key in (first, second):
        state = {SIGNS[known]: tensor, key: tensor}
        assert recognise(state).name == known
        assert name in convert(state)
    with pytest.raises(ValueError, match=f'^{first} and {second} are both {name}$'):
        convert({SIGNS[known]: tensor, first: tensor, second: tensor})


def test_two_keys_for_one_name_stop_a_load():
    state = {**state_of('clovaai'), 'stem.conv.weight': torch.zeros(7)}  # mmdense's name
    text = error_of(load_into, net_of('clovaai'), state)
    assert 'features.0.weight and stem.conv.weight are both' in text


# The released RDNet detectors and segmentors


def averages(state):
    """Return the buffers that mmcv's EMAHook adds, one per parameter."""
    return {
        f'ema_{name.replace(".", "_")}': torch.tensor(-1.0).expand(value.shape)
        for name, value in state.items()
        if not is_buffer(name)
    }


def released_names(state):
    """Return mmdense's names -> the released ones."""
    changes = (
        ('.timm_model.stem.stem.', '.stem.'),
        ('.timm_model.dense_stages_', '.dense_stages.'),
        ('.norm_modules.', '.output_norms.'),
    )
    names = {}
    for released in state:
        name = released
        for before, after in changes:
            name = name.replace(before, after)
        names[name] = released
    return names


def check_numbers(net, state, names):
    """Check that each tensor of the network has the number of its source."""
    values = net.state_dict()
    assert set(names) == set(values)
    for name, released in names.items():
        assert (values[name] == state[released].flatten()[0]).all(), (name, released)


@pytest.mark.parametrize('scope', RECIPES)
def test_released_models(scope, tmp_path):
    """Each tensor lands in its place: in the complete model, and by init_cfg in a backbone."""
    state = numbered(published.RELEASED[scope]())
    ema = averages(state)
    assert 'ema_backbone_timm_model_dense_stages_6_2_dense_block2_gamma' in ema
    checkpoint = dict(meta={}, state_dict={**state, **ema}, optimizer={})
    names = released_names(state)
    assert names['backbone.stem.1.bias'] == 'backbone.timm_model.stem.stem.1.bias'
    net = build(scope)
    _, report = load_into(net, checkpoint)
    check_full(report)
    assert list(report.dropped) == list(ema)
    check_numbers(net, state, names)
    file = tmp_path / 'released.pth'
    torch.save(checkpoint, file)
    init = dict(type='Pretrained', checkpoint=str(file), prefix='backbone.')
    backbone = RDNet(output_norm=scope == 'mmdet', init_cfg=init)
    backbone.init_weights()
    backbone_names = {n.removeprefix('backbone.'): r for n, r in names.items() if 'backbone.' in n}
    check_numbers(backbone, state, backbone_names)


# The released CondenseNetV2 models


@torch.no_grad()
def check_condensenetv2(net, released):
    x = torch.randn(2, 3, 64, 47).double()
    check_feature_maps(net.double()(x), released(x))


def parallel(state):
    return {f'module.{name}': value for name, value in state.items()}


def averaged(state):
    """Return counters as a moving average leaves them: just below their value."""
    return {k: v * 0.99996 if k.endswith(('_stage', '_count')) else v for k, v in state.items()}


@pytest.mark.parametrize('form', ['condensed', 'learned'])
def test_released_condensenetv2(form, tmp_path):
    """As the files have them; tests/models/test_classifiers.py has the logits of all archs."""
    released = published.CondenseNetV2('tiny', form)
    state = released.state_dict()
    content = dict(state_dict=parallel(state), args=argparse.Namespace(lr=0.1), epoch=350)
    if form == 'learned':
        other = {k: torch.zeros_like(v) for k, v in state.items()}
        content |= dict(state_dict=parallel(other), state_dict_ema=averaged(state))
    file = tmp_path / 'released.pth.tar'
    torch.save(content, file)
    init = dict(type='Pretrained', checkpoint=f'condensenetv2://{file}')
    net = CondenseNetV2(init_cfg=init, out_indices=None, arch=TINY, form=form)
    net.init_weights()
    net.eval()
    assert_same(convert(content), net.state_dict())
    assert net.stage == net.last_stage
    check_condensenetv2(net, released)
    net.switch_to_deploy()
    check_condensenetv2(net, released)


def test_masks_of_unpruned_models():
    """They are taken as they are: :meth:`condense` refuses them."""
    released = published.CondenseNetV2('tiny', 'learned')
    for name, value in released.state_dict().items():
        if name.endswith(('_mask', '_stage', '_count')):
            value.fill_(name.endswith('_mask'))
    net = condensenetv2('learned')().eval()
    net.load_state_dict(convert(released.state_dict()))
    assert net.stage == 0
    check_condensenetv2(net, released)
    assert 'stage 0 of 3' in error_of(net.condense)


def test_other_checkpoints_of_condensenetv2():
    learned, condensed = (
        published.condensenetv2('tiny', form) for form in ('learned', 'condensed')
    )
    plain = {k: v for k, v in learned.items() if '._' not in k}
    for state, message in (
        (learned | condensed, 'has both masks and indices'),
        (plain, 'has no masks and no indices'),
    ):
        with pytest.raises(ValueError, match=message):
            convert(state)
    name = 'features.denseblock_5.denselayer_2.sfr.index'
    matrix = condensed[name].clone()
    for spoil in (
        lambda m: m[0].zero_(),
        lambda m: m[1].fill_(1),
        lambda m: m[2].mul_(0.5),
        lambda m: m[3].add_(1e-3),
        lambda m: m[0].sub_(m[0] * 2),
        lambda m: m.resize_(len(m)),
    ):
        condensed[name] = matrix.clone()
        spoil(condensed[name])
        with pytest.raises(ValueError, match=f'^{name} must be a matrix .* single 1 in each row'):
            convert(condensed)


# Checkpoints of mmdense, and of other networks


SMALL = dict(growth_rate=4, layers=(1, 2, 1))
OWN = dict(
    rdnet=('rdnet', RDNet),
    rdnet_normed=('rdnet', lambda: RDNet(output_norm=True)),
    rdnet_first=('rdnet', lambda: RDNet(out_indices=(0,), output_norm=True)),
    densenet=('densenet', DenseNet),
    densenet_activated=('densenet', lambda: DenseNet(tap='activated', out_indices=(0, 1))),
    densenet_deep=('densenet', lambda: DenseNet(arch=SMALL, stem='deep')),
    densenet_cifar=('densenet', lambda: DenseNet(arch=SMALL, stem='cifar', bottleneck=False)),
    condensenetv2=('condensenetv2', condensenetv2('learned')),
    condensed=('condensenetv2', condensenetv2('condensed')),
    rexnet=('rexnet', ReXNet),
    rexnet_unet=('rexnet', lambda: ReXNet(taps='unet')),
    rexnet_first=('rexnet', lambda: ReXNet(out_indices=(0,))),
)


@pytest.mark.parametrize('name', OWN)
def test_weights_of_mmdense_are_mapped_onto_themselves(name):
    known, make = OWN[name]
    with torch.device('cpu' if 'condense' in name else 'meta'):
        state = make().state_dict()
    assert [n for n, f in FORMATS.items() if f.recognises(state)] == [known]
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
        ['conv1.weight', 'layer1.0.conv1.weight', 'fc.bias'],
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
    with pytest.raises(ValueError, match="no format 'resnet'"):
        convert(state, 'resnet')


# Where a checkpoint has its weights

ENTRIES = ('state_dict_ema', 'model_ema', 'state_dict', 'model')


@pytest.mark.parametrize('first', range(4))
@pytest.mark.parametrize('empty', [None, {}, 'absent'])
def test_averages_come_first(first, empty):
    weights = {entry: {'weight': torch.tensor([i])} for i, entry in enumerate(ENTRIES)}
    for entry in ENTRIES[:first]:
        weights[entry] = empty
    content = {k: v for k, v in reversed(weights.items()) if v != 'absent'}
    checkpoint = dict(epoch=3, optimizer={}, **content)
    before = {k: dict(v) if isinstance(v, dict) else v for k, v in checkpoint.items()}
    assert state_dict_of(checkpoint)['weight'] is weights[ENTRIES[first]]['weight']
    assert checkpoint == before


WRAPPERS = ['', 'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.']


@pytest.mark.parametrize('prefix', WRAPPERS)
def test_prefixes_of_wrappers_are_removed(prefix):
    state = state_of('clovaai')
    wrapped = {prefix + k: v for k, v in state.items()}
    weights = state_dict_of(wrapped)
    assert list(weights) == list(state)
    assert all(weights[k] is v for k, v in state.items())
    assert list(wrapped)[0] == prefix + list(state)[0]


def test_wrappers_of_a_part():
    state = {'backbone._orig_mod.stem.0.weight': torch.zeros(1), 'neck.bias': torch.zeros(1)}
    assert list(state_dict_of(state)) == ['backbone.stem.0.weight', 'neck.bias']
    state = {'module.weight': torch.zeros(1), 'weight': torch.zeros(1), 'model': torch.zeros(2)}
    assert list(state_dict_of(state)) == list(state)


@pytest.mark.parametrize(
    ('checkpoint', 'message'),
    [
        (None, 'a NoneType is not a checkpoint'),
        ([torch.zeros(1)], 'a list is not a checkpoint'),
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
    assert message in error_of(load_into, nn.Linear(1, 1), checkpoint)
