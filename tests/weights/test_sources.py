"""Where weights come from: files, URLs, mmengine's lists, timm and released CondenseNetV2s."""

import hashlib
import os
import re
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import constants
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from safetensors.torch import save_file

import mmdense.models  # noqa: F401  (applies the patches)
from checkpoints import WRITERS, Call, assert_same, error_of, tensors
from mmdense.weights import sources
from mmdense.weights.files import read_checkpoint, write_checkpoint
from mmdense.weights.sources import FOLDER, fetch, locate

RDNET = dict(type='mmdense.RDNet', arch=dict(stem=8, growth=(8, 8), down=(1,), blocks=1))
NETWORK = 'test_resnet'  # timm's smallest
TIMM = f'{NETWORK}.r160_in1k'
CONDENSENETV2 = 'https://github.com/jianghaojun/CondenseNetV2#results'
SCRATCH = '(To train from scratch: --cfg-options model.backbone.init_cfg=None)'
SUFFIXES = ('.pth', '.safetensors')
load = CheckpointLoader.load_checkpoint


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path_factory):
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path_factory.mktemp('torch')))
    monkeypatch.setenv('no_proxy', '127.0.0.1')


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the user's own weights."""
    folder = tmp_path / 'own'
    folder.mkdir()
    monkeypatch.setenv(FOLDER, str(folder))
    return folder


@pytest.fixture(scope='module')
def _served(tmp_path_factory):
    """One HTTP server for all tests: a folder, its URL, and the requested paths."""
    folder = tmp_path_factory.mktemp('served')
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    handler = partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield folder, f'http://127.0.0.1:{httpd.server_port}', requests
        httpd.shutdown()
        thread.join()


@pytest.fixture
def server(_served, tmp_path):
    root, url, requests = _served
    folder = root / tmp_path.name
    folder.mkdir()
    requests.clear()
    return SimpleNamespace(folder=folder, url=f'{url}/{folder.name}', requests=requests)


def cached():
    """Return the names of the downloaded files."""
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    return [file.name for file in folder.rglob('*') if file.is_file()]


# URLs


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_url_is_downloaded_once(suffix, server):
    """Also if it has a query: the file's name has none."""
    write_checkpoint(server.folder / f'x{suffix}', tensors(), {})
    for _ in range(2):
        checkpoint = load(f'{server.url}/x{suffix}?download=true')
        assert_same(checkpoint['state_dict'], tensors())
    assert len(server.requests) == 1
    assert cached() == [f'x{suffix}']


def test_urls_that_differ_in_the_folder_alone(server):
    for seed, name in enumerate(('one', 'two')):
        (server.folder / name).mkdir()
        torch.save(tensors(seed), server.folder / name / 'x-20240101.pth')  # no checksum: a date
    for seed, name in enumerate(('one', 'two')):
        assert_same(load(f'{server.url}/{name}/x-20240101.pth'), tensors(seed))


@pytest.mark.parametrize('length', [8, 10, 64])
def test_checksums(length, server):
    torch.save(tensors(), server.folder / 'x.pth')
    content = (server.folder / 'x.pth').read_bytes()
    right = hashlib.sha256(content).hexdigest()[:length]
    wrong = ('1' if right[0] == '0' else '0') + right[1:]
    for checksum in (right, wrong):
        (server.folder / f'x-{checksum}.pth').write_bytes(content)
    assert fetch(f'{server.url}/x-{right}.pth').is_file()
    text = error_of(fetch, f'{server.url}/x-{wrong}.pth')
    assert f'invalid hash value (expected "{wrong}"' in text
    assert cached() == [f'x-{right}.pth']


def test_the_users_folder_comes_first(server, folder):
    url = f'{server.url}/x.pth'
    torch.save(tensors(1), server.folder / 'x.pth')
    torch.save(tensors(2), folder / 'x.pth')
    assert fetch(url) == folder / 'x.pth'
    assert_same(load(url), tensors(2))
    assert not server.requests
    (folder / 'x.pth').unlink()
    assert_same(load(url), tensors(1))
    assert not list(folder.iterdir())


def test_the_users_folder_must_exist(server, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path / 'none'))
    text = error_of(fetch, f'{server.url}/x.pth')
    assert text == f'{FOLDER} names no folder: {tmp_path / "none"}'
    assert not server.requests


def test_unreachable_urls(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{free.getsockname()[1]}/folder/x.pth'
    text = error_of(fetch, url)
    assert text.startswith(f'{url} could not be downloaded (')
    assert 'refused' in text
    assert text.endswith(f'put it as x.pth into a folder and set the variable {FOLDER} to it')
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert error_of(fetch, url).endswith(f'put it as x.pth into {tmp_path}')
    net = MODELS.build(dict(**RDNET, init_cfg=dict(type='Pretrained', checkpoint=url)))
    assert url in error_of(net.init_weights)


def test_a_file_that_the_server_lacks(server):
    text = error_of(fetch, f'{server.url}/x.pth')
    assert 'HTTP Error 404' in text
    assert FOLDER in text
    assert not cached()


def test_other_processes_wait_for_the_first(server, monkeypatch):
    torch.save(tensors(), server.folder / 'x.pth')
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert 'see the log of the first process' in error_of(fetch, f'{server.url}/x.pth')
    assert not server.requests


# Names in mmengine's lists


@pytest.fixture
def lists(server, monkeypatch, tmp_path):
    """Let all of mmengine's lists name one file of the server, and one of MMENGINE_HOME."""
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    names = {'net.v1': f'{server.url}/x.pth', 'mine': 'mine.pth'}
    for scheme in sources.LISTS:
        monkeypatch.setitem(sources.LISTS, scheme, lambda: names)
    monkeypatch.setattr(sources, 'get_deprecated_model_names', lambda: dict(old='net.v1'))


@pytest.mark.parametrize('scheme', ['torchvision', 'modelzoo', 'openmmlab', 'open-mmlab', 'mmcls'])
def test_lists(scheme, server, lists, tmp_path):
    weights = {f'backbone.{k}': v for k, v in tensors().items()}
    weights['head.bias'] = torch.zeros(1)
    torch.save(dict(state_dict=weights), server.folder / 'x.pth')
    checkpoint = load(f'{scheme}://net.v1')
    expected = tensors() if scheme == 'mmcls' else weights  # of mmcls the backbone alone
    assert_same(checkpoint['state_dict'], expected)
    if 'lab' in scheme:
        assert_same(load(f'{scheme}://old')['state_dict'], expected)
        torch.save(tensors(), tmp_path / 'mine.pth')
        assert_same(load(f'{scheme}://mine'), tensors())
    assert len(server.requests) == 1
    message = f'{scheme} has no weights named net.v2; did you mean {scheme}://net.v1?'
    assert error_of(load, f'{scheme}://net.v2') == message


def test_nothing_that_lists_name_is_run(server, lists, tmp_path):
    made = tmp_path / 'made'
    content = dict(state_dict={'backbone.a': Call(os.mkdir, str(made))})
    torch.save(content, server.folder / 'x.pth')
    torch.save(content, tmp_path / 'mine.pth')
    names = [f'{scheme}://net.v1' for scheme in sources.LISTS]
    for name in (*names, f'{server.url}/x.pth', 'openmmlab://mine'):
        assert 'holds more than weights' in error_of(load, name)
    assert not made.exists()


def test_locate_loads_nothing(server, lists, tmp_path, monkeypatch):
    url = f'{server.url}/x.pth'
    names = (url, 'torchvision://net.v1', 'modelzoo://net.v1', 'openmmlab://old', 'mmcls://net.v1')
    assert {locate(name) for name in names} == {url}
    assert not server.requests
    torch.save(tensors(), server.folder / 'x.pth')
    file = fetch(url)
    assert {locate(name) for name in names} == {file}
    for name, message in (
        ('openmmlab://mine', 'no checkpoint .*mine.pth'),
        (str(tmp_path / 'mine.pth'), 'no checkpoint .*mine.pth'),
        ('condensenetv2://c.tar', 'no file c.tar'),
        ('mmcls://y', 'no weights named y'),
        ('s3://x', r's3://x: no such scheme \(known: '),
    ):
        assert re.search(message, error_of(locate, name))
    torch.save(tensors(), tmp_path / 'mine.pth')
    monkeypatch.setenv('HOME', str(tmp_path))
    for name in (
        'openmmlab://mine',
        f'{tmp_path}/mine.pth',
        f'condensenetv2://{tmp_path}/mine.pth',
        'condensenetv2://~/mine.pth',
    ):
        assert locate(name) == tmp_path / 'mine.pth'


# timm


def timm_weights(seed=0, name=NETWORK):
    torch.manual_seed(seed)
    return timm.create_model(name).state_dict()


@pytest.fixture
def _no_hub(monkeypatch):
    def download(*args, **options):
        raise AssertionError('asks the hub')

    monkeypatch.setattr(timm.models._builder, 'load_state_dict_from_hf', download)


@pytest.mark.parametrize(
    ('name', 'writer'),
    [
        (f'{TIMM}.safetensors', 'safetensors'),
        (f'{TIMM}.pth', 'zip'),
        (f'{TIMM}.bin', 'legacy'),
        (f'{TIMM}/model.safetensors', 'safetensors'),
        (f'{TIMM}/pytorch_model.bin', 'zip'),
    ],
)
@pytest.mark.usefixtures('_no_hub')
def test_timm_from_the_users_folder(name, writer, folder, tmp_path):
    weights = timm_weights(seed=3)
    (folder / name).parent.mkdir(exist_ok=True)
    WRITERS[writer](weights, folder / name)
    names = timm.create_model(NETWORK, num_classes=0).state_dict()
    assert_same(load(f'timm://{TIMM}')['state_dict'], {name: weights[name] for name in names})
    if writer != 'safetensors':
        made = tmp_path / 'made'
        content = dict(state_dict=weights, meta=Call(os.mkdir, str(made)))
        WRITERS[writer](content, folder / name)
        assert error_of(load, f'timm://{TIMM}').startswith(f'{folder / name} holds more than')
        assert not made.exists()


@pytest.mark.usefixtures('_no_hub')
def test_timms_classifiers_of_families_are_complete(folder):
    net = timm.create_model('rexnet_100')
    save_file(net.state_dict(), folder / 'rexnet_100.nav_in1k.safetensors')
    assert_same(load('timm://rexnet_100.nav_in1k')['state_dict'], net.state_dict())


@pytest.mark.parametrize(
    'change',
    [
        lambda weights: dict(list(weights.items())[1:]),
        lambda weights: timm_weights(name='resnet10t'),
    ],
    ids=['missing', 'another network'],
)
@pytest.mark.usefixtures('_no_hub')
def test_timm_weights_that_do_not_fit(change, folder):
    file = folder / f'{TIMM}.safetensors'
    save_file(change(timm_weights()), file)
    assert error_of(load, f'timm://{TIMM}').startswith(f'{file} does not fit timm://{TIMM} (')
    file.write_bytes(b'<html>')
    assert str(file) in error_of(load, f'timm://{TIMM}')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('rdnet_tiny.nope', 'timm has no weights named rdnet_tiny.nope; did you mean timm://rdnet'),
        ('rdnet_tinny.nv_in1k', '; did you mean timm://rdnet_tiny.nv_in1k?'),
    ],
)
def test_unknown_names_of_timm(name, message):
    assert message in error_of(load, f'timm://{name}')


def timm_rdnet():
    init = dict(type='Pretrained', checkpoint='timm://rdnet_tiny.nv_in1k')
    return MODELS.build(dict(type='mmdense.RDNet', init_cfg=init))


def test_timm_fills_a_backbone(monkeypatch):
    published = timm.create_model('rdnet_tiny')
    weights = {k: v for k, v in published.state_dict().items() if not k.startswith('head.')}
    calls = []

    def create_model(name, **options):
        calls.append((name, options))
        return published

    monkeypatch.setattr(timm, 'create_model', create_model)
    net = timm_rdnet()
    net.init_weights()
    # With its classifier: without it, timm would not check that all weights are there.
    assert calls == [('rdnet_tiny.nv_in1k', dict(pretrained=True, pretrained_cfg_overlay=None))]
    assert_same(net.state_dict(), weights)


def test_timm_without_network(monkeypatch):
    def create_model(name, **options):
        raise OSError('cannot reach the hub\nand much more')

    monkeypatch.setattr(timm, 'create_model', create_model)
    assert error_of(timm_rdnet().init_weights) == (
        'timm://rdnet_tiny.nv_in1k could not be downloaded (OSError: cannot reach the hub): get '
        'model.safetensors of naver-ai/rdnet_tiny.nv_in1k from the Hugging Face hub, and put it as '
        f'rdnet_tiny.nv_in1k.safetensors into a folder and set the variable {FOLDER} to it '
        f'{SCRATCH}'
    )


def test_locating_weights_of_timm(folder, tmp_path, monkeypatch):
    cache = partial(sources.try_to_load_from_cache, cache_dir=str(tmp_path / 'hub'))
    monkeypatch.setattr(sources, 'try_to_load_from_cache', cache)
    name, repo = f'timm://{TIMM}', f'timm/{TIMM}'
    assert locate(name).endswith(f'{repo}/resolve/main/model.safetensors')
    hub = tmp_path / 'hub' / f'models--{repo.replace("/", "--")}'
    for kind, path in dict(refs='main', snapshots='0/pytorch_model.bin').items():
        (hub / kind / path).parent.mkdir(parents=True)
        (hub / kind / path).write_text('0')
    assert locate(name) == hub / 'snapshots/0/pytorch_model.bin'
    save_file(tensors(), folder / f'{TIMM}.safetensors')
    assert locate(name) == folder / f'{TIMM}.safetensors'
    assert 'did you mean' in error_of(locate, f'{name}x')


@pytest.mark.slow
def test_timm_offline(tmp_path, monkeypatch):
    """With the weights in the hub's cache, and without."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    net = timm_rdnet()
    text = error_of(net.init_weights)
    assert text.startswith('timm://rdnet_tiny.nv_in1k could not be downloaded (')
    assert FOLDER in text
    repo = tmp_path / 'hub/models--naver-ai--rdnet_tiny.nv_in1k'
    file = repo / 'snapshots' / ('0' * 40) / 'model.safetensors'
    file.parent.mkdir(parents=True)
    (repo / 'refs').mkdir()
    (repo / 'refs/main').write_text('0' * 40)
    weights = timm_weights(name='rdnet_tiny')
    save_file(weights, file)
    net.init_weights()
    assert_same(net.state_dict(), {name: weights[name] for name in net.state_dict()})


# CondenseNetV2 (its weights: test_formats.py)


def test_missing_files_of_condensenetv2(tmp_path):
    init = dict(type='Pretrained', checkpoint='condensenetv2://weights/a.pth.tar')
    net = MODELS.build(dict(type='mmdense.CondenseNetV2', arch='a', init_cfg=init))
    assert error_of(net.init_weights) == (
        'condensenetv2://weights/a.pth.tar: no file weights/a.pth.tar: download the model that is '
        f'linked in {CONDENSENETV2} {SCRATCH}'
    )
    assert 'no file' in error_of(load, f'condensenetv2://{tmp_path}')


def test_condensenetv2_in_the_users_folder(folder):
    (folder / 'a.pth.tar').touch()
    text = error_of(load, 'condensenetv2://weights/a.pth.tar')
    assert text.startswith(f'{folder}/a.pth.tar is empty')
    torch.save(tensors(), folder / 'a.pth.tar')
    text = error_of(load, 'condensenetv2://weights/a.pth.tar')
    assert text.startswith(f'{folder}/a.pth.tar is no model of {CONDENSENETV2}: ')
    assert_same(read_checkpoint(folder / 'a.pth.tar'), tensors())
