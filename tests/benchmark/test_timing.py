"""Runs in rounds, and the costs of whole models."""

import pytest
import torch
from torch import nn

from mmdense.benchmark.memory import build_training
from mmdense.benchmark.timing import Run, measure, measure_configs
from mmdense.config.edit import use_amp
from mmdense.config.read import load_config
from mmdense.flops import count_parameters
from support import DEMOS, ROOT

WITHOUT = ROOT / 'configs/detection/rexnet/retinanet_rexnet-1.0_fpn_1x_coco.py'


def run_of(seen, name, fails=False):
    net = nn.Linear(1000, 1000)

    def run(x):
        seen.append((name, x))
        if fails:
            raise RuntimeError('out of order\nand more')
        return net(torch.zeros(64, 1000))

    return Run(net, lambda i: i, run, 4)


def test_rounds_are_interleaved_and_what_fails_is_left_out():
    seen = []
    runs = {name: run_of(seen, name, fails=name == 'c') for name in 'abc'}
    found = measure(runs, rounds=8, device='cpu')
    assert found['c'] == dict(error='RuntimeError: out of order')
    assert [name for name, _ in seen[:3]] == ['a', 'b', 'c']  # for their memory
    timed = seen[3:]
    assert len(timed) == 2 * 2 * 8
    for number in range(8):
        names = [name for name, i in timed[4 * number : 4 * number + 4] if i == number]
        assert names in (['a', 'a', 'b', 'b'], ['b', 'b', 'a', 'a'])
    for name in 'ab':
        row = found[name]
        assert 0 < row['p50'] <= row['p95']
        assert row['throughput'] == pytest.approx(4 / row['p50'])
        assert row['memory'] == 4 * (1000 * 1000 + 1000 + 64 * 1000 + 64 * 1000)
    fastest = min(found['a']['p50'], found['b']['p50'])
    assert [found[name]['ratio'] for name in 'ab' if found[name]['p50'] == fastest] == [1]


@pytest.mark.parametrize('task', DEMOS)
def test_whole_models(task):
    cfg = load_config(str(DEMOS[task]))
    plain, deployed = (
        measure_configs({'demo': cfg}, size=(64, 96), rounds=2, deployed=deployed)[0]
        for deployed in (False, True)
    )
    assert 'error' not in plain
    model, _ = build_training(cfg, 'cpu')
    whole = sum(part['parameters'] for part in plain['parts'].values())
    assert whole == count_parameters(model)
    assert plain['parts'] == deployed['parts']
    assert plain['parts']['backbone']['activations'] > 0
    for kind, images in (('infer', 1), ('train', 2)):
        assert plain[kind]['throughput'] == pytest.approx(images / plain[kind]['p50'])
    assert plain['train']['memory'] > plain['infer']['memory'] > 4 * whole


def test_a_recipe_in_mixed_precision_is_measured_without_a_gpu():
    cfg = load_config(str(DEMOS['detection']))
    use_amp(cfg, 'float16')
    (row,) = measure_configs({'demo': cfg}, size=(64, 64), batch=1, rounds=1)
    assert 'error' not in row
    assert row['train']['p50'] > 0
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper', 'the config is left alone'


def test_counts_alone_need_no_weights_and_no_size():
    (row,) = measure_configs({'recipe': load_config(str(WITHOUT))}, rounds=0)
    assert row['size'] == (800, 1344)
    assert row['infer'] is None
    assert [*row['parts']] == ['backbone', 'neck', 'bbox_head']
    assert 5e9 < row['parts']['backbone']['macs'] < 10e9


def test_a_config_that_fails_is_a_row():
    good, bad = (load_config(str(DEMOS['detection'])) for _ in range(2))
    bad.model.backbone.arch = 'tinny'
    rows = measure_configs(dict(bad=bad, good=good), size=(64, 64), rounds=0)
    assert "unknown arch 'tinny'" in rows[0]['error']
    assert rows[1]['parts']
