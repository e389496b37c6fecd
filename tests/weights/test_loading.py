"""Loading weights: complete loads, incomplete ones, their reports and error messages."""

import logging
import math
import re
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.registry import HOOKS, MODELS, init_default_scope
from timm.models import adapt_input_conv
from torch import nn
from torch.nn import functional as F

from checkpoints import error_of, make_runner, short_runs  # noqa: F401
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
COUNTER = 'num_batches_tracked'  # of batch norms; files from before torch 0.4.1 lack it
SCRATCH = '(To train from scratch: --cfg-options model.backbone.init_cfg=None)'


@pytest.fixture
def log(monkeypatch):
    """The logged lines, as (level, text)."""
    lines = []

    def print_log(text, logger=None, level=logging.INFO):
        lines.append((level, text))

    monkeypatch.setattr(loading, 'print_log', print_log)
    monkeypatch.setattr(loading, 'warn', lambda text: lines.append((logging.WARNING, text)))
    return lines


def build(kind, seed=0, **options):
    torch.manual_seed(seed)
    return MODELS.build(dict(type=f'mmdense.{kind}', **{**NETS[kind], **options}))


def weights_of(kind, seed=1, **options):
    """Return weights that differ from a fresh network's in every tensor, statistics included."""
    state_dict = build(kind, seed, **options).state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name, value in state_dict.items():
        if name.endswith(COUNTER):
            value += 5
        elif value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return state_dict


def without_counters(state_dict):
    return {name: value for name, value in state_dict.items() if not name.endswith(COUNTER)}


def with_prefix(prefix, state_dict):
    return {prefix + name: value for name, value in state_dict.items()}


def save(folder, state_dict, name='x.pth'):
    torch.save(dict(state_dict=state_dict), folder / name)
    return str(folder / name)


def initialise(kind, checkpoint, init=None, **options):
    init = dict(type='Pretrained', checkpoint=checkpoint, **(init or {}))
    net = build(kind, init_cfg=init, **options)
    net.init_weights()
    return net


def assert_equal(weights, expected):
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name


def table(text):
    """Return the numbers and names in a report."""
    rows = {}
    for line in text.splitlines()[2:]:
        outcome, numbers, names = re.fullmatch(r'([a-z ]+?) +(\d+(?: +\d+)?) *(.*)', line).groups()
        rows[outcome] = (*map(int, numbers.split()), names)
    return rows


def sizes(net):
    parameters = len(list(net.named_parameters()))
    return parameters, len(net.state_dict()) - parameters


# Complete loads, and their report


@pytest.mark.parametrize('kind', NETS)
def test_weights_of_mmdense_are_complete(kind, log, tmp_path):
    expected = weights_of(kind)
    file = save(tmp_path, expected)
    net = initialise(kind, file)
    assert_equal(net.state_dict(), expected)
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
    initialise('DenseNet', save(tmp_path, state_dict), dict(min_loaded=0.5))
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
    file = save(tmp_path, state_dict)
    total = sum(sizes(build('RDNet')))
    assert error_of(initialise, 'RDNet', file) == (
        f'{file} fills {total - 1} of {total} tensors of RDNet: wrong shape: stem.0.bias '
        "(file: [5]; model: [8]); its keys are those of RDNet: timm's and NAVER's classifiers, "
        f"timm's feature extractors {SCRATCH}"
    )


@pytest.mark.parametrize('kind', ['RDNet', 'DenseNet'])
def test_every_name_counts(kind, log, tmp_path):
    weights = weights_of(kind)
    file = tmp_path / 'x.pth'
    net = build(kind, init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    for name in without_counters(weights):
        torch.save({(f'{k}_old' if k == name else k): v for k, v in weights.items()}, file)
        text = error_of(net.init_weights)
        assert f'missing: {name};' in text
        assert f'in the file instead: {name}_old' in text
        net._is_init = False
    # Counters are optional.
    log.clear()
    net = initialise(kind, save(tmp_path, without_counters(weights)))
    assert_equal(without_counters(net.state_dict()), weights)
    ((level, text),) = log
    assert level == logging.INFO
    assert ': 100.0% of its tensors' in text
    assert table(text)['missing'] == (0, 0, '')


def test_a_file_without_weights(tmp_path):
    file = tmp_path / 'x.pth'
    torch.save({}, file)
    assert error_of(initialise, 'RDNet', str(file)) == f'{file}: no state dict: empty {SCRATCH}'


# Prefixes


def named_as_in_2017(state_dict):
    return {
        re.sub(r'(denselayer\d+\.(?:norm|conv))(\d)', r'\1.\2', name): value
        for name, value in state_dict.items()
    }


def as_feature_extractor(state_dict):
    return {name.replace('.', '_', 1): value for name, value in state_dict.items()}


@pytest.mark.parametrize(
    ('kind', 'rename', 'prefix'),
    [
        ('RDNet', dict, 'backbone.'),
        ('RDNet', dict, 'model.backbone.'),
        ('RDNet', as_feature_extractor, 'net.'),
        ('DenseNet', named_as_in_2017, 'model.backbone.'),
    ],
)
def test_prefixes(kind, rename, prefix, tmp_path):
    weights = without_counters(weights_of(kind))
    state_dict = with_prefix(prefix, rename(weights))
    state_dict |= {'head.weight': torch.zeros(3, 3), 'head.bias': torch.zeros(3)}
    file = save(tmp_path, state_dict)
    number = len(weights)
    hint = f"{number} would match without the prefix '{prefix}': add prefix='{prefix}' to init_cfg"
    text = error_of(initialise, kind, file)
    assert f'fills 0 of {number} tensors' in text
    assert hint in text
    assert hint in error_of(initialise, kind, file, dict(prefix='other.'))
    for given in (prefix, prefix.rstrip('.')):
        net = initialise(kind, file, dict(prefix=given))
        assert_equal(without_counters(net.state_dict()), weights)


def test_other_prefixes(tmp_path):
    weights = weights_of('RDNet')
    text = error_of(initialise, 'RDNet', save(tmp_path, weights), dict(prefix='backbone.'))
    assert 'in the file instead: stem.0.weight, ' in text
    assert 'would match without a prefix' in text
    _, report = load_into(build('RDNet'), with_prefix('net.', weights))
    assert 'remove it by tools/convert_weights.py --prefix net.' in report.hint
    assert report.share() == 0


# Optional and unexpected tensors


def test_output_norms_are_optional(log, tmp_path):
    weights = weights_of('RDNet')
    net = initialise('RDNet', save(tmp_path, weights), output_norm=True)
    loaded = {k: v for k, v in net.state_dict().items() if not k.startswith('output_norms.')}
    assert loaded.keys() == weights.keys()
    assert_equal(loaded, weights)
    assert log[0][0] == logging.INFO
    assert table(log[0][1])['loaded'] == (len(weights), 0, '')
    assert all((norm.weight == 1).all() for norm in net.output_norms.values())
    weights = weights_of('RDNet', output_norm=True)
    file = save(tmp_path, weights)
    assert_equal(initialise('RDNet', file, output_norm=True).state_dict(), weights)
    assert table(log[1][1])['loaded'] == (len(weights), 0, '')
    assert_equal(initialise('RDNet', file).state_dict(), weights)
    assert table(log[2][1])['unexpected'][0] == 6


@pytest.mark.parametrize('kind', ['RDNet', 'DenseNet', 'ShuffleNetV2'])
def test_stages_that_are_not_built(kind, log, tmp_path):
    weights = weights_of(kind)
    net = initialise(kind, save(tmp_path, weights), out_indices=(0, 1))
    assert_equal(net.state_dict(), weights)
    ((level, text),) = log
    rest = {name for name in weights if name not in net.state_dict()}
    assert level == logging.INFO
    assert table(text)['loaded'][:2] == sizes(net)
    number, names = table(text)['unexpected']
    assert number == len(rest) > 3
    assert {*names.removesuffix(', ...').split(', ')} < rest


# min_loaded


def test_partial_files(log, tmp_path):
    weights = weights_of('RDNet')
    part = dict(list(weights.items())[1:])
    file = save(tmp_path, part)
    error_of(initialise, 'RDNet', file)
    share = len(part) / len(weights)
    error_of(initialise, 'RDNet', file, dict(min_loaded=share + 1e-6))
    log.clear()
    net = initialise('RDNet', file, dict(min_loaded=share))
    assert_equal({k: v for k, v in net.state_dict().items() if k in part}, part)
    ((level, text),) = log
    assert level == logging.WARNING
    assert table(text)['missing'][0] == 1


@pytest.mark.parametrize('value', [-0.1, 1.1, 50, math.nan, math.inf])
def test_impossible_shares(value):
    with pytest.raises(ValueError, match='min_loaded is .*, must be from 0 to 1'):
        PretrainedInit('x.pth', min_loaded=value)


def test_min_coverage_is_a_deprecated_alias(log):
    assert PretrainedInit('x.pth', min_coverage=0.5).min_loaded == 0.5
    assert HOOKS.build(dict(type='mmdense.CoverageHook', min_coverage=0.5)).min_loaded == 0.5
    assert log == [(logging.WARNING, 'min_coverage is a deprecated alias of min_loaded')] * 2


def resnet(file=None, **init):
    torch.manual_seed(0)
    init = dict(type='Pretrained', checkpoint=file, **init) if file else None
    net = MODELS.build(dict(type='mmdet.ResNet', depth=18, base_channels=4, init_cfg=init))
    net.init_weights()
    return net


def test_modules_of_other_packages(log, tmp_path):
    """They load if anything fits."""
    weights = resnet().state_dict()
    part = {name: value + 1 for name, value in weights.items() if name.startswith('layer1.')}
    file = save(tmp_path, {**part, 'fc.weight': torch.zeros(2, 2)})
    net = resnet(file)
    assert_equal(part, net.state_dict())
    ((level, text),) = log
    assert level == logging.WARNING
    assert table(text)['unexpected'] == (1, 'fc.weight')
    assert sum(table(text)['loaded'][:2]) == len(part)
    assert 'tensors of ResNet' in error_of(resnet, file, min_loaded=1.0)
    save(tmp_path, {'fc.weight': torch.zeros(2, 2)})
    text = error_of(resnet, file)
    number = len(without_counters(weights))
    assert text.startswith(f'{file} fills 0 of {number} tensors of ResNet: missing: ')
    assert text.endswith('in the file instead: fc.weight')


def detector(**options):
    init_default_scope('mmdet')
    return MODELS.build({**Config.fromfile(DEMOS['detection']).model, **options})


def test_the_init_cfg_of_a_complete_model(tmp_path):
    """It must fill the backbone."""
    torch.manual_seed(0)
    weights = detector().state_dict()
    model = detector(init_cfg=dict(type='Pretrained', checkpoint=save(tmp_path, weights)))
    model.init_weights()
    assert_equal(model.state_dict(), weights)
    renamed = {k.replace('backbone.', 'bkbone.'): v for k, v in weights.items()}
    model = detector(init_cfg=dict(type='Pretrained', checkpoint=save(tmp_path, renamed)))
    assert re.search('fills 0 of .* of backbone of FasterRCNN', error_of(model.init_weights))


# Image channels

FIRST_CONVS = dict(
    RDNet='stem.0.weight',
    DenseNet='features.conv0.weight',
    ReXNet='stem.conv.weight',
    TimmBackbone='conv1.weight',
)


@pytest.mark.parametrize(('kind', 'channels'), zip(FIRST_CONVS, (1, 2, 4, 6), strict=True))
def test_other_image_channels(kind, channels, log, tmp_path):
    weights = weights_of(kind)
    name = FIRST_CONVS[kind]
    net = initialise(kind, save(tmp_path, weights), in_channels=channels)
    expected = adapt_input_conv(channels, weights[name])
    assert expected.shape[1] == channels
    assert_equal(net.state_dict(), {**weights, name: expected})
    assert log[0][1] == f'{name}: adapted from 3 to {channels} image channels'
    assert ': 100.0% of its tensors' in log[1][1]
    # Weights for these channels stay as they are, and weights for others than three are refused.
    weights = weights_of(kind, in_channels=channels)
    file = save(tmp_path, weights)
    log.clear()
    assert_equal(initialise(kind, file, in_channels=channels).state_dict(), weights)
    assert len(log) == 1
    for other in (3, 5):
        text = error_of(initialise, kind, file, in_channels=other)
        assert f'wrong shape: {name} (file: [' in text


def test_all_convolutions_that_read_the_image_are_adapted():
    """repvgg's first block has two, side by side."""
    options = dict(type='mmdense.TimmBackbone', model_name='repvgg_a0')
    torch.manual_seed(0)
    weights = MODELS.build(options).state_dict()
    net = MODELS.build(dict(**options, in_channels=1))
    assert load_into(net, weights)[1].share() == 1
    for kernel in ('conv_kxk', 'conv_1x1'):
        adapted = net.state_dict()[f'stem.{kernel}.conv.weight']
        torch.testing.assert_close(adapted, weights[f'stem.{kernel}.conv.weight'].sum(1, True))


# Models that rename or refuse tensors


def condensed_weights():
    net = build('CondenseNetV2', seed=1)
    net.prune_to(1)
    net.condense()
    return net.state_dict()


OTHER_FORM = (
    "these are CondenseNetV2 weights of form='condensed', the network is of form='learned': "
    "build it with form='condensed'"
)


def test_another_form_of_condensenetv2(tmp_path):
    weights = condensed_weights()
    file = save(tmp_path, weights)
    assert error_of(initialise, 'CondenseNetV2', file).startswith(f'{file}: {OTHER_FORM}')
    learned = save(tmp_path, weights_of('CondenseNetV2'), 'learned.pth')
    text = error_of(initialise, 'CondenseNetV2', learned, form='condensed')
    assert "build it with form='learned'" in text
    net = initialise('CondenseNetV2', file, form='condensed')
    assert_equal(net.state_dict(), weights)
    checkpoint = dict(state_dict=with_prefix('backbone.', weights))
    assert error_of(load_by_hook, Classifier('CondenseNetV2'), checkpoint) == OTHER_FORM


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

    report = load_into(Twice(), nn.Linear(2, 2).state_dict())[1]
    assert len(report.loaded) == 4
    assert not report.missing


def test_tensors_that_a_model_resizes_itself():
    """Some networks of mmpretrain do so with position embeddings."""

    class Resized(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):
            state_dict[f'{prefix}bias'] = state_dict[f'{prefix}bias'][:2]
            super()._load_from_state_dict(state_dict, prefix, *rest)

    report = load_into(Resized(2, 2), {'weight': torch.ones(3, 2), 'bias': torch.ones(3)})[1]
    assert report.loaded == ('bias',)
    assert report.wrong_shape == {'weight': '(file: [3, 2]; model: [2, 2])'}


# Loads of a runner


class Classifier(BaseModel):
    """A backbone and a linear layer."""

    def __init__(self, kind='RDNet', classes=2, **options):
        super().__init__()
        self.backbone = build(kind, **options)
        self.fc = nn.Linear(self.backbone.out_channels[-1], classes)
        self.calls = 0

    def forward(self, images, labels, mode='tensor'):
        self.calls += 1
        scores = self.fc(self.backbone(images)[-1].mean((2, 3)))
        return dict(loss=F.cross_entropy(scores, labels)) if mode == 'loss' else scores


class Start(Hook):
    """Keep the weights, and their average, as they are when training begins."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.model = {k: v.clone() for k, v in runner.model.state_dict().items()}
        for average in averages_of(runner):
            self.average = {k: v.clone() for k, v in average.items()}


def averages_of(runner):
    emas = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    return [hook.ema_model.module.state_dict() for hook in emas]


@pytest.fixture
def train(tmp_path, short_runs):  # noqa: F811
    """Return a function that trains for two iterations: (runner, what was loaded)."""

    def run(model, name='run', hooks=(), part='backbone', min_loaded=1.0, **options):
        channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
        generator = torch.Generator().manual_seed(0)
        data = [(torch.randn(channels, 32, 32, generator=generator), i % 2) for i in range(8)]
        start = Start()
        hooks = [*hooks, LoadReportHook(min_loaded, part), start]
        runner = make_runner(tmp_path / name, model, data, hooks=hooks, **options)
        runner.train()
        return runner, start

    return run


EMA = dict(type='EMAHook', momentum=0.5)


def classifier_weights(kind='RDNet', classes=2, **options):
    torch.manual_seed(2)
    head = Classifier(kind, classes).state_dict()
    return OrderedDict({**head, **with_prefix('backbone.', weights_of(kind, **options))})


def test_a_runner_loads_a_backbone_beside_other_heads(train, log, tmp_path):
    weights = classifier_weights(classes=7)
    model = Classifier()
    fresh = {f'fc.{k}': v.clone() for k, v in model.fc.state_dict().items()}
    _, start = train(model, load_from=save(tmp_path, weights))
    assert model.calls == 2
    assert_equal(start.model, {**weights, **fresh})
    ((level, text),) = log
    assert level == logging.WARNING
    assert text.startswith('Classifier from the checkpoint: ')
    number, _, names = table(text)['wrong shape']
    assert number == 2
    assert names.startswith('fc.weight (file: [7, ')


def test_the_report_is_in_the_log_of_the_run(train, tmp_path):
    runner, _ = train(Classifier(), load_from=save(tmp_path, classifier_weights()))
    (file,) = Path(runner.log_dir).glob('*.log')
    assert 'Classifier from the checkpoint: 100.0% of its tensors' in file.read_text()


def test_a_runner_stops_before_the_first_iteration(train, tmp_path):
    weights = classifier_weights()
    del weights['backbone.stem.0.bias']
    model = Classifier()
    text = error_of(train, model, load_from=save(tmp_path, weights))
    number = len(model.backbone.state_dict())
    assert text == (
        f'the checkpoint fills {number - 1} of {number} tensors of backbone of Classifier: '
        'missing: backbone.stem.0.bias'
    )
    assert model.calls == 0
    text = error_of(train, Classifier(), load_from=save(tmp_path, weights_of('RDNet')))
    assert "would match with the prefix 'backbone.'" in text
    assert 'name the file in model.backbone.init_cfg.checkpoint' in text


def test_part_and_share_of_the_hook(train, log, tmp_path):
    weights = classifier_weights()
    del weights['fc.bias']
    file = save(tmp_path, weights)
    train(Classifier(), load_from=file)
    for part in ('', 'neck'):  # without such a part the complete model counts
        text = error_of(train, Classifier(), part=part, load_from=file)
        assert 'of Classifier: missing: fc.bias' in text
    share = (len(weights) - 0.5) / (len(weights) + 1)
    train(Classifier(), part='', min_loaded=share, load_from=file)
    del weights['backbone.stem.0.bias']
    file = save(tmp_path, weights)
    error_of(train, Classifier(), part='', min_loaded=share, load_from=file)
    log.clear()
    train(Classifier(), min_loaded=0, load_from=save(tmp_path, {'a.weight': torch.zeros(3)}))
    ((level, text),) = log
    assert level == logging.WARNING
    assert ': 0.0% of its tensors' in text


def as_released(weights):
    """Return a classifier's weights with the names of RDNet's released detectors."""
    return {k.replace('backbone.', 'backbone.timm_model.'): v for k, v in weights.items()}


@pytest.mark.parametrize(
    'change',
    [
        lambda weights: dict(state_dict=weights),
        lambda weights: dict(model=weights),
        lambda weights: dict(state_dict=with_prefix('module.', weights)),
        lambda weights: dict(state_dict=as_released(weights)),
        lambda weights: dict(state_dict={}, state_dict_ema=weights),
        lambda weights: dict(state_dict=classifier_weights(seed=3), state_dict_ema=weights),
    ],
    ids=['plain', 'entry', 'wrapper', 'released', 'average', 'average first'],
)
def test_models_and_averages_start_from_the_checkpoint(change, train, tmp_path):
    weights = classifier_weights()
    torch.save(change(weights), tmp_path / 'x.pth')
    _, start = train(Classifier(), hooks=[EMA], part='', load_from=str(tmp_path / 'x.pth'))
    assert start.model.keys() == weights.keys()
    assert_equal(start.model, weights)
    assert_equal(start.average, weights)


def test_a_runner_adapts_channels(train, log, tmp_path):
    weights = classifier_weights()
    file = save(tmp_path, weights)
    _, start = train(Classifier(in_channels=4), hooks=[EMA], load_from=file)
    name = 'backbone.stem.0.weight'
    weights[name] = adapt_input_conv(4, weights[name])
    assert_equal(start.model, weights)
    assert_equal(start.average, weights)
    assert log[0][1] == f'{name}: adapted from 3 to 4 image channels'


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ('model = dict(data_preprocessor=dict(mean=[1, 2.5, 3], std=[4.5, 5, 6], type="X"))', None),
        (
            'data_preprocessor = dict(std=[7.0, 5, 6])',
            'std [7.0, 5, 6], but data_preprocessor has [4.5, 5.0, 6.0]',
        ),
        (
            'model = dict(data_preprocessor=dict(mean=None))',
            'mean None, but data_preprocessor has [1.0, 2.5, 3.0]',
        ),
        ('data_preprocessor = base', None),
        ('data_preprocessor = dict(mean=[exit()])', None),  # nothing is executed
        ('data_preprocessor = (', None),
        (None, None),
    ],
)
def test_another_normalization_is_a_warning(config, message, log):
    model = nn.Linear(2, 2)
    model.data_preprocessor = ImgDataPreprocessor(mean=[1, 2.5, 3], std=[4.5, 5, 6])
    checkpoint = dict(meta=dict(cfg=config), state_dict=nn.Linear(2, 2).state_dict())
    loading.load_checked(model, checkpoint, source='x.pth')
    warnings = [text for level, text in log if level == logging.WARNING]
    assert warnings == ([f'x.pth was trained with {message}'] if message else [])


@pytest.mark.parametrize('hooks', [[], [EMA]], ids=['', 'EMA'])
def test_resuming(hooks, train, tmp_path):
    first, _ = train(Classifier(), 'a', hooks=hooks)
    expected = {k: v.clone() for k, v in first.model.state_dict().items()}
    model = Classifier(seed=3)
    file = tmp_path / 'a/iter_2.pth'
    options = dict(hooks=hooks, iters=4, resume=True)
    runner, start = train(model, 'b', load_from=str(file), **options)
    assert (model.calls, runner.iter) == (2, 4)
    assert_equal(start.model, expected)
    for average in averages_of(first):
        assert_equal(start.average, average)
        assert not torch.equal(start.average['fc.weight'], start.model['fc.weight'])
    # A run without its head is not resumed.
    state = read_checkpoint(file)
    del state['state_dict']['fc.bias']
    torch.save(state, file)
    model = Classifier()
    text = error_of(train, model, 'c', load_from=str(file), **options)
    assert text.endswith('tensors of Classifier: missing: fc.bias')
    assert model.calls == 0


def load_by_hook(model, checkpoint, part='backbone', resume=False):
    """Do what a runner does with a checkpoint before it loads it."""
    hook = HOOKS.build(dict(type='mmdense.LoadReportHook', part=part))
    hook.after_load_checkpoint(SimpleNamespace(model=model, _resume=resume), checkpoint)


def test_the_hook_leaves_fitting_checkpoints_alone():
    weights = classifier_weights()
    checkpoint = dict(state_dict=weights, meta=dict(epoch=3))
    load_by_hook(Classifier(), checkpoint, resume=True)
    assert checkpoint['state_dict'] is weights
    assert checkpoint['meta'] == dict(epoch=3)


@pytest.mark.parametrize('resume', [False, True])
def test_a_complete_model_needs_its_output_norms(resume):
    """Tested or resumed, it would go on with norms that were never trained."""
    checkpoint = dict(state_dict=classifier_weights())
    with pytest.raises(UserError, match=r'missing: backbone\.output_norms\.0\.weight'):
        load_by_hook(Classifier(output_norm=True), checkpoint, part='', resume=resume)
