"""Hostile files and names: no way into mmdense executes them, and terminals get no codes.

``weights/test_files.py`` has the contents of checkpoints, this file the ways in.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from checkpoints import Call, error_of
from mmdense.apis import Predictor
from mmdense.apis.convert import convert_weights
from mmdense.cli import report_errors
from mmdense.config.read import load_config
from mmdense.engine.resume import use_checkpoint
from mmdense.engine.runner import build_runner, load_weights
from mmdense.errors import UserError
from mmdense.weights.files import read_checkpoint
from mmdense.weights.publish import publish
from support import DEMOS

DETECTOR = DEMOS['detection']


@pytest.fixture
def demo(project, tmp_path):
    """Return a function that reads the demo's config, with options."""

    def load(**options):
        data = str(project / 'data/digits')
        cfg = load_config(str(DETECTOR), options=dict(data_root=data, **options))
        cfg.work_dir, cfg.log_level = str(tmp_path / 'work'), 'ERROR'
        return cfg

    return load


# Checkpoints that would execute something


@pytest.fixture
def program(tmp_path):
    """A checkpoint that makes a folder if it is unpickled, and that folder."""
    file, made = tmp_path / 'x.pth', tmp_path / 'made'
    torch.save(dict(state_dict=dict(x=Call(os.mkdir, str(made)))), file)
    return str(file), made


def test_every_way_in_refuses_a_program(demo, program, tmp_path):
    path, made = program

    def resume():
        cfg = demo()
        use_checkpoint(cfg, path)
        build_runner(cfg, loaders=('train',)).train()

    def load_from():
        cfg = demo()
        use_checkpoint(cfg, None, path)
        build_runner(cfg, loaders=('train',)).load_or_resume()

    for way in (
        resume,
        load_from,
        lambda: load_weights(build_runner(demo(), loaders=('test',)), path),  # of the other tools
        lambda: Predictor(demo(), path, device='cpu'),
        lambda: convert_weights(path, str(tmp_path / 'new.pth')),
        lambda: publish(path, tmp_path / 'new.pth'),
    ):
        text = error_of(way)
        assert 'holds more than weights' in text
        assert path in text
        assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.is_dir()  # without the checks it would have run


INFER = """
import mmdense, sys
from mmdet.apis import DetInferencer, init_detector
from mmseg.apis import init_model
detector, segmentor, file = sys.argv[1:]
for load in (
    lambda: init_detector(detector, file, device='cpu'),
    lambda: DetInferencer(model=detector, weights=file, device='cpu', show_progress=False),
    lambda: init_model(segmentor, file, device='cpu'),
):
    try:
        load()
    except Exception as error:
        print(error)
"""


@pytest.mark.slow
def test_inferencers_of_mmdet_and_mmseg_refuse_a_program(program):
    path, made = program
    command = [sys.executable, '-c', INFER, *map(str, DEMOS.values()), path]
    output = subprocess.run(command, capture_output=True, text=True, timeout=600).stdout
    assert output.count(f'{path} holds more than weights (') == 3, output
    assert not made.exists()


@pytest.mark.slow
def test_resuming_does_not_execute_the_config_of_a_checkpoint(demo, tmp_path):
    """mmengine executes ``meta['config']`` as a Python program."""
    file, made = tmp_path / 'x.pth', tmp_path / 'made'
    text = f'__import__("os").mkdir({str(made)!r})\n'

    def train(checkpoint=None):
        cfg = demo(
            **{
                'train_cfg.max_epochs': 1,
                'train_cfg.val_interval': 9,
                'train_dataloader.dataset.indices': 2,
                'train_dataloader.batch_size': 2,
                'model.train_cfg.rcnn.sampler.num': 8,
                'model.train_cfg.rpn_proposal.nms_pre': 20,
            }
        )
        use_checkpoint(cfg, checkpoint)
        build_runner(cfg, loaders=('train',)).train()

    train()
    content = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=False)
    content['meta']['config'] = text
    torch.save(content, file)
    train(str(file))
    assert not made.exists()
    assert read_checkpoint(file)['meta'].keys() == content['meta'].keys() - {'config'}
    Config.fromstring(text, file_format='.py')
    assert made.is_dir()  # this text would have run


# Configs and annotations


def test_options_that_look_like_code_stay_text(demo):
    texts = ["__import__('os').mkdir('made')", '{{ fileBasename }}', '$(touch made)', '`id`']
    for text in texts:
        cfg = demo(**{'model.data_preprocessor.note': text})
        assert cfg.model.data_preprocessor.note == text
    cfg = demo(**{'model.test_cfg.rcnn.nms.type': 'soft_nms'})  # an operator's name is a type
    assert cfg.model.test_cfg.rcnn.nms.type == 'soft_nms'


def test_annotations_nested_without_end(demo, tmp_path):
    file = tmp_path / 'x.json'
    file.write_text('{"images": ' + '[' * 1_000_000)
    cfg = demo(**{'train_dataloader.dataset.ann_file': str(file)})

    def start():
        build_runner(cfg, loaders=('train',)).build_dataloader(cfg.train_dataloader)

    assert str(file) in error_of(start)


# Names


NAMES = ['[red]x[/]', '[/]', '$(touch made)', '`touch made`', 'a\nb', '"a\'b', '<b>&amp;', '-x;y']


@pytest.mark.parametrize('name', NAMES)
def test_names_of_configs(name, tmp_path, capsys):
    file = tmp_path / f'{name}.py'
    file.parent.mkdir(exist_ok=True)  # a slash makes a folder
    file.write_text('model = (')

    @report_errors
    def main(argv=None):
        load_config(str(file))

    with pytest.raises(SystemExit, match='2'):
        main()
    shown = name.replace('\n', '\\n')
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/{shown}.py: SyntaxError: '(' was never closed")


def test_control_codes_are_escaped(capsys):
    @report_errors
    def main(argv=None):
        raise UserError('no \x1b[31mred\x07, ünd 図')

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == 'error: no \\x1b[31mred\\x07, ünd 図\n'


def test_names_of_images_classes_and_keys(project, call_tool, tmp_path):
    """Through the tools, which print with rich and draw."""
    odd = tmp_path / '[red]$(touch made)'
    images = odd / 'images'
    images.mkdir(parents=True)
    config = odd / 'a[bold]b.py'
    config.write_text(f'_base_ = {str(DETECTOR)!r}\n')
    content = (project / 'data/digits/val/000000.jpg').read_bytes()
    for name in NAMES:
        file = images / f'{name}.jpg'
        file.parent.mkdir(exist_ok=True)  # a slash makes a folder
        file.write_bytes(content)
    (images / '[/].png').write_bytes(b'not an image')
    model = MODELS.build(load_config(str(config)).model)
    classes = ('[red]', '[/]', '$(touch made)', *'3456789')
    checkpoint = dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=classes)))
    weights = odd / '[bold].pth'
    torch.save(checkpoint, weights)
    options = ('--out', odd / 'out', '--score', 0, '--device', 'cpu')
    status, output, errors = call_tool('infer', config, weights, images, *options)
    assert status == 1, errors
    assert f'{images}/[/].png' in output + errors
    assert f'{odd}/out/predictions.json' in output
    predictions = json.loads((odd / 'out/predictions.json').read_text())
    files = [image['file_name'] for image in predictions['images']]
    assert len(files) == len(NAMES)
    assert all(any(file.endswith(f'{name}.jpg') for file in files) for name in NAMES)
    checkpoint['state_dict'] = {f'x[/].{k}': v for k, v in checkpoint['state_dict'].items()}
    torch.save(checkpoint, weights)
    status, output, errors = call_tool('publish_model', weights, odd / '[new].pth')
    assert status == 0, errors
    assert f'{odd}/[new]-' in output
    assert not list(project.rglob('made'))
