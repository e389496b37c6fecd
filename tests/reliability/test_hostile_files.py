"""Files made to harm: nothing in them runs, and they fill neither memory nor terminal."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from mmengine.config import Config
from safetensors.torch import save_file

from mmdense.apis import Predictor
from mmdense.apis.convert import convert_weights
from mmdense.cli import report_errors
from mmdense.config import read
from mmdense.engine import resume
from mmdense.engine import runner as run
from mmdense.errors import UserError
from mmdense.weights.files import read_checkpoint
from mmdense.weights.publish import publish
from support import DEMOS, ROOT

DETECTOR = DEMOS['detection']


class Call:
    """Is pickled as the call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def said_of(function, *args):
    """Return what is said of a file, which is one line."""
    with pytest.raises(UserError) as error:
        function(*args)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.fixture
def demo(project, tmp_path):
    """Return a function that reads the demo's config, with options."""

    def load(**more):
        data = str(project / 'data/digits')
        cfg = read.load_config(str(DETECTOR), options=dict(data_root=data, **more))
        cfg.work_dir, cfg.log_level = str(tmp_path / 'work'), 'ERROR'
        return cfg

    return load


# Checkpoints that would run something


def test_every_way_in_refuses_a_program(demo, tmp_path):
    file, made = tmp_path / 'x.pth', tmp_path / 'made'
    torch.save(dict(state_dict=dict(x=Call(os.mkdir, str(made)))), file)
    path = str(file)

    def resume():
        cfg = demo()
        resume.use_checkpoint(cfg, path)
        run.build_runner(cfg, loaders=('train',)).train()

    def load_from():
        cfg = demo()
        resume.use_checkpoint(cfg, None, path)
        run.build_runner(cfg, loaders=('train',)).load_or_resume()

    def load_weights():  # of test.py, deploy.py, export_onnx.py and visualize.py
        run.load_weights(run.build_runner(demo(), loaders=('test',)), path)

    for way in (
        resume,
        load_from,
        load_weights,
        lambda: Predictor(demo(), path, device='cpu'),
        lambda: convert_weights(path, str(tmp_path / 'new.pth')),
        lambda: publish(path, tmp_path / 'new.pth'),
    ):
        said = said_of(way)
        assert 'holds more than weights' in said
        assert path in said
        assert not made.exists()
    torch.load(file, weights_only=False)
    assert made.is_dir()  # the file is one that would have


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
def test_inferencers_of_mmdet_and_mmseg_refuse_a_program(tmp_path):
    file, made = tmp_path / 'x.pth', tmp_path / 'made'
    torch.save(dict(state_dict=dict(x=Call(os.mkdir, str(made)))), file)
    command = [sys.executable, '-c', INFER, *map(str, DEMOS.values()), str(file)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=600).stdout
    assert said.count(f'{file} holds more than weights (') == 3, said
    assert not made.exists()


def test_resuming_does_not_run_the_config_of_a_checkpoint(demo, tmp_path):
    """mmengine runs ``meta['config']`` as a Python program."""
    file, made = tmp_path / 'x.pth', tmp_path / 'made'
    program = f'__import__("os").mkdir({str(made)!r})\n'

    def train(more, **options):
        cfg = demo(**{'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 9, **options})
        more(cfg)
        run.build_runner(cfg, loaders=('train',)).train()

    few = {'train_dataloader.dataset.indices': 2, 'train_dataloader.batch_size': 2}
    few |= {'model.train_cfg.rcnn.sampler.num': 8, 'model.train_cfg.rpn_proposal.nms_pre': 20}
    train(lambda cfg: None, **few)
    held = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=False)
    held['meta']['config'] = program
    torch.save(held, file)
    train(lambda cfg: resume.use_checkpoint(cfg, str(file)), **few)
    assert not made.exists()
    assert read_checkpoint(file)['meta'].keys() == held['meta'].keys() - {'config'}
    Config.fromstring(program, file_format='.py')
    assert made.is_dir()  # it is one that would have run


# Checkpoints that would fill the memory

PEAK = """
import resource, sys
from mmdense.engine import read_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for file in sys.argv[1:]:
    try:
        read_checkpoint(file)
    except RuntimeError as error:
        print(type(error).__name__, error)
print('MB', (peak() - before) // 1024)
"""


def rewrite(file, change):
    """Change the pickle in a checkpoint."""
    with zipfile.ZipFile(file) as old:
        held = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, 'w') as new:
        for name, content in held.items():
            new.writestr(name, change(content) if name.endswith('data.pkl') else content)


def deflated(file):
    size = 100_000_000
    torch.save(dict(state_dict=dict(x=torch.zeros(size, dtype=torch.int8))), file)
    with zipfile.ZipFile(file) as old:
        held = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as new:
        for name, content in held.items():
            new.writestr(name, content)
    assert file.stat().st_size < size / 500


def expanded(file):
    torch.save(dict(state_dict=dict(x=torch.zeros(1).expand(10**12))), file)


def without_values(file):
    torch.save(dict(state_dict=dict(x=torch.zeros(10**12, device='meta'))), file)


HONEST, LYING = b'M\xe9\x03', b'\x8a\x06' + (10**12).to_bytes(6, 'little')  # 1001 in a pickle


def lying(file):
    torch.save(dict(state_dict=dict(x=torch.zeros(1001))), file)
    rewrite(file, lambda content: content.replace(HONEST, LYING))


def lying_in_the_old_format(file):
    held = io.BytesIO()
    torch.save(
        dict(state_dict=dict(x=torch.zeros(1001))), held, _use_new_zipfile_serialization=False
    )
    begin, sep, rest = held.getvalue().partition(b'state_dict')
    file.write_bytes(begin + sep + rest.replace(HONEST, LYING))


def lying_header(file):
    save_file(dict(x=torch.zeros(1001)), file)
    content = file.read_bytes()
    size = struct.unpack('<Q', content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header['x'].update(shape=[10**12], data_offsets=[0, 4 * 10**12])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack('<Q', len(text)) + text + content[8 + size :])


def huge_header(file):
    file.write_bytes(struct.pack('<Q', 2**62) + b'{"x": 1}')


def nested_header(file):
    text = b'{"__metadata__": {"mmdense_meta": "' + b'[' * 100_000 + b'"}}'
    file.write_bytes(struct.pack('<Q', len(text)) + text)


def tar(file):
    with tarfile.open(file, 'w') as archive:
        link = tarfile.TarInfo('storages')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        archive.addfile(link)


LARGE = dict(
    deflated=(deflated, 'has 0.0.* MB, but would unpack to 100 MB'),
    expanded=(expanded, r'but its tensors would take 4e\+06 MB'),
    without_values=(without_values, 'holds tensors without values'),
    lying=(lying, r'(is damaged, or no checkpoint|.*its tensors would take 4e\+06 MB)'),
    lying_in_the_old_format=(lying_in_the_old_format, 'is damaged, or no checkpoint'),
    lying_header=(lying_header, 'is damaged, or no checkpoint'),
    huge_header=(huge_header, 'is damaged, or no checkpoint'),
    nested_header=(nested_header, 'is damaged, or no checkpoint'),
    tar=(tar, 'is a tar archive: unpack it'),
)


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
    files = []
    for name, (make, _) in LARGE.items():
        files.append(tmp_path / f'{name}.pth')
        make(files[-1])
    done = subprocess.run(
        [sys.executable, '-c', PEAK, *map(str, files)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    *lines, last = done.stdout.splitlines()
    assert len(lines) == len(LARGE), done.stdout + done.stderr
    for line, file, (_, said) in zip(lines, files, LARGE.values(), strict=True):
        assert re.match(f'UserError {file}.* {said}|UserError {file} {said}', line)
    assert int(last.removeprefix('MB ')) < 60


def test_honest_sharing_is_let_through(tmp_path):
    x = torch.zeros(50, 50)
    held = dict(state_dict=dict(a=x, b=x, c=x.expand(4, 50, 50)), again=[dict(a=x)])
    torch.save(held, tmp_path / 'x.pth')
    assert read_checkpoint(tmp_path / 'x.pth')['state_dict']['c'].shape == (4, 50, 50)


# Configs as data


@pytest.mark.parametrize('key', ['model.backbone', 'custom_hooks.0', 'train_dataloader.dataset'])
@pytest.mark.parametrize(
    'name', ['os.mkdir', 'mmengine.mkdir_or_exist', 'this', '__import__("os")']
)
def test_options_call_nothing_that_is_not_registered(key, name, demo, tmp_path):
    made = tmp_path / 'made'
    options = {f'{key}.type': name, f'{key}.path': str(made), f'{key}.dir_name': str(made)}
    with pytest.raises(UserError, match='nothing is registered under that name'):
        run.build_runner(demo(**options), loaders=('train',))
    assert not made.exists()
    assert 'this' not in sys.modules


def test_what_options_are_guarded_from(tmp_path):
    """mmengine calls whatever it can import under the name of a type."""
    from mmengine.registry import MODELS

    MODELS.build(dict(type='os.mkdir', path=str(tmp_path / 'made')))
    assert (tmp_path / 'made').is_dir()


def test_options_that_look_like_code_stay_text(demo, tmp_path):
    texts = ["__import__('os').mkdir('made')", '{{ fileBasename }}', '$(touch made)', '`id`']
    for text in texts:
        cfg = demo(**{'model.data_preprocessor.note': text})
        assert cfg.model.data_preprocessor.note == text


def test_options_import_nothing(demo):
    with pytest.raises(UserError, match='name them in a config file'):
        demo(**{'custom_imports.imports': ['this']})
    assert 'this' not in sys.modules


def test_operators_of_boxes_are_still_chosen_by_name(demo):
    cfg = demo(**{'model.test_cfg.rcnn.nms.type': 'soft_nms'})
    assert cfg.model.test_cfg.rcnn.nms.type == 'soft_nms'


def test_yaml_is_data(tmp_path):
    file, made = tmp_path / 'x.yaml', tmp_path / 'made'
    text = f'model:\n  type: A\n  x: !!python/object/apply:os.mkdir [{made}]\n'
    file.write_text(text)
    assert 'is no config (ConstructorError' in said_of(read.load_config, str(file))
    base = tmp_path / 'leaf.yaml'
    base.write_text('_base_: x.yaml\nmodel: {y: 1}\n')
    assert f'{file} is no config' in said_of(read.load_config, str(base))
    assert not made.exists()
    import yaml

    yaml.load(text, Loader=yaml.UnsafeLoader)
    assert made.is_dir()


def test_yaml_of_aliases(tmp_path):
    lines = ['a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]']
    lines += [f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 10)}]' for i in range(1, 12)]
    file = tmp_path / 'x.yml'
    for text in ('\n'.join(lines), 'a: &a [*a]'):
        file.write_text(text + '\nmodel: {type: A}\n')
        assert 'aliases stand for' in said_of(read.load_config, str(file))
    file.write_text('a: &a {type: A}\nmodel: *a\n')
    assert read.load_config(str(file)).model.type == 'A'


def test_annotations_nested_without_end(demo, tmp_path):
    file = tmp_path / 'x.json'
    file.write_text('{"images": ' + '[' * 1_000_000)
    cfg = demo(**{'train_dataloader.dataset.ann_file': str(file)})

    def begin():
        run.build_runner(cfg, loaders=('train',)).build_dataloader(cfg.train_dataloader)

    assert str(file) in said_of(begin)


# Names


NAMES = ['[red]x[/]', '[/]', '$(touch made)', '`touch made`', 'a\nb', '"a\'b', '<b>&amp;', '-x;y']


@pytest.mark.parametrize('name', NAMES)
def test_names_of_configs_are_names(name, tmp_path, capsys):
    file = tmp_path / f'{name}.py'
    file.parent.mkdir(exist_ok=True)  # a slash makes a folder
    file.write_text('model = (')

    @report_errors
    def main():
        read.load_config(str(file))

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    shown = name.replace('\n', '\\n')
    assert (
        capsys.readouterr().err == f"error: {tmp_path}/{shown}.py, line 1: '(' was never closed\n"
    )


def test_a_terminal_is_sent_no_codes(capsys):
    @report_errors
    def main():
        raise UserError('no \x1b[31mred\x07, ünd 図')

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == 'error: no \\x1b[31mred\\x07, ünd 図\n'


@pytest.mark.slow
def test_names_of_images_classes_and_keys(project, run_tool, tmp_path):
    """Through the tools, which print with rich and draw."""
    from mmdense.engine.runner import unwrap

    odd = tmp_path / '[red]$(touch made)'
    odd.mkdir()
    leaf = odd / 'a[bold]b.py'
    leaf.write_text(f'_base_ = {str(DETECTOR)!r}\n')
    images = odd / 'images'
    images.mkdir()
    for name in NAMES:
        content = (project / 'data/digits/val/000000.jpg').read_bytes()
        file = images / f'{name}.jpg'
        file.parent.mkdir(exist_ok=True)  # a slash makes a folder
        file.write_bytes(content)
    (images / '[/].png').write_bytes(b'no image')
    data = str(project / 'data/digits')
    cfg = read.load_config(str(leaf), options=dict(data_root=data), work_dir=str(tmp_path / 'w'))
    cfg.log_level = 'ERROR'
    runner = run.build_runner(cfg, loaders=())
    classes = ('[red]', '[/]', '$(touch made)', *'3456789')
    held = dict(state_dict=unwrap(runner.model).state_dict())
    held['meta'] = dict(dataset_meta=dict(classes=classes))
    weights = odd / '[bold].pth'
    torch.save(held, weights)
    tool = ROOT / 'tools/infer.py'
    status, said = run_tool(
        *(sys.executable, tool, leaf, weights, images, '--out', odd / 'out', '--score', 0),
        *('--device', 'cpu'),
    )
    assert status == 1, said
    assert f'skipped: {images}/[/].png' in said
    assert f'predictions: {odd}/out/predictions.json' in said
    written = json.loads((odd / 'out/predictions.json').read_text())
    found = [image['file_name'] for image in written['images']]
    assert len(found) == len(NAMES)
    assert all(any(file.endswith(f'{name}.jpg') for file in found) for name in NAMES)
    held['state_dict'] = {f'x[/].{k}': v for k, v in held['state_dict'].items()}
    torch.save(held, weights)
    new = odd / '[new].pth'
    command = (sys.executable, ROOT / 'tools/publish_model.py', weights, new)
    status, said = run_tool(*command)
    assert status == 0, said
    assert f'{odd}/[new]-' in said
    assert not list(project.rglob('made'))
    assert not (project / 'made').exists()
