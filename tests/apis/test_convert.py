"""Converting weights of other projects to files with mmdense's keys."""

import hashlib

import pytest
import timm
import torch
from mmengine.registry import MODELS, init_default_scope

from checkpoints import error_of
from mmdense import __version__
from mmdense.apis.convert import convert_weights
from mmdense.config.read import load_config
from mmdense.models import DenseNet, ReXNet
from mmdense.weights.files import read_checkpoint
from mmdense.weights.formats import FORMATS
from mmdense.weights.loading import load_into
from support import ROOT

RETINANET = ROOT / 'configs/detection/densenet/retinanet_densenet-121_fpn_1x_coco.py'


@pytest.fixture(scope='module')
def rexnet(tmp_path_factory):
    """A file of timm's ReXNet, and its state dict."""
    torch.manual_seed(0)
    state = timm.create_model('rexnet_100').state_dict()
    file = tmp_path_factory.mktemp('timm') / 'rexnet.pth'
    torch.save(dict(state_dict=state, meta=dict(classes=('a', 'b'))), file)
    return file, state


def convert(source, target, **options):
    return convert_weights(str(source), target, **options)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_a_converted_file_fills_the_network_and_names_its_source(rexnet, suffix, tmp_path):
    file, state = rexnet
    target = tmp_path / f'converted.{suffix}'
    done = convert(file, target)
    assert (done.format, done.tensors, done.report) == ('rexnet', len(state) - 2, None)
    assert done.dropped == ('head.fc.weight', 'head.fc.bias')
    checkpoint = read_checkpoint(target)
    assert checkpoint['meta']['mmdense'] == dict(
        source='rexnet.pth',
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        map='rexnet',
        version=__version__,
    )
    assert list(checkpoint['meta']['classes']) == ['a', 'b']
    net = ReXNet(out_indices=(5,))  # with the last convolution
    _, report = load_into(net, checkpoint)
    assert report.share() == 1
    assert not report.unexpected
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    again = convert(target, tmp_path / 'again.pth')
    assert (again.tensors, again.dropped) == (done.tensors, ())


def test_the_hash_of_a_scheme(monkeypatch, tmp_path):
    torch.manual_seed(0)
    net = timm.create_model('rexnet_100')
    monkeypatch.setattr(timm, 'create_model', lambda *args, **options: net)
    records = []
    for name, bias in (('a.pth', 0), ('b.pth', 0), ('c.pth', 1)):
        net.stem.bn.bias.data.fill_(bias)
        done = convert('timm://rexnet_100.nav_in1k', tmp_path / name)
        assert done.tensors == 411
        records.append(read_checkpoint(tmp_path / name)['meta']['mmdense'])
    assert records[0]['source'] == 'timm://rexnet_100.nav_in1k'
    assert records[0] == records[1]
    assert records[1]['sha256'] != records[2]['sha256']


def test_a_config_needs_every_tensor(tmp_path):
    source = tmp_path / 'x.pth'
    state = DenseNet(tap='activated').state_dict()
    torch.save(state, source)
    config = load_config(str(RETINANET))
    # The config's own weights are left alone: nothing is downloaded.
    assert config.model.backbone.init_cfg.checkpoint.startswith('timm://')
    report = convert(source, tmp_path / 'y.pth', config=config).report
    assert (report.share(), report.model) == (1, 'DenseNet')
    name = 'features.denseblock2.denselayer3.conv2.weight'
    del state[name]
    torch.save(state, source)
    convert(source, tmp_path / 'without-a-config.pth')
    assert f'missing: {name}' in error_of(convert, source, tmp_path / 'z.pth', config=config)
    assert not (tmp_path / 'z.pth').exists()


def test_a_complete_model_with_a_prefix(tmp_path):
    config = load_config(str(RETINANET))
    init_default_scope('mmdet')
    state = MODELS.build(config.model).state_dict()
    source, target = tmp_path / 'x.pth', tmp_path / 'y.pth'
    torch.save({f'net.{k}': v for k, v in state.items()}, source)
    text = error_of(convert, source, target)
    assert 'are of no known format' in text
    assert 'the model by --config' in text
    assert 'no key begins with model. (' in error_of(convert, source, target, prefix='model')
    done = convert(source, target, prefix='net', config=config)
    assert done.report.model == 'RetinaNet'
    assert done.format == 'mmdense'
    assert read_checkpoint(target)['state_dict'].keys() == state.keys()
    done = convert(source, tmp_path / 'z.pth', prefix='net.backbone.')
    assert done.format == 'densenet'


def test_leftovers_and_wrong_formats(rexnet, tmp_path):
    file, state = rexnet
    source, target = tmp_path / 'x.pth', tmp_path / 'y.pth'
    torch.save({**state, 'features.3.conv_dw.bn.wieght': torch.zeros(1)}, source)
    text = error_of(convert, source, target)
    assert text.startswith(f'{source}: 1 keys are not of the format rexnet (')
    assert 'bn.wieght' in text
    assert '411 keys are not of the format rdnet' in error_of(convert, file, target, format='rdnet')
    assert "no format 'resnet'" in error_of(convert, file, target, format='resnet')
    torch.save({'head.fc.weight': torch.zeros(1)}, source)
    assert 'nothing is left' in error_of(convert, source, target, format='rexnet')
    assert 'exists already' in error_of(convert, file, file)
    assert 'no file' in error_of(convert, tmp_path / 'nowhere.pth', target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['x.pth']


def test_every_format_is_documented():
    rows = [row.split(' | ') for row in (ROOT / 'docs/weights.md').read_text().splitlines()]
    documented = {row[0].strip('| `'): row[1] for row in rows if len(row) == 3}
    for name, known in FORMATS.items():
        assert documented[name] == known.about


def test_the_command(rexnet, call_tool, tmp_path):
    file, _ = rexnet
    config = ROOT / 'configs/detection/rexnet/faster-rcnn_rexnet-1.0_fpn_1x_coco.py'
    target = tmp_path / 'converted.safetensors'
    options = ['--from', 'rexnet', '--config', config]
    status, output, _ = call_tool('convert_weights', file, target, *options)
    assert status == 0
    first, model, *table = output.splitlines()
    assert first == (
        f'{target}: 411 tensors from the format rexnet; left out: head.fc.weight, head.fc.bias'
    )
    assert model == 'ReXNet:'
    assert table[1].startswith('loaded ')
    status, _, error = call_tool('convert_weights', file, target)
    assert (status, error) == (2, f'error: {target} exists already: choose another name\n')
    status, output, _ = call_tool('convert_weights', file, tmp_path / 'other.pth')
    assert output.splitlines()[-1].endswith('add --config CONFIG')
