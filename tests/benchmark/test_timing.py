"""Interleaved rounds, and the costs of complete models."""

import json
import re
import time

import pytest
import torch
from torch import nn

from mmdense.benchmark.memory import build_training, random_batch
from mmdense.benchmark.timing import (
    Conditions,
    Run,
    deployed_copy,
    inference_run,
    measure,
    measure_configs,
    seconds_of,
)
from mmdense.config.channels import build_part
from mmdense.config.edit import use_amp
from mmdense.config.read import load_config
from mmdense.flops import count_parameters
from mmdense.models import TimmBackbone
from support import DEMOS, ROOT

WITHOUT = ROOT / 'configs/detection/rexnet/retinanet_rexnet-1.0_fpn_1x_coco.py'


def make_run(calls, name, fails=False):
    net = nn.Linear(1000, 1000)

    def run(number):
        calls.append((name, number))
        if fails:
            raise RuntimeError('out of order\nand more')
        return net(torch.zeros(64, 1000))

    return Run(net, lambda number: number, run, 4)


def test_rounds_are_interleaved_and_a_failing_run_is_left_out():
    calls = []
    runs = {name: make_run(calls, name, fails=name == 'c') for name in 'abc'}
    results = measure(runs, rounds=8, device='cpu')
    assert results['c'] == dict(error='RuntimeError: out of order')
    assert [name for name, _ in calls[:3]] == ['a', 'b', 'c']  # for their memory
    timed = calls[3:]
    assert len(timed) == 2 * 2 * 8
    for number in range(8):
        names = [name for name, i in timed[4 * number : 4 * number + 4] if i == number]
        assert names in (['a', 'a', 'b', 'b'], ['b', 'b', 'a', 'a'])
    for name in 'ab':
        row = results[name]
        assert 0 < row['p50'] <= row['p95']
        assert row['throughput'] == pytest.approx(4 / row['p50'])
        assert row['memory'] == 4 * (1000 * 1000 + 1000 + 64 * 1000 + 64 * 1000)
    fastest = min(results[name]['p50'] for name in 'ab')
    assert [results[n]['ratio'] for n in 'ab' if results[n]['p50'] == fastest] == [1]


@pytest.mark.parametrize(
    ('device', 'calls'),
    [('cpu', ['clock', 'run', 'clock']), ('cuda', ['wait', 'clock', 'run', 'wait', 'clock'])],
)
def test_a_gpu_has_nothing_queued_at_both_ends_of_a_time(gpu, monkeypatch, device, calls):
    clock = iter((1.0, 3.5))
    monkeypatch.setattr(time, 'perf_counter', lambda: gpu.append('clock') or next(clock))
    assert seconds_of(lambda: gpu.append('run'), device) == 2.5
    assert gpu == calls


def test_memory_on_a_gpu_is_that_of_the_second_run(gpu):
    """It includes what a model caches, and not what the process had allocated before."""

    class Model:
        def to(self, device):
            gpu.bytes = {'meta': 700, 'cpu': 300}[device]
            gpu.append(f'to {device}')

        def zero_grad(self, set_to_none):
            gpu.append('no gradients')

    def run(number):
        gpu.append('run')
        gpu.bytes, gpu.peak = 750, max(gpu.peak, 5000 if 'no gradients' not in gpu else 1750)

    results = measure(dict(a=Run(Model(), int, run, 1)), rounds=0, device='meta')
    assert results == dict(a=dict(memory=1750 - 300))
    assert gpu == ['to meta', 'run', 'no gradients', 'reset', 'run', 'no gradients', 'to cpu']


@pytest.mark.parametrize('task', DEMOS)
def test_complete_models(task):
    """In mixed precision as well, without a GPU; the config is not changed."""
    cfg = load_config(str(DEMOS[task]))
    use_amp(cfg, 'float16')
    plain, deployed = (
        measure_configs({'demo': cfg}, size=(64, 96), rounds=2, deployed=deployed)[0]
        for deployed in (False, True)
    )
    assert 'error' not in plain
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    model = build_part(cfg.model, cfg.default_scope)
    total = sum(part['parameters'] for part in plain['parts'].values())
    assert total == count_parameters(model)
    assert plain['parts'] == deployed['parts']
    assert plain['parts']['backbone']['activations'] > 0
    for kind, images in (('infer', 1), ('train', 2)):
        assert plain[kind]['throughput'] == pytest.approx(images / plain[kind]['p50'])
    assert plain['train']['memory'] > plain['infer']['memory'] > 4 * total


@pytest.mark.parametrize(
    ('precision', 'weights', 'outputs'),
    [
        ('fp32', torch.float32, torch.float32),
        ('amp', torch.float32, torch.float16),
        ('bf16', torch.bfloat16, torch.bfloat16),
    ],
)
def test_precision_and_memory_format(precision, weights, outputs):
    model = build_training(load_config(str(DEMOS['segmentation'])), 'cpu')[0].eval()
    conditions = Conditions(precision=precision, channels_last=True)
    conditions.prepare(model, 'trained')
    seen = []
    model.backbone.register_forward_hook(lambda module, args, maps: seen.append(maps[0]))
    batch = random_batch(2, (64, 96), scope='mmseg')
    assert len(inference_run(model, lambda number: batch, 2, precision)(0)()) == 2
    assert (len(seen[0]), seen[0].dtype) == (2, outputs)
    weight = model.backbone.stem[0].weight
    assert weight.dtype == weights
    assert weight.is_contiguous(memory_format=torch.channels_last)
    formats = [c.record('trained')['memory_format'] for c in (conditions, Conditions())]
    assert formats == ['channels_last', 'contiguous']


def test_other_backbones_deploy_too():
    model = nn.Module()
    model.backbone = TimmBackbone(model_name='test_resnet')
    deployed = deployed_copy(model, (64, 64))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_counts_alone_need_no_weights_and_no_size():
    """And a config that fails is a row."""
    bad = load_config(str(DEMOS['detection']), options={'model.backbone.arch': 'tinny'})
    failed, row = measure_configs(dict(bad=bad, recipe=load_config(str(WITHOUT))), rounds=0)
    assert "unknown arch 'tinny'" in failed['error']
    assert row['size'] == (800, 1344)
    assert row['infer'] is None
    assert [*row['parts']] == ['backbone', 'neck', 'bbox_head']
    assert 5e9 < row['parts']['backbone']['macs'] < 10e9


def test_get_flops(call_tool, tmp_path):
    file = tmp_path / 'costs/x.json'
    arguments = [DEMOS['segmentation'], '--size', 64, 96, '--json', file, '--device', 'cpu']
    status, output, _ = call_tool('get_flops', *arguments, '--rounds', 1, '--deploy')
    assert status == 0
    assert 'upernet_rdnet-nano_400i_digits-192x192 at 64 x 96' in output
    assert 'MACs (G)' in output
    assert re.search(r'^training, batch 2: median \d+ ms, p95 \d+ ms,', output, re.MULTILINE)
    (row,) = json.loads(file.read_text())['rows']
    assert row['form'] == 'deployed'
    wrong = ['--cfg-options', 'model.backbone.arch=tinny']
    status, output, _ = call_tool('get_flops', *arguments, '--rounds', 0, *wrong)
    assert status == 1
    assert re.search("^error: .*unknown arch 'tinny'", output, re.MULTILINE)
