"""Comparisons of whole detectors on mmdense's and timm's backbones."""

import json
from dataclasses import replace

import pytest
import torch

from dev.benchmark import detectors
from dev.benchmark.__main__ import main
from dev.benchmark.compare import Contender, Setting
from dev.benchmark.detectors import build, compare_detectors
from mmdense.errors import UserError

SMALL = Setting('rexnet_100', 'train', (64, 64), 2)


def test_configurations():
    names = [c.name for c in detectors.detectors('infer', forms=['plain', 'deployed', 'lean'])]
    assert names == [
        'mmdense',
        'mmdense, channels-last',
        'mmdense, channels-last, compiled',
        'mmdense, deployed, channels-last',
        'mmdense, deployed, channels-last, compiled',
        'timm',
        'timm, channels-last',
        'timm, channels-last, compiled',
    ]
    names = [c.name for c in detectors.detectors('train', forms=['lean'], compiled=False)]
    assert names == [
        'mmdense, lean',
        'mmdense, lean, channels-last',
        'timm',
        'timm, channels-last',
    ]


@pytest.mark.slow
def test_steps_are_the_same_each_time():
    run = build(Contender('timm', channels_last=True), SMALL, {})
    assert type(run.model.backbone).__module__.startswith('mmpretrain')
    gradients = []
    for _ in range(2):
        detectors._step(run)
        gradients.append(next(run.model.parameters()).grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_detectors_that_differ_are_not_timed(monkeypatch):
    def wrong(contender, setting, parts):
        run = build(contender, setting, parts)
        if contender.library == 'timm':
            with torch.no_grad():
                run.model.neck.lateral_convs[0].conv.bias += 1e-3
        return run

    monkeypatch.setattr(detectors, 'build', wrong)
    with pytest.raises(UserError, match='rexnet_100: mmdense and timm differ by'):
        compare_detectors(replace(SMALL, mode='infer'))


def test_batch_norms_of_a_single_value_are_an_error():
    with pytest.raises(UserError, match='rexnet_100: .* per channel .*use a larger --batch'):
        compare_detectors(replace(SMALL, batch=1))


@pytest.mark.slow
def test_detectors_agree_and_are_timed():
    result = compare_detectors(SMALL, compiled=False, rounds=1)
    assert result['setting']['network'] == 'faster-rcnn_rexnet-1.0_fpn_1x_coco'
    assert result['peer'].startswith('timm')
    assert result['contenders'][result['peer']]['ratio'] == 1
    for row in result['contenders'].values():
        low, high = row['interval']
        assert 0 < low <= row['ratio'] <= high
        assert row['error'] < 1e-3


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    file = tmp_path / 'x.json'
    command = ['detectors', '--names', 'rexnet_100', '--mode', 'infer', '--size', '64', '64']
    command += ['--rounds', '1', '--no-compile', '--device', 'cpu', '--json', str(file)]
    main([*command, '--threads', str(torch.get_num_threads())])
    title = '### faster-rcnn_rexnet-1.0_fpn_1x_coco, inference, float32, 64 x 64, batch 2'
    assert title in capsys.readouterr().out
    names = json.loads(file.read_text())['results'][0]['contenders']
    assert 'mmdense, deployed, channels-last' in names
