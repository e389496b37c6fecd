"""Reading, writing and fetching weights: no file runs code, each fault is one line."""

import argparse
import errno
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections import OrderedDict
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import mmengine.runner
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn

from mmdense.errors import UserError
from mmdense.files import WriteError
from mmdense.weights import sources as checkpoints
from mmdense.weights.files import TRUST, read_checkpoint, write_checkpoint
from mmdense.weights.sources import FOLDER, fetch, locate

RDNET = dict(arch=dict(stem=8, growth=(8, 8), down=(1,), blocks=1))
NETWORK = 'test_resnet'  # timm's smallest
TIMM = f'{NETWORK}.r160_in1k'
SUFFIXES = ('.pth', '.safetensors')


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    for name in (FOLDER, TRUST):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path_factory.mktemp('torch')))
    monkeypatch.setenv('no_proxy', '127.0.0.1')


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        'a.weight': torch.randn(64, 32, generator=generator),
        'a.bias': torch.randn(64, generator=generator).half(),
        'b.count': torch.tensor(3),
    }


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def save_zip(held, file):
    torch.save(held, file)


def save_legacy(held, file):
    torch.save(held, file, _use_new_zipfile_serialization=False)


def save_safetensors(held, file):
    safetensors.torch.save_file(held, file)


WRITERS = dict(zip=save_zip, legacy=save_legacy, safetensors=save_safetensors)
TORCH_WRITERS = dict(zip=save_zip, legacy=save_legacy)


def refusal(load, name):
    """Return the error's text, which is one line and names the file or address."""
    with pytest.raises(UserError) as error:
        load(str(name))
    said = str(error.value)
    assert '\n' not in said
    assert str(name) in said
    return said


# Reading


@pytest.mark.parametrize(
    ('writer', 'suffix'),
    [(writer, suffix) for writer in WRITERS for suffix in ('.pth', '.safetensors', '.bin', '')],
)
def test_the_content_tells_what_a_file_is(writer, suffix, tmp_path):
    file = tmp_path / f'weights{suffix}'
    WRITERS[writer](tensors(), file)
    held = read_checkpoint(file)
    if writer == 'safetensors':
        assert held['meta'] == {}
        held = held['state_dict']
    assert_equal(held, tensors())


def test_metadata_of_safetensors(tmp_path):
    file = tmp_path / 'x.safetensors'
    safetensors.torch.save_file(tensors(), file, metadata=dict(format='pt', licence='MIT'))
    assert read_checkpoint(file)['meta'] == dict(format='pt', licence='MIT')


def test_foreign_metadata_named_meta(tmp_path):
    file = tmp_path / 'x.safetensors'
    safetensors.torch.save_file(tensors(), file, metadata=dict(meta='trained by me'))
    assert_equal(read_checkpoint(file)['state_dict'], tensors())


def test_headers_that_look_like_a_web_page(tmp_path):
    file = tmp_path / 'x.safetensors'
    length = int.from_bytes(b' <', 'little')
    header = json.dumps(dict(a=dict(dtype='F32', shape=[1], data_offsets=[0, 4])))
    file.write_bytes(
        struct.pack('<Q', length) + header.ljust(length).encode() + struct.pack('<f', 2.5)
    )
    assert safetensors.torch.load_file(file)['a'] == 2.5  # it is one
    assert read_checkpoint(file)['state_dict']['a'] == 2.5


def test_paths_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    save_zip(tensors(), tmp_path / 'x.pth')
    assert_equal(read_checkpoint('~/x.pth'), tensors())


def training_state():
    return dict(
        state_dict=tensors(),
        meta=dict(epoch=3, time='now', loss=np.float32(0.25), shape=(3, 4)),
        message_hub=dict(
            log_scalars={'train/loss': HistoryBuffer([1.0, 3.0], [1, 1])},
            runtime_info=dict(iter=np.int64(7), best=np.float64(0.5)),
        ),
        optimizer=dict(state={0: dict(step=torch.tensor(2.0))}, param_groups=[dict(lr=0.1)]),
        args=argparse.Namespace(lr=0.1, inner=argparse.Namespace(arch='a')),
    )


def assert_training_state(held):
    assert_equal(held['state_dict'], tensors())
    assert held['meta'] == training_state()['meta']
    assert held['message_hub']['log_scalars']['train/loss'].statistics('max') == 3
    assert held['message_hub']['runtime_info'] == dict(iter=7, best=0.5)
    assert held['optimizer']['param_groups'] == [dict(lr=0.1)]
    assert held['args'].inner.arch == 'a'


@pytest.mark.parametrize('writer', TORCH_WRITERS)
def test_training_state_and_arguments(writer, tmp_path):
    file = tmp_path / 'x.pth'
    TORCH_WRITERS[writer](training_state(), file)
    assert_training_state(read_checkpoint(file))
    assert_training_state(CheckpointLoader.load_checkpoint(str(file), 'cpu'))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.skipif(
    not hasattr(mmengine_checkpoint, '_safe_torch_load'), reason='of the maintained mmengine'
)
def test_training_state_after_a_load_of_mmengine(tmp_path):
    """Which takes its own entries off torch's list of what may be read: ours are among them."""
    file = tmp_path / 'x.pth'
    state = training_state()
    del state['args']
    save_zip(state, file)
    allowed = [*torch.serialization.get_safe_globals()]
    try:
        mmengine_checkpoint._safe_torch_load(file)
        held = read_checkpoint(file)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)
    assert held['message_hub']['log_scalars']['train/loss'].statistics('max') == 3


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        (b'', 'is empty (0 bytes): download it again'),
        (b'<!DOCTYPE html>\n<html>Not found</html>\n', 'a web page: download the file itself'),
        (b'\n\n  <html>\n</html>\n', 'a web page: download the file itself'),
        (
            b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n',
            'a Git LFS pointer: run git lfs pull',
        ),
        (bytes(range(7, 250)), 'is damaged, or no checkpoint'),
        (b'\x80\x02 not a pickle', 'is damaged, or no checkpoint'),
        (b'PK\x03\x04 not a zip', 'is damaged, or no checkpoint'),
        (b'\x10' + bytes(7) + b'{not json at all', 'is damaged, or no checkpoint'),
        (b'{"error":\n"no such model"}\n', 'is damaged, or no checkpoint'),
    ],
)
@pytest.mark.parametrize('suffix', SUFFIXES)
def test_foreign_files(suffix, content, said, tmp_path):
    file = tmp_path / f'x{suffix}'
    file.write_bytes(content)
    assert said in refusal(read_checkpoint, file)


def test_folders_and_missing_files(tmp_path):
    assert refusal(read_checkpoint, tmp_path) == f'no file {tmp_path}: it is a folder'
    missing = tmp_path / 'missing.pth'
    assert refusal(read_checkpoint, missing) == f'no file {missing}'


@pytest.mark.parametrize('writer', WRITERS)
def test_truncated_files(writer, tmp_path):
    whole = tmp_path / 'whole'
    WRITERS[writer](tensors(), whole)
    content = whole.read_bytes()
    size = len(content)
    for kept in (1, 7, 8, 9, 64, size // 4, size // 2, size - 100, size - 1):
        file = tmp_path / f'{kept}.pth'
        file.write_bytes(content[:kept])
        assert 'is damaged, or no checkpoint' in refusal(read_checkpoint, file)


@pytest.mark.parametrize(
    ('held', 'kind'),
    [
        ([torch.zeros(2)], 'list'),
        (torch.zeros(2), 'Tensor'),
        ('weights', 'str'),
        (None, 'NoneType'),
    ],
)
@pytest.mark.parametrize('writer', TORCH_WRITERS)
def test_other_things_than_a_dict(writer, held, kind, tmp_path):
    file = tmp_path / 'x.pth'
    TORCH_WRITERS[writer](held, file)
    assert refusal(read_checkpoint, file) == f'{file} holds a {kind}, not a checkpoint'


def test_torchscript(tmp_path):
    file = tmp_path / 'x.pth'
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(file)
    refusal(read_checkpoint, file)


# Files that would run something


class Call:
    """Is pickled as the call of a function."""

    def __init__(self, function, *args):
        self.function = function
        self.args = args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):  # so that it can be a function that is called
        raise AssertionError


PLACES = {
    'whole file': lambda x: x,
    'state_dict': lambda x: dict(state_dict=x),
    'tensor': lambda x: dict(state_dict={**tensors(), 'c': x}),
    'meta': lambda x: dict(state_dict=tensors(), meta=dict(deep=[dict(x=x)])),
    'arguments': lambda x: dict(state_dict=tensors(), args=argparse.Namespace(x=x)),
    'OrderedDict': lambda x: dict(state_dict=OrderedDict(a=x)),
    'key': lambda x: {x: tensors()},
}


def load_backbone(path):
    net = MODELS.build(
        dict(type='mmdense.RDNet', **RDNET, init_cfg=dict(type='Pretrained', checkpoint=path))
    )
    net.init_weights()


def load_resnet(path):
    init = dict(type='Pretrained', checkpoint=path)
    MODELS.build(dict(type='mmdet.ResNet', depth=18, base_channels=4, init_cfg=init)).init_weights()


LOADERS = {
    'read_checkpoint': read_checkpoint,
    'CheckpointLoader': CheckpointLoader.load_checkpoint,
    'load_checkpoint': lambda path: mmengine.runner.load_checkpoint(nn.Linear(2, 2), path),
    'init_cfg': load_backbone,
    'init_cfg of mmdet': load_resnet,
    'condensenetv2': lambda path: CheckpointLoader.load_checkpoint(f'condensenetv2://{path}'),
}


@pytest.mark.parametrize('loader', LOADERS)
@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('writer', TORCH_WRITERS)
def test_nothing_in_a_file_is_run(writer, place, loader, tmp_path):
    file, made = tmp_path / 'x.pth', tmp_path / 'made'
    TORCH_WRITERS[writer](PLACES[place](Call(os.mkdir, str(made))), file)
    said = refusal(LOADERS[loader], file)
    assert not made.exists()
    assert f'({os.mkdir.__module__}.mkdir)' in said
    assert f'{TRUST}=1' in said
    torch.load(file, weights_only=False)
    assert made.is_dir()  # the file is one that would have


@pytest.mark.parametrize(
    ('held', 'named'),
    [
        pytest.param(Call(eval, '1 + 1'), 'eval'),
        pytest.param(Call(getattr, int, 'from_bytes'), 'int'),
        (Call(getattr, OrderedDict, 'fromkeys'), 'builtins.getattr'),
        (Call(getattr, Call(getattr, HistoryBuffer, 'mean'), '__globals__'), 'builtins.getattr'),
        (Fraction(1, 2), 'fractions.Fraction'),
    ],
)
@pytest.mark.parametrize('writer', TORCH_WRITERS)
def test_what_was_refused_is_named(writer, held, named, tmp_path):
    file = tmp_path / 'x.pth'
    TORCH_WRITERS[writer](dict(state_dict=tensors(), meta=held), file)
    said = refusal(read_checkpoint, file)
    assert f'{named})' in said.partition(', and reading')[0]
    assert f'{TRUST}=1' in said


def objects(value):
    array = np.empty(1, dtype=object)
    array[0] = value
    return array


@pytest.mark.parametrize('writer', TORCH_WRITERS)
def test_arrays_of_objects_run_nothing(writer, tmp_path):
    file, made = tmp_path / 'x.pth', tmp_path / 'made'
    held = objects(Call(os.mkdir, str(made)))
    TORCH_WRITERS[writer](dict(state_dict=tensors(), meta=held), file)
    refusal(read_checkpoint, file)
    assert not made.exists()


def test_arrays_of_objects_have_a_way_out(tmp_path):
    file = tmp_path / 'x.pth'
    save_zip(dict(state_dict=tensors(), meta=objects('a class name')), file)
    assert TRUST in refusal(read_checkpoint, file)


def test_what_getattr_gives_is_not_called(tmp_path):
    file = tmp_path / 'x.pth'
    held = Call(Call(getattr, HistoryBuffer, '__subclasses__'))
    save_zip(dict(state_dict=tensors(), meta=held), file)
    refusal(read_checkpoint, file)


@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_newer_pickles_run_nothing(protocol, tmp_path):
    file, made = tmp_path / 'x.pth', tmp_path / 'made'
    torch.save(dict(state_dict=Call(os.mkdir, str(made))), file, pickle_protocol=protocol)
    refusal(read_checkpoint, file)
    assert not made.exists()


def test_trusted_files(tmp_path, monkeypatch):
    file = tmp_path / 'x.pth'
    save_zip(dict(state_dict=tensors(), meta=Fraction(1, 2)), file)
    monkeypatch.setenv(TRUST, '0')
    refusal(read_checkpoint, file)
    monkeypatch.setenv(TRUST, '1')
    held = read_checkpoint(file)
    assert held['meta'] == Fraction(1, 2)
    assert_equal(held['state_dict'], tensors())


# Writing


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_round_trip(suffix, tmp_path):
    file = tmp_path / f'x{suffix}'
    meta = dict(
        name='x', size=(32, 48), best=dict(mAP=np.float64(0.5), epoch=3), classes=['a', 'b']
    )
    weights = tensors()
    weights['a.weight'].requires_grad_()
    write_checkpoint(file, weights, meta)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    held = read_checkpoint(file)
    assert held.keys() == {'state_dict', 'meta'}
    assert_equal(held['state_dict'], tensors())
    assert not any(value.requires_grad for value in held['state_dict'].values())
    as_read = list if suffix == '.safetensors' else tuple
    assert held['meta'] == {**meta, 'size': as_read((32, 48))}
    assert weights['a.weight'].requires_grad  # what was given is left alone


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_views_are_written_alone(suffix, tmp_path):
    base = torch.arange(1e6).reshape(1000, 1000)
    views = dict(row=base[3], again=base[3], column=base[:, 2], transposed=base[:2, :3].T)
    file = tmp_path / f'x{suffix}'
    write_checkpoint(file, views, {})
    assert file.stat().st_size < 20_000
    assert_equal(read_checkpoint(file)['state_dict'], views)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_files_are_not_overwritten(suffix, tmp_path):
    file = tmp_path / f'x{suffix}'
    file.write_bytes(b'mine')
    said = refusal(lambda path: write_checkpoint(path, tensors(), {}), file)
    assert said == f'{file} is there already: choose another name'
    assert file.read_bytes() == b'mine'


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('x.bin', '{file} must end in .pth or .safetensors'),
        ('x', '{file} must end in .pth or .safetensors'),
        ('none/x.pth', 'no folder {file.parent} to write x.pth to'),
    ],
)
def test_impossible_targets(name, said, tmp_path):
    file = tmp_path / name
    with pytest.raises(UserError) as error:
        write_checkpoint(file, tensors(), {})
    assert str(error.value) == said.format(file=file)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_failure_leaves_nothing_behind(suffix, tmp_path, monkeypatch):
    begun = []

    def full(opened):
        begun.extend(tmp_path.iterdir())
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(WriteError, match='No space left'):
        write_checkpoint(tmp_path / f'x{suffix}', tensors(), {})
    assert len(begun) == 1
    assert not list(tmp_path.iterdir())


def test_the_same_weights_give_the_same_file(tmp_path):
    for suffix in SUFFIXES:
        for name in ('a', 'b'):
            write_checkpoint(tmp_path / f'{name}{suffix}', tensors(), dict(x=1, y=[2]))
        assert (tmp_path / f'a{suffix}').read_bytes() == (tmp_path / f'b{suffix}').read_bytes()


def test_harmless_values_are_read(tmp_path):
    held = dict(
        state_dict=tensors(),
        none=np.zeros(0),
        words=np.array(['a', 'bc']),
        unsigned=np.uint16(3),
        history=HistoryBuffer(),
        meta=ConfigDict(a=dict(b=1)),
    )
    save_zip(held, tmp_path / 'x.pth')
    read = read_checkpoint(tmp_path / 'x.pth')
    assert read['none'].size == 0
    assert list(read['words']) == ['a', 'bc']
    assert read['unsigned'] == 3
    assert read['meta'].a.b == 1


def test_a_program_of_torchscript(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / 'x.pt')
    said = refusal(read_checkpoint, tmp_path / 'x.pt')
    assert 'is a TorchScript program' in said or 'not a checkpoint' in said  # torch before 2.6


def test_files_that_no_flag_helps(tmp_path):
    (tmp_path / 'x.pth').write_bytes(b'{"not": "a checkpoint"}')
    assert TRUST not in refusal(read_checkpoint, tmp_path / 'x.pth')


def test_unknown_schemes():
    with pytest.raises(UserError, match=r'hf-hub://x: no such scheme .*timm://'):
        CheckpointLoader.load_checkpoint('hf-hub://x')


# Fetching


@pytest.fixture
def server(tmp_path):
    """A folder that is served by http, its address, and the paths that were asked for."""
    folder = tmp_path / 'served'
    folder.mkdir()
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    handler = partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        url = f'http://127.0.0.1:{httpd.server_port}'
        yield SimpleNamespace(folder=folder, url=url, asked=asked)
        httpd.shutdown()
        thread.join()


def cached():
    """Return the names of the downloaded files: in folders of their own, or with a checksum."""
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    return [file.name for file in folder.rglob('*') if file.is_file()]


def test_files_are_downloaded_once(server):
    save_zip(tensors(), server.folder / 'x.pth')
    for _ in range(2):
        file = fetch(f'{server.url}/x.pth')
        assert file.name == 'x.pth'
        assert server.asked == ['/x.pth']
    assert_equal(read_checkpoint(file), tensors())
    assert cached() == ['x.pth']


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_addresses_with_a_query(suffix, server):
    write_checkpoint(server.folder / f'x{suffix}', tensors(), {})
    held = CheckpointLoader.load_checkpoint(f'{server.url}/x{suffix}?download=true')
    assert_equal(held['state_dict'], tensors())
    assert cached() == [f'x{suffix}']


def test_a_date_is_no_checksum(server):
    save_zip(tensors(), server.folder / 'x-20240101.pth')
    assert fetch(f'{server.url}/x-20240101.pth').name == 'x-20240101.pth'


def test_addresses_that_differ_in_the_folder_alone(server):
    for seed, folder in enumerate(('one', 'two')):
        (server.folder / folder).mkdir()
        save_safetensors(tensors(seed), server.folder / folder / 'model.safetensors')
    first, second = (
        CheckpointLoader.load_checkpoint(f'{server.url}/{folder}/model.safetensors')['state_dict']
        for folder in ('one', 'two')
    )
    assert_equal(first, tensors(0))
    assert_equal(second, tensors(1))


@pytest.mark.parametrize('length', [8, 10, 64])
def test_checksums(length, server):
    save_zip(tensors(), server.folder / 'x.pth')
    content = (server.folder / 'x.pth').read_bytes()
    right = hashlib.sha256(content).hexdigest()[:length]
    wrong = ('1' if right[0] == '0' else '0') + right[1:]
    for checksum in (right, wrong):
        (server.folder / f'x-{checksum}.pth').write_bytes(content)
    assert fetch(f'{server.url}/x-{right}.pth').is_file()
    url = f'{server.url}/x-{wrong}.pth'
    said = refusal(fetch, url)
    assert f'invalid hash value (expected "{wrong}"' in said
    assert cached() == [f'x-{right}.pth']


def test_the_own_folder_comes_first(server, tmp_path, monkeypatch):
    own = tmp_path / 'own'
    own.mkdir()
    monkeypatch.setenv(FOLDER, str(own))
    save_zip(tensors(1), server.folder / 'x.pth')
    save_zip(tensors(2), own / 'x.pth')
    assert fetch(f'{server.url}/x.pth') == own / 'x.pth'
    assert not server.asked
    assert_equal(CheckpointLoader.load_checkpoint(f'{server.url}/x.pth'), tensors(2))
    (own / 'x.pth').unlink()
    assert_equal(CheckpointLoader.load_checkpoint(f'{server.url}/x.pth'), tensors(1))
    assert not list(own.iterdir())


def test_the_own_folder_must_be_one(server, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path / 'none'))
    with pytest.raises(UserError) as error:
        fetch(f'{server.url}/x.pth')
    assert str(error.value) == f'{FOLDER} names no folder: {tmp_path / "none"}'
    assert not server.asked


def test_unreachable_addresses(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    url = f'http://127.0.0.1:{port}/folder/x.pth'
    said = refusal(fetch, url)
    assert 'refused' in said
    assert said.endswith(f'put it as x.pth into a folder of yours that the variable {FOLDER} names')
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert refusal(fetch, url).endswith(f'put it as x.pth into {tmp_path}')
    assert url in refusal(load_backbone, url)


def test_missing_on_the_server(server):
    said = refusal(fetch, f'{server.url}/x.pth')
    assert 'HTTP Error 404' in said
    assert FOLDER in said
    assert not cached()


def test_other_processes_wait_for_the_first(server, monkeypatch):
    save_zip(tensors(), server.folder / 'x.pth')
    monkeypatch.setenv('LOCAL_RANK', '1')
    said = refusal(fetch, f'{server.url}/x.pth')
    assert 'see the log of the first process' in said
    assert not server.asked


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_backbones_from_an_address(suffix, server):
    def build(**options):
        return MODELS.build(dict(type='mmdense.RDNet', **RDNET, **options))

    torch.manual_seed(0)
    expected = build().state_dict()
    write_checkpoint(server.folder / f'x{suffix}', expected, {})
    net = build(init_cfg=dict(type='Pretrained', checkpoint=f'{server.url}/x{suffix}'))
    net.init_weights()
    assert_equal(net.state_dict(), expected)


@pytest.mark.parametrize('scheme', ['torchvision', 'modelzoo'])
def test_torchvision(scheme, server, monkeypatch):
    save_zip(tensors(), server.folder / 'net-v1.pth')
    table = {'net.v1': f'{server.url}/net-v1.pth'}
    monkeypatch.setattr(checkpoints, 'get_torchvision_models', lambda: table)
    assert_equal(CheckpointLoader.load_checkpoint(f'{scheme}://net.v1'), tensors())
    assert server.asked == ['/net-v1.pth']
    with pytest.raises(UserError) as error:
        CheckpointLoader.load_checkpoint(f'{scheme}://net.v2')
    assert str(error.value) == (
        f'{scheme} has no weights named net.v2; did you mean {scheme}://net.v1?'
    )


@pytest.mark.parametrize(
    ('scheme', 'table'),
    [
        ('openmmlab', 'get_external_models'),
        ('open-mmlab', 'get_external_models'),
        ('mmcls', 'get_mmcls_models'),
    ],
)
def test_nothing_that_other_schemes_load_is_run(scheme, table, server, tmp_path, monkeypatch):
    made = tmp_path / 'made'
    save_zip(dict(state_dict={'backbone.a': Call(os.mkdir, str(made))}), server.folder / 'x.pth')
    models = dict(x=f'{server.url}/x.pth')
    monkeypatch.setattr(checkpoints, table, lambda: models)
    with pytest.raises(UserError, match='holds more than weights'):
        CheckpointLoader.load_checkpoint(f'{scheme}://x')
    assert server.asked == ['/x.pth']
    assert not made.exists()


@pytest.mark.parametrize('scheme', ['openmmlab', 'open-mmlab', 'mmcls'])
def test_other_names_of_mmengine(scheme, server, tmp_path, monkeypatch):
    weights = {f'backbone.{k}': v for k, v in tensors().items()}
    save_zip(dict(state_dict={**weights, 'head.bias': torch.zeros(1)}), server.folder / 'x.pth')
    save_zip(tensors(), tmp_path / 'mine.pth')
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    models = dict(x=f'{server.url}/x.pth', mine='mine.pth')
    for table in ('get_external_models', 'get_mmcls_models'):
        monkeypatch.setattr(checkpoints, table, lambda: models)
    monkeypatch.setattr(checkpoints, 'get_deprecated_model_names', lambda: dict(old='x'))
    if scheme == 'mmcls':  # as ever, the backbone alone
        assert_equal(CheckpointLoader.load_checkpoint('mmcls://x')['state_dict'], tensors())
        return
    for name in ('x', 'old'):
        held = CheckpointLoader.load_checkpoint(f'{scheme}://{name}')['state_dict']
        assert len(held) == len(weights) + 1
    assert_equal(CheckpointLoader.load_checkpoint(f'{scheme}://mine'), tensors())


def test_locating_asks_nobody(server, tmp_path, monkeypatch):
    url = f'{server.url}/x.pth'
    models = dict(x=url, mine='mine.pth')
    for table in ('get_torchvision_models', 'get_external_models', 'get_mmcls_models'):
        monkeypatch.setattr(checkpoints, table, lambda: models)
    monkeypatch.setattr(checkpoints, 'get_deprecated_model_names', lambda: dict(old='x'))
    names = (url, 'torchvision://x', 'modelzoo://x', 'openmmlab://old', 'mmcls://x')
    assert {locate(name) for name in names} == {url}
    assert not server.asked
    save_zip(tensors(), server.folder / 'x.pth')
    file = fetch(url)
    assert {locate(name) for name in names} == {file}

    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    for name, missing in (
        ('openmmlab://mine', 'mine.pth'),
        (str(tmp_path / 'mine.pth'), 'mine.pth'),
        ('condensenetv2://c.tar', 'no file c.tar'),
        ('mmcls://y', 'no weights named y'),
        ('s3://x', 's3://x: no such scheme (known: '),
    ):
        with pytest.raises(UserError) as error:
            locate(name)
        assert missing in str(error.value)
    save_zip(tensors(), tmp_path / 'mine.pth')
    for name in ('openmmlab://mine', str(tmp_path / 'mine.pth')):
        assert locate(name) == tmp_path / 'mine.pth'
    assert locate(f'condensenetv2://{tmp_path}/mine.pth') == tmp_path / 'mine.pth'


def test_nothing_in_a_download_is_run(server, tmp_path):
    made = tmp_path / 'made'
    save_zip(dict(state_dict=Call(os.mkdir, str(made))), server.folder / 'x.pth')
    with pytest.raises(UserError, match=rf'\({os.mkdir.__module__}\.mkdir\)'):
        CheckpointLoader.load_checkpoint(f'{server.url}/x.pth')
    assert not made.exists()


# timm


def timm_weights(seed=0, name=NETWORK):
    torch.manual_seed(seed)
    return timm.create_model(name).state_dict()


def without_classifier(state_dict, name=NETWORK):
    return {key: state_dict[key] for key in timm.create_model(name, num_classes=0).state_dict()}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of the user's own weights; whoever looks elsewhere fails."""

    def download(*args, **options):
        raise AssertionError('asks the hub')

    folder = tmp_path / 'own'
    (folder / TIMM).mkdir(parents=True)
    monkeypatch.setenv(FOLDER, str(folder))
    monkeypatch.setattr(timm.models._builder, 'load_state_dict_from_hf', download)
    return folder


@pytest.mark.parametrize(
    ('name', 'writer'),
    [
        (f'{TIMM}.safetensors', 'safetensors'),
        (f'{TIMM}.pth', 'zip'),
        (f'{TIMM}.bin', 'zip'),
        (f'{TIMM}.bin', 'legacy'),
        (f'{TIMM}/model.safetensors', 'safetensors'),
        (f'{TIMM}/pytorch_model.bin', 'zip'),
    ],
)
def test_timm_from_the_own_folder(name, writer, own):
    expected = timm_weights(seed=3)
    WRITERS[writer](expected, own / name)
    held = CheckpointLoader.load_checkpoint(f'timm://{TIMM}')
    assert_equal(held['state_dict'], without_classifier(expected))


def rename(state_dict):
    return {('renamed' if k == 'layer1.0.conv1.weight' else k): v for k, v in state_dict.items()}


@pytest.mark.parametrize(
    'change',
    [
        rename,
        lambda state_dict: dict(list(state_dict.items())[1:]),
        lambda state_dict: {f'net.{key}': value for key, value in state_dict.items()},
        lambda state_dict: timm_weights(name='resnet10t'),
    ],
    ids=['renamed', 'missing', 'prefix', 'another network'],
)
def test_timm_weights_that_do_not_fit(change, own):
    save_safetensors(change(timm_weights()), own / f'{TIMM}.safetensors')
    with pytest.raises(UserError) as error:
        CheckpointLoader.load_checkpoint(f'timm://{TIMM}')
    said = str(error.value)
    assert '\n' not in said
    assert said.startswith(f'{own / TIMM}.safetensors does not fit timm://{TIMM} (')


@pytest.mark.parametrize('name', [f'{TIMM}.pth', f'{TIMM}.bin', f'{TIMM}/pytorch_model.bin'])
def test_nothing_in_files_for_timm_is_run(name, own, tmp_path):
    made = tmp_path / 'made'
    save_zip(dict(state_dict=timm_weights(), meta=Call(os.mkdir, str(made))), own / name)
    with pytest.raises(UserError) as error:
        CheckpointLoader.load_checkpoint(f'timm://{TIMM}')
    assert not made.exists()
    assert '\n' not in str(error.value)
    assert str(own / name) in str(error.value)


def test_damaged_files_for_timm(own):
    (own / f'{TIMM}.safetensors').write_bytes(b'<html>')
    with pytest.raises(UserError) as error:
        CheckpointLoader.load_checkpoint(f'timm://{TIMM}')
    assert '\n' not in str(error.value)
    assert f'{own / TIMM}.safetensors' in str(error.value)


def test_locating_weights_of_timm(own, tmp_path, monkeypatch):
    cache = partial(checkpoints.try_to_load_from_cache, cache_dir=str(tmp_path / 'hub'))
    monkeypatch.setattr(checkpoints, 'try_to_load_from_cache', cache)
    name, repo = f'timm://{TIMM}', f'timm/{TIMM}'
    assert locate(name).endswith(f'{repo}/resolve/main/model.safetensors')
    folder = tmp_path / 'hub' / f'models--{repo.replace("/", "--")}'
    write = dict(refs='main', snapshots='0/pytorch_model.bin')
    for kind, path in write.items():
        (folder / kind / path).parent.mkdir(parents=True)
        (folder / kind / path).write_text('0')
    assert locate(name) == folder / 'snapshots/0/pytorch_model.bin'
    save_safetensors(tensors(), own / f'{TIMM}.safetensors')
    assert locate(name) == own / f'{TIMM}.safetensors'
    with pytest.raises(UserError, match='did you mean'):
        locate(f'{name}x')


OFFLINE = """
import json, sys, torch, safetensors.torch
from mmengine.registry import MODELS
import mmdense
from mmdense.errors import UserError

init = dict(type='Pretrained', checkpoint='timm://rdnet_tiny.nv_in1k')
net = MODELS.build(dict(type='mmdense.RDNet', arch='tiny', init_cfg=init))
try:
    net.init_weights()
    said = None
except UserError as error:
    said = str(error)
held = net.state_dict()
expected = safetensors.torch.load_file(sys.argv[1])
equal = sum(torch.equal(value, expected[name]) for name, value in held.items())
print(json.dumps(dict(said=said, equal=equal, all=len(held))))
"""


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """A cache of the Hugging Face hub that holds random weights."""
    home = tmp_path_factory.mktemp('hf')
    repo = home / 'hub/models--naver-ai--rdnet_tiny.nv_in1k'
    commit = '0' * 40
    file = repo / 'snapshots' / commit / 'model.safetensors'
    file.parent.mkdir(parents=True)
    (repo / 'refs').mkdir()
    (repo / 'refs/main').write_text(commit)
    safetensors.torch.save_file(timm_weights(name='rdnet_tiny'), file)
    return SimpleNamespace(home=home, file=file)


def load_offline(home, file):
    done = subprocess.run(
        [sys.executable, '-c', OFFLINE, str(file)],
        env={**os.environ, 'HF_HOME': str(home), 'HF_HUB_OFFLINE': '1'},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_timm_from_the_cache_of_the_hub(hub):
    found = load_offline(hub.home, hub.file)
    assert found['said'] is None
    assert found['equal'] == found['all'] > 200


@pytest.mark.slow
def test_timm_without_cache_and_network(hub, tmp_path):
    found = load_offline(tmp_path, hub.file)
    said = found['said']
    assert '\n' not in said
    assert said.startswith('timm://rdnet_tiny.nv_in1k could not be downloaded (')
    assert 'get model.safetensors of naver-ai/rdnet_tiny.nv_in1k from the Hugging Face hub' in said
    assert 'put it as rdnet_tiny.nv_in1k.safetensors into a folder of yours that the variable ' in (
        said
    )
    assert FOLDER in said
