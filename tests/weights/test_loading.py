"""What of a model a checkpoint fills: loads that are complete, that are not, and what is said."""

import itertools
import logging
import math
import re
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner
from timm.models import adapt_input_conv
from torch import nn
from torch.nn import functional as F

from mmdense.engine import LoadReportHook
from mmdense.errors import UserError
from mmdense.weights import loading
from mmdense.weights.files import read_checkpoint
from mmdense.weights.loading import PretrainedInit, load_into
from support import DEMOS

NETS = dict(
    RDNet=dict(arch=dict(stem=8, growth=(8, 8, 8), down=(1, 2), blocks=1)),
    DenseNet=dict(arch=dict(growth_rate=4, layers=(1, 2, 1))),
    ReXNet=dict(arch=dict(width=0.25, depth=0.4)),
    CondenseNetV2=dict(arch=dict(layers=(1, 1, 1, 1, 1), growth=(4, 4, 4, 4, 4), groups=4)),
    ShuffleNetV2=dict(arch=dict(channels=(8, 16, 32), units=(1, 2, 1), stem=4, last=64)),
    TimmBackbone=dict(model_name='resnet18'),
)
FIRST_CONVS = dict(
    RDNet='stem.0.weight',
    DenseNet='features.conv0.weight',
    ReXNet='stem.conv.weight',
    TimmBackbone='conv1.weight',
)
COUNTS = 'num_batches_tracked'  # of batch norms, which files before torch 0.4.1 lack
NUMBERS = itertools.count()


@pytest.fixture
def log(monkeypatch):
    """What is logged, as (level, text)."""
    lines = []

    def print_log(text, logger=None, level=logging.INFO):
        lines.append((level, text))

    monkeypatch.setattr(loading, 'print_log', print_log)
    return lines


def build(kind, seed=0, **options):
    torch.manual_seed(seed)
    return MODELS.build(dict(type=f'mmdense.{kind}', **{**NETS[kind], **options}))


def weights_of(kind, seed=1, **options):
    """Return weights that no fresh network has, in its statistics neither."""
    state_dict = build(kind, seed, **options).state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name, value in state_dict.items():
        if name.endswith(COUNTS):
            value += 5
        elif value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return state_dict


def without_counts(state_dict):
    return {name: value for name, value in state_dict.items() if not name.endswith(COUNTS)}


def save(folder, state_dict, name='x.pth'):
    torch.save(dict(state_dict=state_dict), folder / name)
    return str(folder / name)


def initialise(kind, checkpoint, init=None, **options):
    init = dict(type='Pretrained', checkpoint=checkpoint, **(init or {}))
    net = build(kind, init_cfg=init, **options)
    net.init_weights()
    return net


def refusal(function, *args, **options):
    with pytest.raises(UserError) as error:
        function(*args, **options)
    assert '\n' not in str(error.value)
    return str(error.value)


def assert_equal(got, expected):
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def table(text):
    """Return the numbers of a report, and the names behind them."""
    found = {}
    for line in text.splitlines()[2:]:
        fate, numbers, names = re.fullmatch(r'([a-z ]+?) +(\d+(?: +\d+)?) *(.*)', line).groups()
        found[fate] = (*map(int, numbers.split()), names)
    return found


def sizes(net):
    parameters = len(list(net.named_parameters()))
    return parameters, len(net.state_dict()) - parameters


# Complete loads, and their report


@pytest.mark.parametrize('kind', NETS)
def test_own_weights_are_complete(kind, log, tmp_path):
    expected = weights_of(kind)
    file = save(tmp_path, expected)
    net = initialise(kind, file)
    assert_equal(net.state_dict(), expected)
    assert not torch.equal(*(next(n.parameters()) for n in (net, build(kind))))
    ((level, text),) = log
    assert level == logging.INFO
    assert text.startswith(f'{kind} from {file}')
    assert ': 100.0% of its tensors\n' in text
    assert table(text) == {
        'loaded': (*sizes(net), ''),
        'missing': (0, 0, ''),
        'wrong shape': (0, 0, ''),
        'unexpected': (0, ''),
        'dropped': (0, ''),
    }


def test_the_report_names_what_was_not_loaded(log, tmp_path):
    state_dict = weights_of('DenseNet')
    parameters, buffers = sizes(build('DenseNet'))
    norm = 'features.denseblock2.denselayer1.norm1'
    for name in ('weight', 'running_mean'):
        del state_dict[f'{norm}.{name}']
    for name in ('features.conv0.weight', 'features.norm0.running_var'):
        state_dict[name] = state_dict[name][:2]
    state_dict |= {f'extra.{i}': torch.zeros(1) for i in range(5)}
    state_dict |= {'classifier.weight': torch.zeros(9, 4), 'classifier.bias': torch.zeros(9)}
    file = save(tmp_path, state_dict)
    initialise('DenseNet', file, dict(min_loaded=0.5))
    ((level, text),) = log
    assert level == logging.WARNING
    total = parameters + buffers
    assert f': {(total - 4) / total:.1%} of its tensors' in text
    assert "(DenseNet: torchvision's and timm's classifiers, timm's feature extractors)" in text
    assert table(text) == {
        'loaded': (parameters - 2, buffers - 2, ''),
        'missing': (1, 1, f'{norm}.weight, {norm}.running_mean'),
        'wrong shape': (
            1,
            1,
            'features.conv0.weight (file: [2, 3, 7, 7]; model: [8, 3, 7, 7]), '
            'features.norm0.running_var (file: [2]; model: [8])',
        ),
        'unexpected': (5, 'extra.0, extra.1, extra.2, ...'),
        'dropped': (2, 'classifier.weight, classifier.bias'),
    }


def test_wrong_shapes_are_refused(tmp_path):
    state_dict = weights_of('RDNet')
    state_dict['stem.0.bias'] = torch.zeros(5)
    said = refusal(initialise, 'RDNet', save(tmp_path, state_dict))
    assert 'wrong shape: stem.0.bias (file: [5]; model: [8])' in said
    total = sum(sizes(build('RDNet')))
    assert f'x.pth fills {total - 1} of {total} tensors of RDNet: ' in said


@pytest.mark.parametrize('kind', ['RDNet', 'DenseNet'])
def test_every_name_counts(kind, tmp_path):
    whole = weights_of(kind)
    file = tmp_path / 'x.pth'
    net = build(kind, init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    counts = [name for name in whole if name.endswith(COUNTS)]
    for name in whole.keys() - counts:
        renamed = {(f'{k}_old' if k == name else k): v for k, v in whole.items()}
        torch.save(renamed, file)
        said = refusal(net.init_weights)
        assert f'missing: {name};' in said
        assert f'in the file instead: {name}_old' in said
        net._is_init = False
    for name in counts:
        torch.save({k: v for k, v in whole.items() if k != name}, file)
        net.init_weights()
        net._is_init = False
    assert bool(counts) == (kind == 'DenseNet')


def test_counts_of_batches_may_all_be_absent(log, tmp_path):
    whole = weights_of('DenseNet')
    net = initialise('DenseNet', save(tmp_path, without_counts(whole)))
    assert_equal(without_counts(net.state_dict()), whole)
    ((level, text),) = log
    assert level == logging.INFO
    assert ': 100.0% of its tensors' in text
    assert table(text)['missing'] == (0, 0, '')


def test_how_to_train_from_scratch_is_said(tmp_path):
    said = refusal(initialise, 'RDNet', save(tmp_path, {'a': torch.zeros(1)}))
    assert said.startswith(str(tmp_path))
    assert said.endswith('(To train from scratch: --cfg-options model.backbone.init_cfg=None)')


@pytest.mark.parametrize(
    ('held', 'said'),
    [
        (dict(state_dict={}), 'no state dict: '),
        ({}, 'no state dict: empty'),
        (dict(epoch=3), "no state dict: 'epoch' is of type int"),
        (dict(state_dict=dict(a=[1])), "no state dict: 'a' is of type list"),
    ],
)
def test_files_without_weights(held, said, tmp_path):
    file = tmp_path / 'x.pth'
    torch.save(held, file)
    assert f'{file}: {said}' in refusal(initialise, 'RDNet', str(file))


# Prefixes


PREFIXES = ['backbone.', 'net.', 'model.backbone.']


def old_torchvision(state_dict):
    """Return DenseNet's weights with the names of 2017."""
    return {
        re.sub(r'(denselayer\d+\.(?:norm|conv))(\d)', r'\1.\2', name): value
        for name, value in state_dict.items()
    }


def timm_features(state_dict):
    return {name.replace('.', '_', 1): value for name, value in state_dict.items()}


FORMATS = dict(
    own=('RDNet', dict),
    features=('RDNet', timm_features),
    torchvision=('DenseNet', old_torchvision),
)


@pytest.mark.parametrize('prefix', PREFIXES)
@pytest.mark.parametrize('form', FORMATS)
def test_prefixes(form, prefix, tmp_path):
    kind, change = FORMATS[form]
    whole = without_counts(weights_of(kind))
    moved = {prefix + name: value for name, value in change(whole).items()}
    moved |= {'head.weight': torch.zeros(3, 3), 'head.bias': torch.zeros(3)}
    file = save(tmp_path, moved)
    number = len(whole)
    said = refusal(initialise, kind, file)
    assert f'fills 0 of {number} tensors' in said
    assert (
        f"{number} would fit without '{prefix}' in front: add prefix='{prefix}' to init_cfg" in said
    )
    for given in (prefix, prefix.rstrip('.')):
        net = initialise(kind, file, dict(prefix=given))
        assert_equal(without_counts(net.state_dict()), whole)


def test_no_more_would_fit_than_there_are(tmp_path):
    whole = weights_of('DenseNet')
    file = save(tmp_path, {f'net.{name}': value for name, value in whole.items()})
    said = refusal(initialise, 'DenseNet', file)
    wanted, fitting = re.search(r'fills 0 of (\d+) .* (\d+) would fit', said).groups()
    assert int(fitting) <= int(wanted)


def test_a_prefix_that_is_not_needed(tmp_path):
    file = save(tmp_path, weights_of('RDNet'))
    said = refusal(initialise, 'RDNet', file, dict(prefix='backbone.'))
    assert 'in the file instead: stem.0.weight, ' in said
    assert 'would fit without a prefix' in said


def test_the_way_out_of_other_callers(tmp_path):
    whole = {f'net.{name}': value for name, value in weights_of('RDNet').items()}
    _, found = load_into(build('RDNet'), whole)
    assert 'tools/convert_weights.py --prefix net. takes it off' in found.hint
    assert found.share() == 0


def test_a_prefix_that_no_key_has(tmp_path):
    file = save(tmp_path, {f'net.{name}': value for name, value in weights_of('RDNet').items()})
    said = refusal(initialise, 'RDNet', file, dict(prefix='backbone.'))
    assert "would fit without 'net.' in front: add prefix='net.' to init_cfg" in said


def test_wrappers_are_taken_off(tmp_path):
    whole = weights_of('RDNet')
    file = save(tmp_path, {f'module.{name}': value for name, value in whole.items()})
    assert_equal(initialise('RDNet', file).state_dict(), whole)


# What a network may lack or leave


def test_output_norms_are_not_asked_for(log, tmp_path):
    whole = weights_of('RDNet')
    net = initialise('RDNet', save(tmp_path, whole), output_norm=True)
    own = {k: v for k, v in net.state_dict().items() if not k.startswith('output_norms.')}
    assert own.keys() == whole.keys()
    assert_equal(own, whole)
    ((level, text),) = log
    assert level == logging.INFO
    assert table(text)['loaded'] == (len(whole), 0, '')
    assert all((norm.weight == 1).all() for norm in net.output_norms.values())


def test_output_norms_are_loaded(log, tmp_path):
    whole = weights_of('RDNet', output_norm=True)
    net = initialise('RDNet', save(tmp_path, whole), output_norm=True)
    assert_equal(net.state_dict(), whole)
    assert len(net.output_norms) == 3
    assert table(log[0][1])['loaded'] == (len(whole), 0, '')
    log.clear()
    assert_equal(initialise('RDNet', save(tmp_path, whole)).state_dict(), whole)
    assert table(log[0][1])['unexpected'][0] == 6


@pytest.mark.parametrize('kind', ['RDNet', 'DenseNet', 'ShuffleNetV2'])
def test_stages_that_are_not_built(kind, log, tmp_path):
    whole = weights_of(kind)
    net = initialise(kind, save(tmp_path, whole), out_indices=(0, 1))
    assert_equal(net.state_dict(), whole)
    ((level, text),) = log
    left = [name for name in whole if name not in net.state_dict()]
    assert level == logging.INFO
    assert table(text)['loaded'][:2] == sizes(net)
    number, names = table(text)['unexpected']
    assert number == len(left) > 3
    assert {*names.removesuffix(', ...').split(', ')} < {*left}


# min_loaded


def half(kind):
    whole = weights_of(kind)
    return dict(list(whole.items())[: math.ceil(0.6 * len(whole))])


def test_partial_files_must_be_asked_for(log, tmp_path):
    part = half('RDNet')
    file = save(tmp_path, part)
    refusal(initialise, 'RDNet', file)
    refusal(initialise, 'RDNet', file, dict(min_loaded=0.7))
    log.clear()
    net = initialise('RDNet', file, dict(min_loaded=0.5))
    assert_equal({k: v for k, v in net.state_dict().items() if k in part}, part)
    ((level, text),) = log
    assert level == logging.WARNING
    assert table(text)['missing'][0] == len(net.state_dict()) - len(part)


def test_exactly_enough(tmp_path):
    whole = weights_of('RDNet')
    part = dict(list(whole.items())[1:])
    file = save(tmp_path, part)
    share = len(part) / len(whole)
    initialise('RDNet', file, dict(min_loaded=share))
    refusal(initialise, 'RDNet', file, dict(min_loaded=share + 1e-6))


@pytest.mark.parametrize('value', [-0.1, 1.1, 50, math.nan, math.inf])
def test_impossible_shares(value):
    with pytest.raises(ValueError, match='min_loaded is .*, must be from 0 to 1'):
        PretrainedInit('x.pth', min_loaded=value)


def test_min_coverage_is_a_deprecated_alias(log):
    assert PretrainedInit('x.pth', min_coverage=0.5).min_loaded == 0.5
    assert HOOKS.build(dict(type='mmdense.CoverageHook', min_coverage=0.5)).min_loaded == 0.5
    assert log == [(logging.WARNING, 'min_coverage is a deprecated alias of min_loaded')] * 2


def resnet(file, **init):
    torch.manual_seed(0)
    init = dict(type='Pretrained', checkpoint=file, **init)
    net = MODELS.build(dict(type='mmdet.ResNet', depth=18, base_channels=4, init_cfg=init))
    net.init_weights()
    return net


def test_other_modules(log, tmp_path):
    torch.manual_seed(1)
    whole = MODELS.build(dict(type='mmdet.ResNet', depth=18, base_channels=4)).state_dict()
    part = {name: value for name, value in whole.items() if name.startswith('layer1.')}
    part['fc.weight'] = torch.zeros(2, 2)
    file = save(tmp_path, part)
    net = resnet(file)
    for name in part.keys() - {'fc.weight'}:
        assert torch.equal(net.state_dict()[name], part[name])
    ((level, text),) = log
    assert level == logging.WARNING
    assert table(text)['unexpected'] == (1, 'fc.weight')
    assert sum(table(text)['loaded'][:2]) == len(part) - 1
    assert 'tensors of ResNet' in refusal(resnet, file, min_loaded=1.0)
    save(tmp_path, {'fc.weight': torch.zeros(2, 2)})
    said = refusal(resnet, file)
    assert f'{file} fills 0 of {len(without_counts(whole))} tensors of ResNet: missing: ' in said
    assert 'in the file instead: fc.weight' in said
    assert 'from scratch' not in said


# Channels of the image


@pytest.mark.parametrize('channels', [1, 2, 4, 6])
@pytest.mark.parametrize('kind', FIRST_CONVS)
def test_other_channels(kind, channels, log, tmp_path):
    whole = weights_of(kind)
    name = FIRST_CONVS[kind]
    net = initialise(kind, save(tmp_path, whole), in_channels=channels)
    expected = adapt_input_conv(channels, whole[name])
    assert expected.shape[1] == channels
    assert_equal(net.state_dict(), {**whole, name: expected})
    texts = [text for _, text in log]
    assert texts[0] == f'{name}: adapted from 3 to {channels} channels of the image'
    assert ': 100.0% of its tensors' in texts[1]


@pytest.mark.parametrize('kind', FIRST_CONVS)
@pytest.mark.parametrize('channels', [3, 4])
def test_the_same_channels_stay_as_they_are(channels, kind, log, tmp_path):
    whole = weights_of(kind, in_channels=channels)
    net = initialise(kind, save(tmp_path, whole), in_channels=channels)
    assert_equal(net.state_dict(), whole)
    assert not any('adapted' in text for _, text in log)


@pytest.mark.parametrize('kind', FIRST_CONVS)
@pytest.mark.parametrize('channels', [3, 6])
def test_only_colours_are_adapted(channels, kind, tmp_path):
    file = save(tmp_path, weights_of(kind, in_channels=4))
    said = refusal(initialise, kind, file, in_channels=channels)
    assert f'wrong shape: {FIRST_CONVS[kind]} (file: [' in said


def test_foreign_names_are_adapted_too(tmp_path):
    whole = weights_of('RDNet')
    file = save(tmp_path, {f'net.{k}': v for k, v in timm_features(whole).items()})
    net = initialise('RDNet', file, dict(prefix='net'), in_channels=4)
    expected = adapt_input_conv(4, whole['stem.0.weight'])
    assert_equal(net.state_dict(), {**whole, 'stem.0.weight': expected})


# CondenseNetV2's forms


def condensed_weights():
    net = build('CondenseNetV2', seed=1)
    net.prune_to(1)
    net.condense()
    return net.state_dict()


OTHER_FORM = (
    "the weights are those of a CondenseNetV2 of form='condensed', the network is of "
    "form='learned': build it with the other one"
)


def test_another_form_of_condensenetv2(tmp_path):
    file = save(tmp_path, condensed_weights())
    assert refusal(initialise, 'CondenseNetV2', file).startswith(f'{file}: {OTHER_FORM}')
    net = initialise('CondenseNetV2', file, form='condensed')
    assert_equal(net.state_dict(), condensed_weights())


# What a runner loads


class Classifier(BaseModel):
    """A backbone and a linear layer."""

    def __init__(self, kind='RDNet', classes=2, **options):
        super().__init__()
        self.backbone = build(kind, **options)
        self.fc = nn.Linear(self.backbone.out_channels[-1], classes)
        self.seen = 0

    def forward(self, images, labels, mode='tensor'):
        self.seen += 1
        scores = self.fc(self.backbone(images)[-1].mean((2, 3)))
        return dict(loss=F.cross_entropy(scores, labels)) if mode == 'loss' else scores


class AsLoaded(Hook):
    """Keep the weights, and their average, as they are when training begins."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.model = {k: v.clone() for k, v in runner.model.state_dict().items()}
        averages = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
        for average in averages:
            self.average = {k: v.clone() for k, v in average.state_dict().items()}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Leave out the report on the machine, which takes longer than the runs."""
    monkeypatch.setattr(Runner, '_log_env', lambda self, env_cfg: None)
    yield
    DefaultScope._instance_dict.clear()


def train(folder, model, *, iters=2, hooks=(), part='backbone', min_loaded=1.0, **options):
    """Train for a few iterations; return the runner and what was loaded."""
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(channels, 32, 32, generator=generator), i % 2) for i in range(8)]
    runner = Runner(
        model=model,
        work_dir=str(folder),
        experiment_name=f'{Path(folder).name}-{next(NUMBERS)}',
        train_dataloader=dict(
            dataset=data,
            sampler=dict(type=InfiniteSampler, shuffle=False),
            batch_size=2,
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=iters),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=list(hooks),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
        log_processor=dict(by_epoch=False),
        randomness=dict(seed=0),
        **options,
    )
    look = AsLoaded()
    runner.register_hook(LoadReportHook(min_loaded, part))
    runner.register_hook(look)
    runner.train()
    return runner, look


def classifier_weights(kind='RDNet', classes=2, **options):
    torch.manual_seed(2)
    head = Classifier(kind, classes).state_dict()
    backbone = {f'backbone.{k}': v for k, v in weights_of(kind, **options).items()}
    return OrderedDict({**head, **backbone})


def test_a_runner_loads_other_heads(log, tmp_path):
    whole = classifier_weights(classes=7)
    model = Classifier()
    fresh = {k: v.clone() for k, v in model.fc.state_dict().items()}
    _, look = train(tmp_path, model, load_from=save(tmp_path, whole))
    assert model.seen == 2
    for name, value in look.model.items():
        expected = whole[name] if name.startswith('backbone.') else fresh[name[3:]]
        assert torch.equal(value, expected), name
    ((level, text),) = log
    assert level == logging.WARNING
    assert text.startswith('Classifier from the checkpoint: ')
    number, _, names = table(text)['wrong shape']
    assert number == 2
    assert names.startswith('fc.weight (file: [7, ')


def test_the_report_is_in_the_log_of_the_run(tmp_path):
    runner, _ = train(tmp_path, Classifier(), load_from=save(tmp_path, classifier_weights()))
    (file,) = Path(runner.log_dir).glob('*.log')
    assert 'Classifier from the checkpoint: 100.0% of its tensors' in file.read_text()


def test_a_runner_stops_before_the_first_iteration(tmp_path):
    whole = classifier_weights()
    del whole['backbone.stem.0.bias']
    model = Classifier()
    said = refusal(train, tmp_path, model, load_from=save(tmp_path, whole))
    number = len(model.backbone.state_dict())
    assert said == (
        f'the checkpoint fills {number - 1} of {number} tensors of backbone of Classifier: '
        'missing: backbone.stem.0.bias'
    )
    assert model.seen == 0


def test_part_and_share_of_the_hook(tmp_path):
    whole = classifier_weights()
    del whole['fc.bias']
    file = save(tmp_path, whole)
    train(tmp_path / 'a', Classifier(), load_from=file)
    for part in ('', 'neck'):  # where there is no such part, the whole model counts
        said = refusal(train, tmp_path / 'b', Classifier(), part=part, load_from=file)
        assert 'of Classifier: missing: fc.bias' in said
    share = (len(whole) - 0.5) / (len(whole) + 1)
    train(tmp_path / 'c', Classifier(), part='', min_loaded=share, load_from=file)
    del whole['backbone.stem.0.bias']
    file = save(tmp_path, whole)
    refusal(train, tmp_path / 'd', Classifier(), part='', min_loaded=share, load_from=file)
    train(tmp_path / 'e', Classifier(), min_loaded=0, load_from=file)


def test_nothing_that_fits_is_only_reported_if_asked_for(log, tmp_path):
    file = save(tmp_path, {'a.weight': torch.zeros(3)})
    train(tmp_path, Classifier(), min_loaded=0, load_from=file)
    ((level, text),) = log
    assert level == logging.WARNING
    assert ': 0.0% of its tensors' in text


def test_a_backbone_alone_is_no_model(tmp_path):
    said = refusal(train, tmp_path, Classifier(), load_from=save(tmp_path, weights_of('RDNet')))
    assert "would fit with 'backbone.' in front" in said
    assert 'name the file in model.backbone.init_cfg.checkpoint' in said


def released(state_dict):
    """Return a classifier's weights with the names of RDNet's released detectors."""
    return {k.replace('backbone.', 'backbone.timm_model.'): v for k, v in state_dict.items()}


def test_a_runner_maps_foreign_names(log, tmp_path):
    whole = classifier_weights()
    file = save(tmp_path, released(whole))
    ema = dict(type='EMAHook')
    _, look = train(tmp_path, Classifier(), hooks=[ema], part='', load_from=file)
    assert look.model.keys() == whole.keys()
    assert_equal(look.model, whole)
    assert_equal(look.average, whole)
    assert 'RDNet detectors and segmentors of mmdet 2.x' in log[0][1]


def test_averages_begin_with_what_was_loaded(tmp_path):
    whole = classifier_weights()
    _, look = train(
        tmp_path, Classifier(), hooks=[dict(type='EMAHook')], load_from=save(tmp_path, whole)
    )
    assert_equal(look.average, whole)


@pytest.mark.parametrize(
    'change',
    [
        lambda whole: whole,
        lambda whole: dict(model=whole),
        lambda whole: dict(state_dict={f'module.{name}': v for name, v in whole.items()}),
    ],
    ids=['plain', 'holder', 'wrapper'],
)
def test_holders_and_wrappers(change, tmp_path):
    whole = classifier_weights()
    torch.save(change(whole), tmp_path / 'x.pth')
    hooks = [dict(type='EMAHook')]
    _, look = train(tmp_path, Classifier(), hooks=hooks, load_from=str(tmp_path / 'x.pth'))
    assert_equal(look.model, whole)
    assert_equal(look.average, whole)


def test_the_average_of_a_file_comes_first(tmp_path):
    whole, average = classifier_weights(seed=1), classifier_weights(seed=2)
    file = tmp_path / 'x.pth'
    torch.save(dict(state_dict=whole, state_dict_ema=average), file)
    assert_equal(
        initialise('RDNet', str(file), dict(prefix='backbone')).state_dict(),
        {name.removeprefix('backbone.'): value for name, value in average.items()},
    )
    _, look = train(tmp_path, Classifier(), load_from=str(file))
    assert_equal(look.model, average)


def adapted(whole):
    name = 'backbone.stem.0.weight'
    return {**whole, name: adapt_input_conv(4, whole[name])}


def test_a_runner_adapts_channels(log, tmp_path):
    whole = classifier_weights()
    _, look = train(tmp_path, Classifier(in_channels=4), load_from=save(tmp_path, whole))
    assert_equal(look.model, adapted(whole))
    assert log[0][1] == ('backbone.stem.0.weight: adapted from 3 to 4 channels of the image')


def test_averages_get_adapted_channels(tmp_path):
    whole = classifier_weights()
    _, look = train(
        tmp_path,
        Classifier(in_channels=4),
        hooks=[dict(type='EMAHook')],
        load_from=save(tmp_path, whole),
    )
    assert_equal(look.average, adapted(whole))


@pytest.mark.parametrize('ema', [False, True])
def test_a_complete_run_is_resumed(ema, tmp_path):
    hooks = [dict(type='EMAHook', momentum=0.5)] if ema else []
    first, _ = train(tmp_path / 'a', Classifier(), hooks=hooks)
    expected = {k: v.clone() for k, v in first.model.state_dict().items()}
    model = Classifier(seed=3)
    file = str(tmp_path / 'a/iter_2.pth')
    runner, look = train(tmp_path / 'b', model, hooks=hooks, iters=4, load_from=file, resume=True)
    assert model.seen == 2
    assert runner.iter == 4
    assert_equal(look.model, expected)
    if ema:
        (average,) = [hook.ema_model.module for hook in first.hooks if isinstance(hook, EMAHook)]
        assert_equal(look.average, average.state_dict())
        assert not torch.equal(look.average['fc.weight'], look.model['fc.weight'])


def test_a_run_without_its_head_is_not_resumed(tmp_path):
    train(tmp_path / 'a', Classifier())
    state = read_checkpoint(tmp_path / 'a/iter_2.pth')
    del state['state_dict']['fc.bias']
    torch.save(state, tmp_path / 'x.pth')
    model = Classifier()
    file = str(tmp_path / 'x.pth')
    said = refusal(train, tmp_path / 'b', model, iters=4, load_from=file, resume=True)
    assert said.endswith('tensors of Classifier: missing: fc.bias')
    assert model.seen == 0


def load_by_hook(model, checkpoint, part='backbone', resume=False):
    """Do what a runner does with a checkpoint before it loads it."""
    hook = HOOKS.build(dict(type='mmdense.LoadReportHook', part=part))
    hook.after_load_checkpoint(SimpleNamespace(model=model, _resume=resume), checkpoint)


def test_the_hook_names_another_form_of_condensenetv2():
    whole = {f'backbone.{name}': value for name, value in condensed_weights().items()}
    said = refusal(load_by_hook, Classifier('CondenseNetV2'), dict(state_dict=whole))
    assert said == OTHER_FORM


def test_the_hook_leaves_fitting_checkpoints_alone():
    whole = classifier_weights()
    checkpoint = dict(state_dict=whole, meta=dict(epoch=3))
    load_by_hook(Classifier(), checkpoint, resume=True)
    assert checkpoint['state_dict'] is whole
    assert checkpoint['meta'] == dict(epoch=3)


@pytest.mark.parametrize('resume', [False, True])
def test_the_part_counts_unless_a_run_is_resumed(resume):
    whole = classifier_weights(classes=7)
    if resume:
        refusal(load_by_hook, Classifier(), dict(state_dict=whole), resume=True)
    else:
        load_by_hook(Classifier(), dict(state_dict=whole))


@pytest.mark.parametrize('resume', [False, True])
def test_a_whole_model_needs_its_output_norms(resume):
    """Tested or resumed, it would go on with norms that were never trained."""
    checkpoint = dict(state_dict=classifier_weights())
    with pytest.raises(UserError, match=r'missing: backbone\.output_norms\.0\.weight'):
        load_by_hook(Classifier(output_norm=True), checkpoint, part='', resume=resume)


def whole_model(**options):
    init_default_scope('mmdet')
    cfg = Config.fromfile(DEMOS['detection'])
    return MODELS.build({**cfg.model, **options})


def test_a_whole_model_s_init_cfg_fills_the_backbone(tmp_path):
    torch.manual_seed(0)
    weights = whole_model().state_dict()
    file = save(tmp_path, weights)
    model = whole_model(init_cfg=dict(type='Pretrained', checkpoint=file))
    model.init_weights()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    renamed = {k.replace('backbone.', 'bkbone.'): v for k, v in weights.items()}
    model = whole_model(init_cfg=dict(type='Pretrained', checkpoint=save(tmp_path, renamed)))
    with pytest.raises(UserError, match='fills 0 of .* tensors of backbone of FasterRCNN'):
        model.init_weights()


def test_all_that_read_the_image_are_adapted():
    """repvgg's first block has two convolutions side by side."""
    options = dict(type='mmdense.TimmBackbone', model_name='repvgg_a0')
    torch.manual_seed(0)
    weights = MODELS.build(options).state_dict()
    net = MODELS.build(dict(**options, in_channels=1))
    assert load_into(net, weights)[1].share() == 1
    for kernel in ('conv_kxk', 'conv_1x1'):
        found = net.state_dict()[f'stem.{kernel}.conv.weight']
        torch.testing.assert_close(found, weights[f'stem.{kernel}.conv.weight'].sum(1, True))


def test_names_that_a_model_changes_itself():
    """mmdet's semi-supervised detectors give a detector's weights to student and teacher."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(2, 2), nn.Linear(2, 2)

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            for key in [k for k in state_dict if k in ('weight', 'bias')]:
                value = state_dict.pop(key)
                state_dict |= {f'student.{key}': value, f'teacher.{key}': value}
            super()._load_from_state_dict(state_dict, prefix, *rest)

    found = load_into(Twice(), nn.Linear(2, 2).state_dict())[1]
    assert len(found.loaded) == 4
    assert not found.missing
