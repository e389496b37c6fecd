"""Converting weights of other projects to files of ours."""

import hashlib
import sys

import pytest
import timm
import torch
from mmengine.config import Config

from mmdense import __version__
from mmdense.apis.convert import convert_weights
from mmdense.config.read import load_config
from mmdense.errors import UserError
from mmdense.models import DenseNet, ReXNet
from mmdense.weights.files import read_checkpoint
from mmdense.weights.formats import FORMATS
from mmdense.weights.loading import load_into
from support import ROOT

TOOL = ROOT / 'tools/convert_weights.py'
RETINANET = ROOT / 'configs/detection/densenet/retinanet_densenet-121_fpn_1x_coco.py'


def alive(net):
    """Give every norm statistics and factors of its own, so that no mistake hides behind ones."""
    torch.manual_seed(1)
    for name, value in net.state_dict().items():
        if value.ndim == 1:
            value.normal_(0, 0.1) if name.endswith(('bias', 'mean')) else value.uniform_(0.5, 1.5)
    return net


@pytest.fixture(scope='module')
def rexnet(tmp_path_factory):
    torch.manual_seed(0)
    state = alive(timm.create_model('rexnet_100')).state_dict()
    file = tmp_path_factory.mktemp('timm') / 'rexnet.pth'
    torch.save(dict(state_dict=state, meta=dict(classes=('a', 'b'))), file)
    return file, state


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_a_converted_file_fills_the_network_and_says_where_it_is_from(rexnet, suffix, tmp_path):
    file, state = rexnet
    target = tmp_path / f'ours.{suffix}'
    done = convert_weights(str(file), target)
    assert (done.format, done.tensors) == ('rexnet', len(state) - 2)
    assert done.dropped == ('head.fc.weight', 'head.fc.bias')
    held = read_checkpoint(target)
    assert held['meta']['mmdense'] == dict(
        source='rexnet.pth',
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        map='rexnet',
        version=__version__,
    )
    assert list(held['meta']['classes']) == ['a', 'b']
    net = ReXNet(out_indices=(5,))  # with the last convolution
    _, report = load_into(net, held)
    assert report.share() == 1
    assert not report.unexpected
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_check_compares_with_the_source(rexnet, tmp_path, monkeypatch):
    file, state = rexnet
    done = convert_weights(str(file), tmp_path / 'a.pth', check=True)
    assert done.compared == 'timm rexnet_100'
    assert len(done.differences) == 4
    assert max(done.differences) < 1e-5
    again = convert_weights(str(tmp_path / 'a.pth'), tmp_path / 'again.pth', check=True)
    assert again.differences == done.differences  # the classifier is not missed
    features = timm.create_model('rexnet_100', features_only=True).state_dict()
    flat = {k: state[k.replace('features_', 'features.')] for k in features}
    torch.save(flat, tmp_path / 'flat.pth')
    done = convert_weights(str(tmp_path / 'flat.pth'), tmp_path / 'b.pth', check=True)
    assert done.compared == 'timm features of rexnet_100'

    def spoiled(net, x):
        return tuple(1.01 * y for y in forward(net, x))

    forward = ReXNet.forward
    monkeypatch.setattr(ReXNet, 'forward', spoiled)
    with pytest.raises(UserError, match='differ from those of timm rexnet_100 by up to 1.0e-02'):
        convert_weights(str(file), tmp_path / 'c.pth', check=True)
    assert not (tmp_path / 'c.pth').exists()


def test_check_without_a_source(tmp_path):
    torch.save({'features.0.weight': torch.zeros(1)}, tmp_path / 'x.pth')
    with pytest.raises(UserError, match='no installed network to compare with'):
        convert_weights(
            str(tmp_path / 'x.pth'), tmp_path / 'y.pth', format_name='rexnet-clovaai', check=True
        )
    narrow = ReXNet(arch=dict(width=0.5)).state_dict()
    torch.save(narrow, tmp_path / 'x.pth')
    with pytest.raises(UserError, match='no network of timm takes'):
        convert_weights(str(tmp_path / 'x.pth'), tmp_path / 'y.pth', check=True)


def test_a_scheme_has_a_hash_too(monkeypatch, tmp_path):
    torch.manual_seed(0)
    net = timm.create_model('rexnet_100')
    monkeypatch.setattr('mmdense.engine.checkpoints.timm.create_model', lambda *a, **k: net)
    records = []
    for name, bias in (('a.pth', 0), ('b.pth', 0), ('c.pth', 1)):
        net.stem.bn.bias.data.fill_(bias)
        done = convert_weights('timm://rexnet_100.nav_in1k', tmp_path / name)
        assert done.tensors == 411
        records.append(read_checkpoint(tmp_path / name)['meta']['mmdense'])
    assert records[0]['source'] == 'timm://rexnet_100.nav_in1k'
    assert records[0] == records[1]
    assert records[1]['sha256'] != records[2]['sha256']


def config():
    cfg = load_config(str(RETINANET))
    cfg.model.backbone.init_cfg = None
    return cfg


def test_config_wants_every_tensor(tmp_path):
    torch.manual_seed(0)
    state = DenseNet(tap='activated').state_dict()
    torch.save(state, tmp_path / 'x.pth')
    done = convert_weights(str(tmp_path / 'x.pth'), tmp_path / 'y.pth', config=config())
    assert done.report.share() == 1
    assert done.report.model == 'DenseNet'
    del state['features.denseblock2.denselayer3.conv2.weight']
    torch.save(state, tmp_path / 'x.pth')
    convert_weights(str(tmp_path / 'x.pth'), tmp_path / 'nothing-to-compare-with.pth')
    with pytest.raises(UserError, match='missing: features.denseblock2.denselayer3.conv2.weight'):
        convert_weights(str(tmp_path / 'x.pth'), tmp_path / 'z.pth', config=config())
    assert not (tmp_path / 'z.pth').exists()


def test_a_whole_model_of_ours_behind_a_prefix(tmp_path):
    from mmdense.engine.runner import build_runner

    cfg = config()
    cfg.work_dir = str(tmp_path / 'work')
    state = build_runner(cfg, loaders=()).model.state_dict()
    torch.save({f'net.{k}': v for k, v in state.items()}, tmp_path / 'x.pth')
    source = str(tmp_path / 'x.pth')
    with pytest.raises(UserError, match=r'no known format; .* --config'):
        convert_weights(source, tmp_path / 'y.pth')
    with pytest.raises(UserError, match='no key begins with model., such as'):
        convert_weights(source, tmp_path / 'y.pth', prefix='model')
    done = convert_weights(source, tmp_path / 'y.pth', prefix='net', config=config())
    assert done.report.model == 'RetinaNet'
    assert done.format == 'mmdense'
    assert read_checkpoint(tmp_path / 'y.pth')['state_dict'].keys() == state.keys()
    done = convert_weights(source, tmp_path / 'z.pth', prefix='net.backbone.')
    assert done.format == 'densenet'


def test_leftovers_and_wrong_formats(rexnet, tmp_path):
    file, state = rexnet
    torch.save({**state, 'features.3.conv_dw.bn.wieght': torch.zeros(1)}, tmp_path / 'x.pth')
    with pytest.raises(UserError, match=r'1 keys are not of the format rexnet .*bn.wieght'):
        convert_weights(str(tmp_path / 'x.pth'), tmp_path / 'y.pth')
    with pytest.raises(UserError, match='411 keys are not of the format rdnet'):
        convert_weights(str(file), tmp_path / 'y.pth', format_name='rdnet')
    torch.save({'head.fc.weight': torch.zeros(1)}, tmp_path / 'x.pth')
    with pytest.raises(UserError, match='nothing is left'):
        convert_weights(str(tmp_path / 'x.pth'), tmp_path / 'y.pth', format_name='rexnet')
    with pytest.raises(UserError, match='is there already'):
        convert_weights(str(file), file)
    with pytest.raises(UserError, match='no file'):
        convert_weights(str(tmp_path / 'nowhere.pth'), tmp_path / 'y.pth')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['x.pth']


def test_a_config_without_a_backbone_s_weights_is_not_asked_for_the_network(tmp_path):
    """The config's own init_cfg is left alone: nothing is downloaded to look at shapes."""
    cfg = load_config(str(RETINANET))
    assert cfg.model.backbone.init_cfg.checkpoint.startswith('timm://')
    torch.save(DenseNet(tap='activated').state_dict(), tmp_path / 'x.pth')
    assert convert_weights(str(tmp_path / 'x.pth'), tmp_path / 'y.pth', config=cfg).report


def test_every_format_is_documented():
    rows = [row.split(' | ') for row in (ROOT / 'docs/weights.md').read_text().splitlines()]
    documented = {row[0].strip('| `'): row[1] for row in rows if len(row) == 3}
    for name, known in FORMATS.items():
        assert documented[name] == known.about


@pytest.mark.slow
def test_the_command(rexnet, run_tool, tmp_path):
    file, _ = rexnet
    base = ROOT / 'configs/detection/rexnet/faster-rcnn_rexnet-1.0_fpn_1x_coco.py'
    target = tmp_path / 'ours.safetensors'
    options = ['--from', 'rexnet', '--config', base, '--check']
    status, said = run_tool(sys.executable, TOOL, file, target, *options)
    assert status == 0, said
    assert f'{target}: 411 tensors from the format rexnet' in said
    assert 'maps of timm rexnet_100 differ by' in said
    assert 'loaded ' in said
    assert Config.fromfile(base).model.backbone.type == 'mmdense.ReXNet'
    status, said = run_tool(sys.executable, TOOL, file, target)
    assert status == 2
    assert said.splitlines()[-1] == f'error: {target} is there already: choose another name'
