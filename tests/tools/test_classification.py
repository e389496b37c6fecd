"""The tools with a classification config, on class folders."""

import inspect
import json
import pickle
from importlib.util import find_spec

import numpy as np
import pytest
import timm
import torch
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmdense.apis import Predictor
from mmdense.config.read import load_config
from mmdense.runtime import open_model
from support import ROOT, load_tool

pytest.importorskip('mmpretrain')
CONFIG = ROOT / 'configs/classification/demo/rdnet-nano_6e_digits.py'
EXPORTS = all(map(find_spec, ('onnx', 'onnxscript', 'onnxruntime'))) and (
    'custom_translation_table' in inspect.signature(torch.onnx.export).parameters
)
needs_onnx = pytest.mark.skipif(not EXPORTS, reason='needs the extra onnx and torch 2.6')
PRUNED = dict(layers=(1, 2), growth=(8, 8), groups=4)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A classifier with random weights."""
    return save(load_config(str(CONFIG)), tmp_path_factory.mktemp('model') / 'model.pth')


def save(cfg, file):
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.head.fc.weight.data *= 10  # for scores that differ
    if hasattr(model.backbone, 'prune_to'):
        model.backbone.prune_to(1.0)
    torch.save(dict(state_dict=model.state_dict(), meta={}), file)
    return file


@pytest.mark.slow
def test_training_and_starting_a_detector_from_it(call_tool, crops, tmp_path):
    arguments = ['--work-dir', tmp_path, '--cfg-options', 'train_cfg.max_epochs=1']
    status, output, _ = call_tool('train', CONFIG, *arguments)
    assert status == 0
    assert 'accuracy/top1' in output
    detector = ROOT / 'configs/detection/demo/faster-rcnn_rdnet-nano-pretrained_fpn_8e_digits.py'
    file = f'model.backbone.init_cfg.checkpoint={tmp_path}/epoch_1.pth'
    arguments = ['--work-dir', tmp_path / 'detector', '--cfg-options', file]
    status, output, _ = call_tool('train', detector, *arguments, 'train_cfg.max_epochs=1')
    assert status == 0
    assert 'RDNet from' in output


def test_accuracy_and_predictions(call_tool, crops, checkpoint, tmp_path):
    out = tmp_path / 'predictions.pkl'
    work_dir = ['--work-dir', tmp_path]
    status, output, _ = call_tool('test', CONFIG, checkpoint, '--out', out, *work_dir)
    assert status == 0
    samples = pickle.loads(out.read_bytes())
    hits = [sample['pred_score'].argmax() == sample['gt_label'] for sample in samples]
    accuracy = 100 * sum(map(int, hits)) / len(hits)
    assert f'{accuracy:.3f}' in output
    status, _, error = call_tool('test', CONFIG, checkpoint, '--show-dir', tmp_path, *work_dir)
    assert status == 2
    assert 'tools/infer.py draws classes' in error


@pytest.mark.slow
def test_the_accuracy_of_released_weights(call_tool, tmp_path, monkeypatch):
    """ImageNet has a thousand folders, two of whose classes are named crane."""
    name = 'rexnet_100.nav_in1k'
    torch.manual_seed(0)
    torch.save(timm.create_model(name, pretrained=False).state_dict(), tmp_path / f'{name}.pth')
    monkeypatch.setenv('MMDENSE_WEIGHTS', str(tmp_path))
    for i in range(1000):
        (tmp_path / f'val/n{i:04}').mkdir(parents=True)
    Image.new('RGB', (260, 240)).save(tmp_path / 'val/n0007/0.JPEG')
    options = ['--cfg-options', f'data_root={tmp_path}', 'test_dataloader.num_workers=0']
    config = ROOT / 'configs/classification/rexnet/rexnet-1.0_amp-400e_in1k.py'
    status, output, error = call_tool(
        'test', config, f'timm://{name}', '--work-dir', tmp_path / 'work', *options
    )
    assert status == 0, error
    assert 'accuracy/top1' in output


def test_the_class_is_drawn_and_written(call_tool, crops, checkpoint, tmp_path):
    status, *_ = call_tool('infer', CONFIG, checkpoint, crops / 'val', '--out', tmp_path)
    assert status == 0
    content = json.loads((tmp_path / 'predictions.json').read_text())
    assert len(content['annotations']) == len(content['images']) > 0  # whatever the score
    assert {tuple(a['bbox']) for a in content['annotations']} == {(0, 0, 48, 48)}
    assert [c['name'] for c in content['categories']] == [*'0123456789']
    assert all((tmp_path / image['picture']).exists() for image in content['images'])


def test_class_folders_are_checked(call_tool, crops, tmp_path):
    for split, digits in (('train', '012'), ('val', '013')):
        for digit in digits:
            (tmp_path / split / digit).mkdir(parents=True)
            source = next((crops / 'train').glob('*/*.png'))
            if digit != '1':
                (tmp_path / split / digit / f'{split}.png').write_bytes(source.read_bytes())
    options = [f'data_root={tmp_path}', 'model.head.num_classes=3']
    options += [f'{x}_dataloader.dataset.metainfo=None' for x in ('train', 'val', 'test')]
    arguments = [CONFIG, '--workers', 1, '--loaders', 'train', 'val', '--cfg-options', *options]
    status, output, _ = call_tool('check_dataset', *arguments)
    assert status == 1
    output = ' '.join(output.split())
    assert "label 2 is '3', but '2' in train_dataloader.dataset" in output
    assert "no image of '1'" in output or 'no image of 1' in output
    assert 'images are in train_dataloader too' in output
    status, _, error = call_tool('train', CONFIG, '--cfg-options', f'data_root={tmp_path}/none')
    assert status == 2
    assert 'none not found (for train_dataloader.dataset)' in error


def test_top_k_of_fewer_classes(call_tool, crops, tmp_path):
    options = [f'data_root={crops}', 'val_evaluator.topk=(1,11)']
    status, _, error = call_tool('train', CONFIG, '--work-dir', tmp_path, '--cfg-options', *options)
    message = 'val_evaluator.topk is (1, 11) for 10 classes: set val_evaluator.topk=1'
    assert (status, error) == (2, f'error: {message}\n')


def test_the_doctor_names_the_command_that_makes_the_crops(crops, tmp_path, monkeypatch):
    monkeypatch.chdir(crops.parents[1])
    rows = load_tool('doctor').probe_config(str(CONFIG))
    assert {row.level for row in rows} == {'ok'}
    monkeypatch.chdir(tmp_path)
    _, row, *_ = load_tool('doctor').probe_config(str(CONFIG))
    assert row.level == 'error'
    assert row.fix.endswith('--out data/digits --crops data/digit_crops/')


def test_condensenetv2_is_condensed_and_tested(call_tool, crops, tmp_path):
    config = tmp_path / 'condensenetv2.py'
    config.write_text(
        f"_base_ = '{CONFIG}'\n"
        f"model = dict(backbone=dict(_delete_=True, type='mmdense.CondenseNetV2', arch={PRUNED}, "
        "out_indices=(1,)), neck=dict(_delete_=True, type='mmdense.CondenseNetV2Neck', "
        "in_channels='auto'), head=dict(in_channels=40))\n"
    )
    trained = save(load_config(str(config)), tmp_path / 'trained.pth')
    arguments = ['--work-dir', tmp_path / 'run', '--size', 48, 48]
    out = tmp_path / 'deployed.pth'
    status, output, _ = call_tool('deploy', config, trained, '--out', out, '--test', *arguments)
    assert status == 0
    accuracy = output.split('accuracy/top1 │')[1].split()[0]
    status, output, _ = call_tool('test', config, trained, *arguments[:2])
    assert output.split('accuracy/top1 │')[1].split()[0] == accuracy
    assert load_config(str(out.with_suffix('.py'))).model.backbone.form == 'condensed'


@needs_onnx
@pytest.mark.slow
def test_an_exported_file_equals_the_model(call_tool, crops, checkpoint, tmp_path):
    config, file = tmp_path / 'cropped.py', tmp_path / 'model.onnx'
    config.write_text(
        f"_base_ = '{CONFIG}'\n"
        "edge = dict(type='ResizeEdge', scale=60, backend='pillow', interpolation='bicubic')\n"
        "crop = dict(type='CenterCrop', crop_size=48)\n"
        "pipeline = [dict(type='LoadImageFromFile'), edge, crop, dict(type='PackInputs')]\n"
        'val_dataloader = dict(dataset=dict(pipeline=pipeline))\n'
        'test_dataloader = val_dataloader\n'
    )
    arguments = [config, checkpoint, '--out', file, '--work-dir', tmp_path, '--size', 48, 48]
    status, output, _ = call_tool('export_onnx', *arguments)
    assert status == 0
    assert 'resize their edge (short) to 60; crop the centre, 48 x 48' in ' '.join(output.split())
    images = [*(crops / 'val').glob('*/*.png')][:6]
    wide = tmp_path / 'wide.png'
    Image.effect_noise((90, 70), 80).convert('RGB').save(wide)
    samples = Predictor(config, checkpoint, device='cpu')([*images, wide])
    found = open_model(file)([*images, wide])
    for sample, result in zip(samples, found, strict=True):
        scores = sample.pred_score.numpy()[result['labels']]
        np.testing.assert_allclose(result['scores'], scores, rtol=0, atol=1e-5)
    assert open_model(file).classes == tuple('0123456789')
    accuracies = []
    for weights in (checkpoint, file):
        status, output, _ = call_tool('test', config, weights, '--work-dir', tmp_path)
        accuracies.append(output.split('accuracy/top1 │')[1].split()[0])
    assert accuracies[0] == accuracies[1]


@needs_onnx
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--part', 'neck'], 'no ONNX export of the neck with LinearClsHead: add --part backbone'),
        (
            ['--cfg-options', 'model.head.type=MultiLabelLinearClsHead'],
            'no ONNX export of the model with MultiLabelLinearClsHead: add --part backbone',
        ),
        (
            ['--cfg-options', "test_dataloader.dataset.pipeline=[{'type': 'PackInputs'}]"],
            'the test pipeline loads no files: pass a config with LoadImageFromFile',
        ),
    ],
)
def test_what_is_not_exported(options, message, call_tool, tmp_path):
    arguments = ['--out', tmp_path / 'model.onnx', '--work-dir', tmp_path, *options]
    status, _, error = call_tool('export_onnx', CONFIG, *arguments)
    assert status == 2
    assert message in error


@pytest.mark.slow
def test_sweeps_compare_top_1(call_tool, crops, tmp_path):
    options = [f'{x}_dataloader.dataset.indices=32' for x in ('train', 'val', 'test')]
    arguments = ['--config', CONFIG, '--backbones', CONFIG, 'timm:resnet10t', '--from-scratch']
    arguments += ['--epochs', 1, '--rounds', 2, '--out', tmp_path, '--cfg-options', *options]
    status, output, _ = call_tool('benchmark', 'sweep', *arguments)
    assert status == 0
    rows = (tmp_path / 'results.csv').read_text().splitlines()
    assert 'top_1_percent' in rows[0]
    assert [row.split(',')[:3] for row in rows[1:]] == [
        ['rdnet-nano', 'RDNet', 'done'],
        ['timm:resnet10t', 'timm', 'done'],
    ]
