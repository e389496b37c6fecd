"""The harness: same weights, same maps, what is recorded, and what the page says of it."""

import json
import sys

import pytest
import torch

from dev.benchmark import compare as harness
from dev.benchmark.compare import MMDENSE, Contender, Setting, compare, contenders, peak_memory
from dev.benchmark.networks import NETWORKS
from dev.benchmark.report import markdown
from mmdense.benchmark.timing import machine
from mmdense.errors import UserError
from support import ROOT

TOOL = ROOT / 'tools/benchmark.py'
SMALL = Setting('rexnet_100', size=(64, 96), batch=2)
PAIRS = [
    (name, peer)
    for name, network in NETWORKS.items()
    for peer in network.peers
    if peer != 'official'  # condensing looks at values
]


@pytest.mark.parametrize(('name', 'peer'), PAIRS)
@torch.no_grad()
def test_every_peer_takes_our_weights(name, peer):
    with torch.device('meta'):
        ours = NETWORKS[name].build().eval()
        theirs = NETWORKS[name].peers[peer](ours)
        x = torch.empty(1, 3, 64, 96)
        assert [m.shape for m in theirs(x)] == [m.shape for m in ours(x)]


@pytest.mark.parametrize(
    ('name', 'peer'),
    [
        ('rdnet_tiny', 'timm'),
        ('densenet121', 'timm'),
        ('densenet121', 'torchvision'),
        ('rexnet_100', 'timm'),
        ('condensenetv2_a', 'official'),
    ],
)
@torch.no_grad()
def test_peers_compute_the_same(name, peer):
    ours = NETWORKS[name].create().double()
    theirs = NETWORKS[name].peers[peer](NETWORKS[name].create()).double()
    x = torch.randn(2, 3, 64, 96).double()
    for a, b in zip(theirs(x), ours(x), strict=True):
        assert b.std() > 0
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


def test_weights_are_not_trivial():
    state = NETWORKS['densenet121'].create().state_dict()
    for leaf in ('norm1.weight', 'norm1.bias', 'norm1.running_mean', 'norm1.running_var'):
        values = state[f'features.denseblock2.denselayer3.{leaf}']
        assert values.std() > 0.05
    again = NETWORKS['densenet121'].create().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())


def test_contenders():
    names = [c.name for c in contenders(Setting('densenet121', mode='train'))]
    assert 'mmdense' in names
    assert 'mmdense, lean, channels-last' in names
    assert 'torchvision_memory_efficient, channels-last, compiled' in names
    names = [c.name for c in contenders(Setting('condensenetv2_a'), compiled=False)]
    assert names == [
        'mmdense',
        'mmdense, channels-last',
        'mmdense, deployed',
        'mmdense, deployed, channels-last',
        'official',
        'official, channels-last',
    ]
    names = [
        c.name for c in contenders(Setting('densenet121')) if c.compiled and c.library == MMDENSE
    ]
    assert names == ['mmdense, deployed, channels-last, compiled']
    names = [c.name for c in contenders(Setting('densenet121'), against=['torchvision'])]
    assert not any(name.startswith(('timm', 'torchvision_')) for name in names)


@pytest.mark.parametrize(
    ('setting', 'against', 'said'),
    [
        (Setting('densenet12'), None, 'no network densenet12'),
        (Setting('densenet121', mode='eval'), None, 'mode is eval'),
        (Setting('rexnet_100'), ['torchvision'], 'torchvision has no rexnet_100; timm has'),
    ],
)
def test_what_is_unknown(setting, against, said):
    with pytest.raises(UserError, match=said):
        contenders(setting, against=against)


@pytest.mark.parametrize(
    ('mode', 'dtype', 'tolerance'),
    [('infer', 'float32', 1e-4), ('infer', 'bfloat16', 0.2), ('train', 'float32', 1e-2)],
)
def test_compare_measures_all(mode, dtype, tolerance):
    setting = Setting('rexnet_100', mode, (64, 96), 4, dtype)  # gates norm one value per image
    told = []
    result = compare(setting, compiled=False, rounds=2, memory=False, progress=told.append)
    assert told[-1] == 'round 2 of 2'
    names = {contender.name for contender in contenders(setting, compiled=False)}
    assert result['contenders'].keys() == names
    assert result['peer'].startswith('timm')
    assert result['contenders'][result['peer']]['ratio'] == 1
    for row in result['contenders'].values():
        low, high = row['interval']
        assert 0 < low <= row['ratio'] <= high
        assert 0 < row['error'] < tolerance
    assert 'mmdense' not in result['inexact']  # it does what timm does
    assert json.loads(json.dumps(result))['setting']['network'] == 'rexnet_100'


def test_a_wrong_result_is_seen(monkeypatch):
    build = Contender.build

    def wrong(self, setting):
        net = build(self, setting)
        if self.library == 'mmdense':
            net.register_forward_hook(lambda module, x, maps: tuple(1.001 * m for m in maps))
        return net

    monkeypatch.setattr(Contender, 'build', wrong)
    result = compare(SMALL, compiled=False, rounds=1, memory=False)
    assert set(result['inexact']) == {n for n in result['contenders'] if n.startswith('mmdense')}
    assert 'further from float64' in markdown([{**machine(), 'results': [result]}])


def test_one_that_fails_is_a_row(monkeypatch):
    build = Contender.build

    def fail(self, setting):
        if self.channels_last:
            raise RuntimeError('no such format\nand more')
        return build(self, setting)

    monkeypatch.setattr(Contender, 'build', fail)
    result = compare(SMALL, compiled=False, rounds=1, memory=False)
    failed = {name: row for name, row in result['contenders'].items() if 'failed' in row}
    assert set(failed) >= {'mmdense, channels-last', 'timm, channels-last'}
    assert failed['timm, channels-last'] == dict(failed='RuntimeError: no such format')
    assert '| RuntimeError: no such format |' in markdown([{**machine(), 'results': [result]}])
    monkeypatch.setattr(Contender, 'build', lambda self, setting: 1 / (self.library == 'mmdense'))
    with pytest.raises(UserError, match='no peer of rexnet_100 could be run'):
        compare(SMALL, compiled=False, rounds=1, memory=False)


def test_training_in_mixed_precision():
    setting = Setting('rexnet_100', 'train', (64, 96), 2, 'bfloat16')
    contender = Contender('mmdense')
    net = contender.build(setting)
    kept = []
    net.features[3].conv_pwl.conv.register_forward_hook(lambda m, x, y: kept.append(y.dtype))
    contender.runner(net, setting)()
    assert kept == [torch.bfloat16]
    assert next(net.parameters()).grad.dtype == torch.float32


def test_training_has_gradients_and_inference_none():
    for mode in ('train', 'infer'):
        setting = Setting('rexnet_100', mode, (64, 96), 2)
        contender = Contender('mmdense')
        net = contender.build(setting)
        contender.runner(net, setting)()
        found = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters()]
        assert all(found) if mode == 'train' else not any(found)
        assert net.training == (mode == 'train')


def test_forms_are_built():
    for form, memory in (('', 'plain'), ('lean', 'lean'), ('recompute', 'recompute')):
        assert Contender('mmdense', form).build(Setting('rexnet_100', 'train')).memory == memory
    deployed = Contender('mmdense', 'deployed').build(Setting('condensenetv2_a'))
    assert deployed.form == 'deployed'
    last = Contender('timm', channels_last=True).build(SMALL)
    assert last.stem.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_summary_names_the_fastest():
    rows = {
        'mmdense': dict(ratio=0.9, interval=[0.8, 1.0], error=1e-7, memory=2_000_000),
        'mmdense, deployed': dict(ratio=1.3, interval=[1.2, 1.4], error=1e-7),
        'timm': dict(ratio=0.8, interval=[0.8, 0.8], error=1e-7),
        'timm, channels-last': dict(ratio=1.0, interval=[1.0, 1.0], error=1e-7),
    }
    result = dict(
        setting=dict(network='rexnet_100', mode='infer', size=[512, 512], batch=1, dtype='float32'),
        rounds=30,
        peer='timm, channels-last',
        inexact=['mmdense'],
        contenders=rows,
    )
    text = markdown([{**machine(), 'results': [result]}])
    assert (
        '| rexnet_100 | float32 | deployed | timm, channels-last | 1.30 | 1.20 to 1.40 | '
        '1.1 (met) |'
    ) in text
    assert '| mmdense | 0.90 | 0.80 to 1.00 | 1.0e-07 | 2 |' in text


def test_the_summary_of_training_goes_by_each_peer():
    rows = {
        'mmdense': dict(ratio=0.9, memory=100),
        'mmdense, lean': dict(ratio=0.8, memory=40),
        'mmdense, lean, channels-last': dict(ratio=1.1, memory=30),
        'torchvision': dict(ratio=1.0, memory=100),
        'torchvision, channels-last': dict(ratio=0.7, memory=90),
        'torchvision_memory_efficient': dict(ratio=0.5, memory=50),
        'timm': dict(failed='RuntimeError: none'),
    }
    for row in rows.values():
        if 'ratio' in row:
            row.update(interval=[row['ratio']] * 2, error=1e-7)
    setting = dict(network='densenet121', mode='train', size=[512, 512], batch=2, dtype='float32')
    result = dict(setting=setting, rounds=6, peer='torchvision', inexact=[], contenders=rows)
    text = markdown([{**machine(), 'results': [result]}])
    assert '| densenet121 | float32 | plain | torchvision | 0.90 | 1.00 |  |' in text
    lean = '| densenet121 | float32 | lean | torchvision'
    assert f'{lean} | 1.10 | 0.30 | 0.333 at 1.0 (met) |' in text
    assert f'{lean}_memory_efficient | 2.20 | 0.60 | 0.65 at 1.0 (met) |' in text
    assert '### Inference' not in text
    rows['mmdense, lean, channels-last']['memory'] = 34
    result['inexact'] = ['mmdense, recompute', 'mmdense']
    text = markdown([{**machine(), 'results': [result]}])
    assert f'{lean} | 1.10 | 0.34 | 0.333 at 1.0 (not met) |' in text
    assert '| plain (further from float64 than the peers) | torchvision | 0.90 | 1.00 |  |' in text


def test_intervals_hold_the_median():
    low, high = harness._interval([1.0, 1.1, 1.2, 1.3, 1.4] * 6)
    assert 1.0 < low <= 1.2 <= high < 1.4


@pytest.mark.slow
def test_memory_grows_with_images():
    small, large = (
        peak_memory(Contender('timm'), Setting('rexnet_100', 'train', (side, side), 2))
        for side in (128, 384)
    )
    assert large > 3 * small > 0


@pytest.mark.slow
def test_the_command(run_tool, tmp_path):
    file = tmp_path / 'results/x.json'
    command = [sys.executable, TOOL, 'compare', '--names', 'rexnet_100', 'condensenetv2_a']
    command += ['--size', 64, 64, '--rounds', 2, '--no-compile', '--no-memory', '--device', 'cpu']
    status, said = run_tool(*command, '--json', file)
    assert status == 0, said
    assert '### condensenetv2_a, inference, float32, 64 x 64, batch 1' in said
    record = json.loads(file.read_text())
    assert [result['setting']['network'] for result in record['results']] == [
        'rexnet_100',
        'condensenetv2_a',
    ]
    assert record['versions']['torch'] == torch.__version__
    status, said = run_tool(*command[:4], 'rexnet_100', '--against', 'torchvision')
    assert status == 2
    assert "error: none of ['torchvision'] has rexnet_100" in said
    status, said = run_tool(sys.executable, TOOL, 'report', '--check')
    assert status == 0, said
