"""Reading and writing checkpoint files: nothing in a file is run, each fault is one line."""

import argparse
import json
import os
import struct
from collections import OrderedDict
from fractions import Fraction

import mmengine.runner
import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from torch import nn

from checkpoints import TORCH_WRITERS, WRITERS, Call, assert_same, error_of, tensors
from mmdense.weights.files import read_checkpoint, write_checkpoint

TRUST = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
SUFFIXES = ('.pth', '.safetensors')
every_suffix = pytest.mark.parametrize('suffix', SUFFIXES)
every_torch_writer = pytest.mark.parametrize('writer', TORCH_WRITERS)


@pytest.fixture(autouse=True)
def _untrusted(monkeypatch):
    monkeypatch.delenv(TRUST, raising=False)


# Reading


@pytest.mark.parametrize('writer', WRITERS)
def test_the_content_decides_what_a_file_is(writer, tmp_path):
    for suffix in ('.pth', '.safetensors', '.bin', ''):
        file = tmp_path / f'weights{suffix}'
        WRITERS[writer](tensors(), file)
        checkpoint = read_checkpoint(file)
        if writer == 'safetensors':
            assert checkpoint['meta'] == {}
            checkpoint = checkpoint['state_dict']
        assert_same(checkpoint, tensors())


@pytest.mark.parametrize('metadata', [dict(format='pt', licence='MIT'), dict(meta='mine')])
def test_metadata_of_safetensors(metadata, tmp_path):
    file = tmp_path / 'x.safetensors'
    safetensors.torch.save_file(tensors(), file, metadata=metadata)
    checkpoint = read_checkpoint(file)
    assert checkpoint['meta'] == metadata
    assert_same(checkpoint['state_dict'], tensors())


def test_a_header_that_looks_like_a_web_page(tmp_path):
    file = tmp_path / 'x.safetensors'
    length = int.from_bytes(b' <', 'little')
    header = json.dumps(dict(a=dict(dtype='F32', shape=[1], data_offsets=[0, 4])))
    file.write_bytes(
        struct.pack('<Q', length) + header.ljust(length).encode() + struct.pack('<f', 2.5)
    )
    assert read_checkpoint(file)['state_dict']['a'] == 2.5


def training_state():
    return dict(
        state_dict=tensors(),
        meta=dict(epoch=3, time='now', loss=np.float32(0.25), shape=(3, 4)),
        message_hub=dict(
            log_scalars={'train/loss': HistoryBuffer([1.0, 3.0], [1, 1])},
            runtime_info=dict(iter=np.int64(7), best=np.float64(0.5), none=HistoryBuffer()),
        ),
        optimizer=dict(state={0: dict(step=torch.tensor(2.0))}, param_groups=[dict(lr=0.1)]),
        args=argparse.Namespace(lr=0.1, inner=argparse.Namespace(arch='a')),
        arrays=[np.zeros(0), np.array(['a', 'bc']), np.uint16(3)],
        config=ConfigDict(a=dict(b=1)),
    )


@pytest.mark.parametrize('load', [read_checkpoint, CheckpointLoader.load_checkpoint])
@every_torch_writer
def test_training_state(writer, load, tmp_path):
    file = tmp_path / 'x.pth'
    state = training_state()
    TORCH_WRITERS[writer](state, file)
    checkpoint = load(str(file))
    assert_same(checkpoint['state_dict'], tensors())
    assert checkpoint['meta'] == state['meta']
    hub = checkpoint['message_hub']
    assert hub['log_scalars']['train/loss'].statistics('max') == 3
    assert (hub['runtime_info']['iter'], hub['runtime_info']['best']) == (7, 0.5)
    assert checkpoint['optimizer']['param_groups'] == [dict(lr=0.1)]
    assert checkpoint['args'].inner.arch == 'a'
    assert checkpoint['config'].a.b == 1
    empty, words, number = checkpoint['arrays']
    assert (empty.size, list(words), number) == (0, ['a', 'bc'], 3)


@pytest.mark.skipif(not hasattr(torch.serialization, 'safe_globals'), reason='torch 2.4')
def test_what_torch_reads_safely_is_the_same_afterwards(tmp_path):
    file = tmp_path / 'x.pth'
    torch.save(training_state(), file)
    before = torch.serialization.get_safe_globals()
    assert argparse.Namespace not in before
    read_checkpoint(file)
    assert {*torch.serialization.get_safe_globals()} == {*before}
    with torch.serialization.safe_globals([argparse.Namespace]):  # the user allows it
        read_checkpoint(file)
        assert argparse.Namespace in torch.serialization.get_safe_globals()


DAMAGED = 'is damaged, or not a checkpoint'
PAGE = 'is not a checkpoint, but a web page: download the file itself'
NESTED = b'{"__metadata__": {"mmdense_meta": "' + b'[' * 100_000 + b'"}}'
LYING = b'{"x": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}'


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'is empty (0 bytes): download it again'),
        (b'<!DOCTYPE html>\n<html>Not found</html>\n', PAGE),
        (b'\n\n  <html>\n</html>\n', PAGE),
        (
            b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n',
            'is not a checkpoint, but a Git LFS pointer: run git lfs pull',
        ),
        (bytes(range(7, 250)), DAMAGED),
        (b'\x80\x02 not a pickle', DAMAGED),
        (b'PK\x03\x04 not a zip', DAMAGED),
        (b'\x10' + bytes(7) + b'{not json at all', DAMAGED),
        (b'{"error":\n"no such model"}\n', DAMAGED),
        (struct.pack('<Q', 2**62) + b'{"x": 1}', DAMAGED),
        (struct.pack('<Q', len(LYING)) + LYING + bytes(4), DAMAGED),
        (struct.pack('<Q', len(NESTED)) + NESTED, DAMAGED),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else '',
)
def test_files_that_are_not_checkpoints(content, message, tmp_path):
    for suffix in SUFFIXES:
        file = tmp_path / f'x{suffix}'
        file.write_bytes(content)
        text = error_of(read_checkpoint, file)
        assert text.startswith(f'{file} {message}')
        assert TRUST not in text


def test_folders_and_missing_files(tmp_path, monkeypatch):
    assert error_of(read_checkpoint, tmp_path) == f'no file {tmp_path}: it is a folder'
    missing = tmp_path / 'missing.pth'
    assert error_of(read_checkpoint, missing) == f'no file {missing}'
    monkeypatch.setenv('HOME', str(tmp_path))
    assert error_of(read_checkpoint, '~/missing.pth') == f'no file {missing}'


@pytest.mark.parametrize('writer', WRITERS)
def test_truncated_files(writer, tmp_path):
    WRITERS[writer](tensors(), tmp_path / 'complete')
    content = (tmp_path / 'complete').read_bytes()
    size = len(content)
    for length in (1, 7, 8, 9, 64, size // 4, size // 2, size - 100, size - 1):
        file = tmp_path / f'{length}.pth'
        file.write_bytes(content[:length])
        assert error_of(read_checkpoint, file).startswith(f'{file} {DAMAGED}')


@pytest.mark.parametrize('content', [[torch.zeros(2)], torch.zeros(2), 'weights', None])
def test_other_content(content, tmp_path):
    file = tmp_path / 'x.pth'
    for write in TORCH_WRITERS.values():
        write(content, file)
        kind = type(content).__name__
        assert error_of(read_checkpoint, file) == f'{file} holds a {kind}, not a checkpoint'


def test_a_program_of_torchscript(tmp_path):
    file = tmp_path / 'x.pt'
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(file)
    text = error_of(read_checkpoint, file)
    assert 'is a TorchScript program' in text or 'not a checkpoint' in text  # torch before 2.6


# Files that would run something


PLACES = {
    'top': lambda x: x,
    'state_dict': lambda x: dict(state_dict=x),
    'tensor': lambda x: dict(state_dict={**tensors(), 'c': x}),
    'meta': lambda x: dict(state_dict=tensors(), meta=dict(deep=[dict(x=x)])),
    'arguments': lambda x: dict(state_dict=tensors(), args=argparse.Namespace(x=x)),
    'OrderedDict': lambda x: dict(state_dict=OrderedDict(a=x)),
    'key': lambda x: {x: tensors()},
}


def initialise(path):
    init = dict(type='Pretrained', checkpoint=path)
    MODELS.build(dict(type='mmdet.ResNet', depth=18, init_cfg=init)).init_weights()


LOADERS = {
    'CheckpointLoader': CheckpointLoader.load_checkpoint,
    'load_checkpoint': lambda path: mmengine.runner.load_checkpoint(nn.Linear(2, 2), path),
    'init_cfg': initialise,
    'condensenetv2': lambda path: CheckpointLoader.load_checkpoint(f'condensenetv2://{path}'),
}


def check_nothing_runs(write, place, load, folder):
    file, made = folder / 'x.pth', folder / 'made'
    write(PLACES[place](Call(os.mkdir, str(made))), file)
    text = error_of(load, str(file))
    assert not made.exists()
    assert text.startswith(f'{file} holds more than weights ({os.mkdir.__module__}.mkdir), ')
    assert f'{TRUST}=1' in text
    torch.load(file, weights_only=False)
    assert made.is_dir()  # without the check it would have run


@pytest.mark.parametrize('place', PLACES)
@every_torch_writer
def test_nothing_in_a_file_is_run(writer, place, tmp_path):
    check_nothing_runs(TORCH_WRITERS[writer], place, read_checkpoint, tmp_path)


@pytest.mark.parametrize('loader', LOADERS)
def test_no_loader_runs_anything(loader, tmp_path):
    check_nothing_runs(torch.save, 'state_dict', LOADERS[loader], tmp_path)


def array_of(value):
    array = np.empty(1, dtype=object)
    array[0] = value
    return array


@pytest.mark.parametrize(
    ('content', 'name'),
    [
        pytest.param(Call(eval, '1 + 1'), 'eval', id='eval'),
        pytest.param(Call(getattr, int, 'from_bytes'), 'int', id='getattr of int'),
        (Call(getattr, OrderedDict, 'fromkeys'), 'builtins.getattr'),
        (Call(getattr, Call(getattr, HistoryBuffer, 'mean'), '__globals__'), 'builtins.getattr'),
        (Fraction(1, 2), 'fractions.Fraction'),
    ],
)
@every_torch_writer
def test_a_refusal_names_the_object(writer, content, name, tmp_path):
    file = tmp_path / 'x.pth'
    TORCH_WRITERS[writer](dict(state_dict=tensors(), meta=content), file)
    text = error_of(read_checkpoint, file)
    assert f'{name})' in text.partition(', and reading')[0]
    assert f'{TRUST}=1' in text


def test_other_hostile_content(tmp_path):
    file, made = tmp_path / 'x.pth', tmp_path / 'made'
    make = Call(os.mkdir, str(made))
    for content, options in (
        (array_of(make), {}),
        (make, dict(pickle_protocol=3)),
        (make, dict(pickle_protocol=4)),
        (make, dict(pickle_protocol=5)),
        (Call(Call(getattr, HistoryBuffer, '__subclasses__')), {}),
    ):
        torch.save(dict(state_dict=tensors(), meta=content), file, **options)
        error_of(read_checkpoint, file)
        assert not made.exists()
    torch.save(dict(state_dict=tensors(), meta=array_of('a class name')), file)
    assert TRUST in error_of(read_checkpoint, file)


def test_trusted_files(tmp_path, monkeypatch):
    file = tmp_path / 'x.pth'
    torch.save(dict(state_dict=tensors(), meta=Fraction(1, 2)), file)
    monkeypatch.setenv(TRUST, '0')
    error_of(read_checkpoint, file)
    monkeypatch.setenv(TRUST, '1')
    checkpoint = read_checkpoint(file)
    assert checkpoint['meta'] == Fraction(1, 2)
    assert_same(checkpoint['state_dict'], tensors())


# Writing


@every_suffix
def test_round_trip(suffix, tmp_path):
    file = tmp_path / f'x{suffix}'
    meta = dict(
        name='x', size=(32, 48), best=dict(mAP=np.float64(0.5), epoch=3), classes=['a', 'b']
    )
    weights = tensors()
    weights['a.weight'].requires_grad_()
    write_checkpoint(file, weights, meta)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    checkpoint = read_checkpoint(file)
    assert checkpoint.keys() == {'state_dict', 'meta'}
    assert_same(checkpoint['state_dict'], tensors())
    assert not any(value.requires_grad for value in checkpoint['state_dict'].values())
    sequence = list if suffix == '.safetensors' else tuple
    assert checkpoint['meta'] == {**meta, 'size': sequence((32, 48))}
    assert weights['a.weight'].requires_grad  # the given tensors stay as they are
    # The same weights give the same file.
    write_checkpoint(tmp_path / f'y{suffix}', tensors(), meta)
    assert (tmp_path / f'y{suffix}').read_bytes() == file.read_bytes()


@every_suffix
def test_views_are_written_alone(suffix, tmp_path):
    base = torch.arange(1e6).reshape(1000, 1000)
    views = dict(row=base[3], again=base[3], column=base[:, 2], transposed=base[:2, :3].T)
    file = tmp_path / f'x{suffix}'
    write_checkpoint(file, views, {})
    assert file.stat().st_size < 20_000
    assert_same(read_checkpoint(file)['state_dict'], views)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('x.bin', '{file} must end in .pth or .safetensors'),
        ('x', '{file} must end in .pth or .safetensors'),
        ('mine.pth', '{file} exists already: choose another name'),
        ('none/x.pth', 'no folder {file.parent} to write x.pth to'),
    ],
)
def test_impossible_targets(name, message, tmp_path):
    (tmp_path / 'mine.pth').write_bytes(b'mine')
    file = tmp_path / name
    assert error_of(write_checkpoint, file, tensors(), {}) == message.format(file=file)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b'mine']


def test_meta_that_json_cannot_hold(tmp_path):
    text = error_of(write_checkpoint, tmp_path / 'x.safetensors', tensors(), {(1, 2): 3})
    assert text.endswith('write it as .pth')
