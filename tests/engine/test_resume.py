"""Finding and reading the checkpoint to resume from."""

import os
import re

import pytest
import torch

from mmdense.engine import resume
from mmdense.engine.resume import find_training, read_training
from mmdense.errors import UserError


def training(file, iteration=1, **more):
    """Write a checkpoint of a training, dated by its iteration."""
    weights = dict(w=torch.arange(5000.0))
    checkpoint = dict(meta=dict(epoch=1, iter=iteration), message_hub={}, state_dict=weights)
    torch.save(dict(checkpoint, optimizer={}, **more), file)
    os.utime(file, ns=(iteration * 10**9,) * 2)
    return file


def damage(file):
    """Change one byte of the weights, which leaves the file's structure intact."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    time = file.stat().st_mtime_ns
    file.write_bytes(content)
    os.utime(file, ns=(time, time))


def cut(file):
    time = file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes()[:-2000])
    os.utime(file, ns=(time, time))


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(resume, 'print_log', lambda line, *_: lines.append(line))
    return lines


def point(folder, name):
    (folder / 'last_checkpoint').write_text(str(folder / name) if name else '')


def test_last_checkpoint_names_the_file(tmp_path):
    assert find_training(tmp_path) is None
    one, _ = training(tmp_path / 'a.pth', 1), training(tmp_path / 'b.pth', 2)
    point(tmp_path, 'a.pth')
    file, checkpoint = find_training(tmp_path)
    assert file == str(one)
    assert checkpoint['meta']['iter'] == 1


@pytest.mark.parametrize('harm', [damage, cut, lambda f: f.unlink(), lambda f: f.write_bytes(b'')])
def test_a_damaged_checkpoint_is_skipped_for_the_newest_intact_one(harm, log, tmp_path):
    for i, name in enumerate(['old.pth', 'newer.pth', 'last.pth'], 1):
        training(tmp_path / name, i)
    weights = dict(state_dict={}, meta=dict(epoch=1, iter=9))
    torch.save(weights, tmp_path / 'published.pth')  # the newest
    torch.save(dict(weights, message_hub={}), tmp_path / 'best.pth')
    point(tmp_path, 'last.pth')
    harm(tmp_path / 'last.pth')
    assert find_training(tmp_path)[0] == str(tmp_path / 'newer.pth')
    assert len(log) == 1
    assert re.search(r'last\.pth.*: going on from \S+newer\.pth', log[0]), log
    damage(tmp_path / 'newer.pth')
    assert find_training(tmp_path)[0] == str(tmp_path / 'old.pth')
    damage(tmp_path / 'old.pth')
    with pytest.raises(UserError, match='is whole: .*last.pth.*; .*newer.pth is damaged'):
        find_training(tmp_path)


@pytest.mark.parametrize('name', ['', None])
def test_without_a_name_the_newest_is_used(name, log, tmp_path):
    """A process killed while writing the name leaves an empty file."""
    if name is not None:
        point(tmp_path, name)
    training(tmp_path / 'a.pth', 1)
    newest = training(tmp_path / 'b.pth', 2)
    assert find_training(tmp_path)[0] == str(newest)
    assert ['last_checkpoint is empty: going on' in line for line in log] == [True] * (name == '')


def test_a_moved_folder_is_searched(tmp_path):
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new/last_checkpoint').write_text(str(tmp_path / 'old/a.pth'))
    moved = training(tmp_path / 'new/a.pth')
    assert find_training(tmp_path / 'new')[0] == str(moved)


def test_other_storage_and_folders_are_not_read(tmp_path):
    (tmp_path / 'last_checkpoint').write_text('s3://bucket/a.pth')
    assert find_training(tmp_path) == ('s3://bucket/a.pth', {})
    (tmp_path / 'epoch_1.pth').mkdir()
    point(tmp_path, 'epoch_1.pth')
    assert find_training(tmp_path) == (str(tmp_path / 'epoch_1.pth'), {})


def test_weights_cannot_be_resumed(tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'a.pth')
    with pytest.raises(UserError, match='no training to go on with: give it to --load-from'):
        read_training(tmp_path / 'a.pth')
    assert find_training(tmp_path) is None


def test_one_changed_byte_is_noticed(tmp_path):
    file = training(tmp_path / 'a.pth')
    damage(file)
    with pytest.raises(UserError, match='a.pth is damaged'):
        read_training(file)
