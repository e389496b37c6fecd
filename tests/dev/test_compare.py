"""Comparisons of backbones: same weights, same outputs, what is recorded and reported."""

import json
import re
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from dev.benchmark.__main__ import main
from dev.benchmark.compare import (
    Contender,
    Setting,
    capture,
    compare,
    contenders,
    peak_memory,
    prepare,
)
from dev.benchmark.floors import Floor, device_peaks
from dev.benchmark.networks import NETWORKS
from dev.benchmark.report import best_result, markdown, training_results
from mmdense.benchmark.timing import machine
from mmdense.errors import UserError
from mmdense.flops import backbone_macs

SMALL = Setting('rexnet_100', size=(64, 96), batch=2)
PAIRS = [
    (name, peer)
    for name, network in NETWORKS.items()
    for peer in network.peers
    if peer != 'official'  # condensing reads weights, which the meta device does not have
]


@pytest.mark.parametrize(('name', 'peer'), PAIRS)
@torch.no_grad()
def test_peers_load_the_weights(name, peer):
    with torch.device('meta'):
        net = NETWORKS[name].build().eval()
        other = NETWORKS[name].peers[peer](net)
        x = torch.empty(1, 3, 64, 96)
        assert [y.shape for y in other(x)] == [y.shape for y in net(x)]


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
    net = NETWORKS[name].create().double()
    other = NETWORKS[name].peers[peer](NETWORKS[name].create()).double()
    x = torch.randn(2, 3, 64, 96).double()
    for a, b in zip(other(x), net(x), strict=True):
        assert b.std() > 0
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


def test_configurations():
    names = [c.name for c in contenders(Setting('densenet121', mode='train'))]
    assert 'mmdense' in names
    assert 'mmdense, lean, channels-last' in names
    assert 'torchvision_memory_efficient, channels-last, compiled' in names
    names = [c.name for c in contenders(Setting('densenet121', 'train', device='cuda'))]
    assert [n for n in names if 'unshared' in n] == ['mmdense, unshared, channels-last, compiled']
    names = [c.name for c in contenders(Setting('condensenetv2_a'), compiled=False)]
    assert names == [
        'mmdense',
        'mmdense, channels-last',
        'mmdense, deployed',
        'mmdense, deployed, channels-last',
        'official',
        'official, channels-last',
    ]
    names = [c.name for c in contenders(Setting('densenet121'), against=['torchvision'])]
    assert [n for n in names if n.startswith('mmdense') and n.endswith('compiled')] == [
        'mmdense, deployed, channels-last, compiled'
    ]
    assert not any(name.startswith(('timm', 'torchvision_')) for name in names)
    setting = Setting('rexnet_100', device='cuda')
    names = [c.name for c in contenders(setting, forms=['deployed'], graphs=True)]
    assert 'mmdense, channels-last' not in names
    assert [name for name in names if 'graph' in name] == [
        'mmdense, deployed, channels-last, CUDA graph',
        'mmdense, deployed, channels-last, compiled, CUDA graph',
        'timm, channels-last, CUDA graph',
        'timm, channels-last, compiled, CUDA graph',
    ]
    setting = Setting('rexnet_100', mode='train', device='cuda')
    assert not any(c.graph for c in contenders(setting, graphs=True))


@pytest.mark.parametrize(
    ('setting', 'options', 'message'),
    [
        (Setting('densenet12'), {}, 'no network densenet12'),
        (Setting('densenet121', mode='eval'), {}, 'mode is eval'),
        (
            Setting('rexnet_100'),
            dict(against=['torchvision']),
            'torchvision has no rexnet_100; choose from timm',
        ),
        (Setting('rexnet_100'), dict(forms=['lean']), 'has no forms .*; choose from .*deployed'),
        (Setting('rexnet_100'), dict(graphs=True), 'CUDA graphs need a GPU, .* device is cpu'),
    ],
)
def test_unknown_networks_modes_peers_and_forms(setting, options, message):
    with pytest.raises(UserError, match=message):
        contenders(setting, **options)


@pytest.mark.parametrize(
    ('mode', 'dtype', 'tolerance'),
    [('infer', 'float32', 1e-4), ('infer', 'bfloat16', 0.2), ('train', 'float32', 1e-2)],
)
def test_compare_measures_every_configuration(mode, dtype, tolerance):
    setting = Setting('rexnet_100', mode, (64, 96), 4, dtype)  # squeeze-excite norms need a batch
    lines = []
    result = compare(setting, compiled=False, rounds=2, memory=False, progress=lines.append)
    assert lines[-1] == 'round 2 of 2'
    names = {contender.name for contender in contenders(setting, compiled=False)}
    assert result['contenders'].keys() == names
    assert result['peer'].startswith('timm')
    assert result['contenders'][result['peer']]['ratio'] == 1
    for row in result['contenders'].values():
        low, high = row['interval']
        assert 0 < low <= row['ratio'] <= high
        assert 0 < row['error'] < tolerance
    assert 'mmdense' not in result['inexact']
    assert json.loads(json.dumps(result))['setting']['network'] == 'rexnet_100'


def test_a_larger_error_is_marked(monkeypatch):
    build = Contender.build

    def wrong(self, setting):
        net = build(self, setting)
        if self.library == 'mmdense':
            net.register_forward_hook(lambda module, x, y: tuple(1.001 * z for z in y))
        return net

    monkeypatch.setattr(Contender, 'build', wrong)
    result = compare(SMALL, compiled=False, rounds=1, memory=False)
    assert set(result['inexact']) == {n for n in result['contenders'] if n.startswith('mmdense')}
    assert 'larger error than the peers' in markdown([{**machine(), 'results': [result]}])


def test_a_configuration_that_fails_is_a_row(monkeypatch):
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
    assert '| RuntimeError: no such format ' in markdown([{**machine(), 'results': [result]}])
    monkeypatch.setattr(Contender, 'build', lambda self, setting: 1 / (self.library == 'mmdense'))
    with pytest.raises(UserError, match='all peers of rexnet_100 failed'):
        compare(SMALL, compiled=False, rounds=1, memory=False)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_training_uses_mixed_precision_and_float32_gradients(dtype):
    setting = Setting('rexnet_100', 'train', (64, 96), 2, dtype)
    net = Contender('mmdense').build(setting)
    dtypes = []
    net.features[3].conv_pwl.conv.register_forward_hook(lambda m, x, y: dtypes.append(y.dtype))
    Contender('mmdense').runner(net, setting)()
    assert dtypes == [getattr(torch, dtype)]
    assert net.training
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    if dtype == 'float32':  # in bfloat16 a few gradients are rounded to zero
        assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_inference_computes_no_gradients():
    net = Contender('mmdense').build(SMALL)
    Contender('mmdense').runner(net, SMALL)()
    assert not net.training
    assert all(p.grad is None for p in net.parameters())


def test_forms_are_built():
    for form, memory in (('', 'plain'), ('lean', 'lean'), ('recompute', 'recompute')):
        assert Contender('mmdense', form).build(Setting('rexnet_100', 'train')).memory == memory
    deployed = Contender('mmdense', 'deployed').build(Setting('condensenetv2_a'))
    assert deployed.form == 'deployed'
    net = Contender('timm', channels_last=True).build(SMALL)
    assert net.stem.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_fastest_configuration_is_reported():
    rows = {
        'mmdense': dict(ratio=0.9, interval=[0.8, 1.0], error=1e-7, memory=2_000_000),
        'mmdense, deployed': dict(ratio=1.3, interval=[1.2, 1.4], error=1e-7),
        'timm': dict(ratio=0.8, interval=[0.8, 0.8], error=1e-7),
        'timm, channels-last': dict(ratio=1.0, interval=[1.0, 1.0], error=1e-7),
    }
    setting = dict(network='rexnet_100', mode='infer', size=[512, 512], batch=1, dtype='float32')
    setting['device'] = 'cpu'
    peer = 'timm, channels-last'
    result = dict(setting=setting, rounds=30, peer=peer, inexact=['mmdense'], contenders=rows)
    assert best_result(result) == ('mmdense, deployed', rows['mmdense, deployed'])
    lines = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in markdown([{**machine(), 'results': [result]}]).splitlines()
    ]
    cells = ['rexnet_100', 'float32', 'deployed', peer, '1.30', '1.20 to 1.40', '1.3 (met)']
    assert cells in lines
    assert ['mmdense', '0.90', '0.80 to 1.00', '1.0e-07', '2'] in lines
    # The goals are a CPU's. Images are in the first table if they differ.
    gpu = dict(result, setting=dict(setting, device='cuda'))
    large = dict(gpu, setting=dict(gpu['setting'], size=[800, 1344], batch=16))
    text = markdown([{**machine(), 'results': [gpu, large]}])
    assert re.search(r'\| rexnet_100 \| float32 \| 800 x 1344, batch 16 \| deployed ', text)
    assert 'met)' not in text


def test_the_fastest_configuration_of_each_memory_mode_is_reported():
    rows = {
        'mmdense': dict(ratio=0.9, memory=100),
        'mmdense, channels-last': dict(ratio=0.88),
        'mmdense, channels-last, compiled': dict(ratio=1.0),
        'mmdense, lean': dict(ratio=0.8, memory=40),
        'mmdense, lean, channels-last': dict(ratio=1.1, memory=30),
        'mmdense, recompute': dict(failed='RuntimeError: none'),
        'torchvision': dict(ratio=1.0, memory=120),
        'timm': dict(failed='RuntimeError: none'),
    }
    for row in rows.values():
        row.update(interval=[0.9, 1.2], error=0)
    setting = dict(network='densenet121', mode='train', size=[512, 512], batch=2, dtype='float32')
    setting['device'] = 'cpu'
    inexact = ['mmdense, lean, channels-last']
    result = dict(setting=setting, rounds=6, peer='torchvision', inexact=inexact, contenders=rows)

    def cells():
        names = ('mmdense', 'speedup', 'goal', 'against plain', 'memory share')
        return [tuple(row[name] for name in names) for row in training_results(result)]

    plain, lean = 'channels-last, compiled', 'lean, channels-last (larger error than the peers)'
    assert cells() == [
        (plain, '1.00', '', '', ''),
        (lean, '1.10', '1.0 (met)', '1.25, goal 1.0 (met)', '0.25'),
    ]
    rows['mmdense, lean, channels-last']['ratio'] = 0.81
    assert cells() == [
        (plain, '1.00', '1.0 (met)', '', ''),
        (lean, '0.81', '', '0.92, goal 1.0 (missed)', '0.25'),
    ]
    detector = dict(setting, network='faster-rcnn_densenet-121_fpn_1x_coco')
    text = markdown([{**machine(), 'results': [dict(result, setting=detector)]}])
    assert re.search(r'### Detectors\n(.*\n)+.* training .* 1.00 .* 1.1 \(missed\)', text)


def test_a_captured_run_is_replayed(monkeypatch):
    """It is warmed up in a stream of its own, which waits for the images and is waited for."""
    calls = []

    class Stream:
        def wait_stream(self, other):
            calls.append(f'{self.name} waits for {other.name}')

    class Graph:
        def replay(self):
            calls.append('replay')

    main_stream, side = Stream(), Stream()
    main_stream.name, side.name = 'main', 'side'

    @contextmanager
    def noted(name):
        calls.append(f'{name} begins')
        yield
        calls.append(f'{name} ends')

    monkeypatch.setattr(torch.cuda, 'Stream', lambda: side)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: main_stream)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: noted(stream.name))
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Graph)
    monkeypatch.setattr(torch.cuda, 'graph', lambda graph: noted('graph'))
    results = iter('abcde')

    def run():
        calls.append('run')
        return next(results)

    alive = weakref.ref(run)
    replay = capture(run)
    del run
    assert alive()  # with the weights and images whose addresses are in the graph
    warm_up = [
        'side waits for main',
        'side begins',
        *['run'] * 3,
        'side ends',
        'main waits for side',
    ]
    assert calls == [*warm_up, 'graph begins', 'run', 'graph ends']
    assert replay() == replay() == 'd'  # that of the capture
    assert calls[len(warm_up) + 3 :] == ['replay', 'replay']


def test_graphs_are_what_is_timed_and_checked(monkeypatch):
    monkeypatch.setattr('dev.benchmark.compare.capture', lambda run: lambda: [y + 1 for y in run()])
    graph = Contender('mmdense', graph=True)
    net = graph.build(SMALL)
    plain, replayed = (Contender('mmdense', graph=g).runner(net, SMALL)() for g in (False, True))
    assert all(torch.equal(a + 1, b) for a, b in zip(plain, replayed, strict=True))


def test_memory_on_a_gpu_is_that_of_the_second_run(gpu, monkeypatch):
    """Above weights and images, with what the first run left to the network's caches."""

    def runner(self, net, setting):
        assert next(net.parameters()).is_meta
        gpu.bytes = 1000

        def run():
            gpu.append('run')
            gpu.bytes, gpu.peak = 1200, max(gpu.peak, 9999 if gpu == ['run'] else 4000)

        return run

    monkeypatch.setattr(Contender, 'runner', runner)
    monkeypatch.setattr('dev.benchmark.compare._error', lambda *_: 0.5)
    _, row = prepare(Contender('timm'), Setting('rexnet_100', device='meta'), [])
    assert row == dict(memory=4000 - 1000, error=0.5)
    assert gpu == ['run', 'reset', 'run']


def test_floors(monkeypatch):
    fast = dict(float32=1e30, bfloat16=1e30, bandwidth=1e30)
    setting = Setting('densenet121', size=(64, 96), batch=2)
    floor = Floor.of(setting, fast)
    assert floor.flops == 4 * backbone_macs(NETWORKS['densenet121'].build().to('meta'), (64, 96))
    half = Floor.of(replace(setting, dtype='bfloat16'), fast)
    assert 2 * half.bytes == floor.bytes
    assert Floor.of(setting, dict(fast, float32=1e9)).seconds == pytest.approx(floor.flops / 1e9)
    assert Floor.of(setting, dict(fast, bandwidth=1e9)).seconds == pytest.approx(floor.bytes / 1e9)
    # Each product is bound by one of them.
    seconds = Floor.of(setting, dict(fast, float32=1e9, bandwidth=floor.bytes / floor.flops * 1e9))
    assert floor.flops / 1e9 < seconds.seconds < 2 * floor.flops / 1e9
    # In training two products more of each convolution, but the first one's.
    training = Floor.of(replace(setting, mode='train'), fast)
    assert 2.7 * floor.flops < training.flops < 3 * floor.flops


def test_shares_of_the_floor_are_reported(gpu, monkeypatch):
    monkeypatch.setattr('dev.benchmark.floors.SIDE', 4)
    monkeypatch.setattr('dev.benchmark.floors.COPIED', 1000)
    precisions = []

    def seconds_of(run, device):
        precisions.append(torch.get_float32_matmul_precision())
        run()
        return 0.5

    monkeypatch.setattr('dev.benchmark.floors.seconds_of', seconds_of)
    assert device_peaks('cpu', ['float32']) == dict(float32=4.0, bandwidth=4000.0)
    assert {*precisions} == {'highest'}
    precisions.clear()
    peaks = device_peaks('meta')
    assert peaks == dict(float32=256.0, bfloat16=256.0, float16=256.0, bandwidth=4000.0)
    assert precisions[0] == 'high'
    assert torch.get_float32_matmul_precision() == precisions[-1] == 'highest'
    result = compare(SMALL, compiled=False, rounds=1, memory=False, peaks=peaks)
    floor = result['floor']
    for row in result['contenders'].values():
        assert row['of_floor'] > 1  # of what a GPU as slow could reach
        row['milliseconds'] = 1e3 * floor['seconds'] / row['of_floor']
    row['milliseconds'], row['of_floor'] = 0.125, 0.333
    table = markdown([{**machine(), 'results': [result]}])
    assert re.search(r'\| +ms \| +of floor \(%\) \|', table)
    assert re.search(r'\| +0.12 \| +33 \|', table)


@pytest.mark.slow
def test_memory_grows_with_images():
    small, large = (
        peak_memory(Contender('timm'), Setting('rexnet_100', 'train', (side, side), 2))
        for side in (128, 384)
    )
    assert large > 3 * small > 0


def test_the_command(tmp_path, capsys):
    file = tmp_path / 'results/x.json'
    command = ['compare', '--names', 'rexnet_100', 'condensenetv2_a', '--size', '64', '64']
    command += ['--rounds', '2', '--no-compile', '--no-memory', '--device', 'cpu']
    threads = torch.get_num_threads()
    main([*command, '--threads', str(threads), '--json', str(file)])
    output = capsys.readouterr().out
    assert '### condensenetv2_a, inference, float32, 64 x 64, batch 1' in output
    record = json.loads(file.read_text())
    names = [result['setting']['network'] for result in record['results']]
    assert names == ['rexnet_100', 'condensenetv2_a']
    assert record['versions']['torch'] == torch.__version__
    for arguments, message in [
        (['--against', 'torchvision'], "['torchvision'] do not have rexnet_100"),
        (['--json', str(file)], 'is from another machine or other versions'),
        (['--cuda-graphs'], 'error: CUDA graphs need a GPU, and the device is cpu'),
        (['--cuda-graphs', '--mode', 'train'], '--cuda-graphs is for inference'),
    ]:
        file.write_text(json.dumps({**record, 'device': 'another'}))
        with pytest.raises(SystemExit) as error:
            main(['compare', '--names', 'rexnet_100', '--device', 'cpu', *arguments])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
