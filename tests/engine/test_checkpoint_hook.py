"""Find the last complete checkpoint; atomic writes."""

import os
import re
import subprocess

import pytest
import torch

from mmdense import files
from mmdense.engine import checkpoint_hook
from mmdense.engine.checkpoint_hook import WholeFileBackend
from mmdense.engine.resume import find_training, read_training
from mmdense.errors import UserError
from mmdense.files import WriteError, atomic_write, wrap_disk_errors


def training(file, iteration=1, **more):
    """Write what a training writes, newer than all before it."""
    weights = dict(w=torch.arange(5000.0))
    held = dict(meta=dict(epoch=1, iter=iteration), message_hub={}, state_dict=weights)
    torch.save(dict(held, optimizer={}, **more), file)
    os.utime(file, ns=(iteration * 10**9,) * 2)
    return file


def damage(file):
    """Change one byte among the weights: the file's structure stays as it is."""
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
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(checkpoint_hook, 'print_log', lambda line, *_: lines.append(line))
    return lines


def point(folder, name):
    (folder / 'last_checkpoint').write_text(str(folder / name) if name else '')


def test_the_named_checkpoint_is_taken(tmp_path):
    assert find_training(tmp_path) is None
    one, _ = training(tmp_path / 'a.pth', 1), training(tmp_path / 'b.pth', 2)
    point(tmp_path, 'a.pth')
    file, held = find_training(tmp_path)
    assert file == str(one)
    assert held['meta']['iter'] == 1


@pytest.mark.parametrize('harm', [damage, cut, lambda f: f.unlink(), lambda f: f.write_bytes(b'')])
def test_a_damaged_one_is_left_for_the_newest_whole_one(harm, said, tmp_path):
    for i, name in enumerate(['old.pth', 'newer.pth', 'last.pth'], 1):
        training(tmp_path / name, i)
    weights = dict(state_dict={}, meta=dict(epoch=1, iter=9))
    torch.save(weights, tmp_path / 'published.pth')  # the newest
    torch.save(dict(weights, message_hub={}), tmp_path / 'best.pth')
    point(tmp_path, 'last.pth')
    harm(tmp_path / 'last.pth')
    assert find_training(tmp_path)[0] == str(tmp_path / 'newer.pth')
    assert len(said) == 1
    assert re.search(r'last\.pth.*: going on from \S+newer\.pth', said[0]), said
    damage(tmp_path / 'newer.pth')
    assert find_training(tmp_path)[0] == str(tmp_path / 'old.pth')
    damage(tmp_path / 'old.pth')
    with pytest.raises(UserError, match='is whole: .*last.pth.*; .*newer.pth is damaged'):
        find_training(tmp_path)


@pytest.mark.parametrize('name', ['', None])
def test_without_a_name_the_newest_is_taken(name, said, tmp_path):
    """A process that is killed as it writes the name leaves an empty file."""
    if name is not None:
        point(tmp_path, name)
    training(tmp_path / 'a.pth', 1)
    newest = training(tmp_path / 'b.pth', 2)
    assert find_training(tmp_path)[0] == str(newest)
    assert ['last_checkpoint is empty: going on' in line for line in said] == [True] * (name == '')


def test_a_moved_folder_is_looked_through(tmp_path):
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


def test_weights_are_no_training(tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'a.pth')
    with pytest.raises(UserError, match='no training to go on with: give it to --load-from'):
        read_training(tmp_path / 'a.pth')
    assert find_training(tmp_path) is None


def test_one_changed_byte_is_noticed(tmp_path):
    file = training(tmp_path / 'a.pth')
    damage(file)
    with pytest.raises(UserError, match='a.pth is damaged'):
        read_training(file)


def test_what_was_there_stays_until_the_new_file_is_on_the_disk(tmp_path, monkeypatch):
    file = tmp_path / 'a.pth'
    atomic_write(file, b'old')
    flush, seen = os.fsync, []

    def fsync(opened):
        seen.append((file.read_bytes(), sorted(f.name for f in tmp_path.iterdir())))
        flush(opened)

    monkeypatch.setattr(files.os, 'fsync', fsync)
    atomic_write(file, b'new')
    # First the file is flushed, under its hidden name, then the folder, after the renaming.
    assert seen == [(b'old', ['.a.pth.part', 'a.pth']), (b'new', ['a.pth'])]


def test_a_full_disk(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'none', str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('may not mount')
    try:
        atomic_write(disk / 'a', b'old')
        with pytest.raises(WriteError, match=r'a: No space left on device \(0\.1 MB needed, 0\.1 '):
            atomic_write(disk / 'a', bytes(100_000))
        assert [(f.name, f.read_bytes()) for f in disk.iterdir()] == [('a', b'old')]
        subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
        with pytest.raises(WriteError, match='a: Read-only file system'):
            atomic_write(disk / 'a', b'new')
        with pytest.raises(UserError, match='cannot write'):
            files.check_writable(disk / 'a')
    finally:
        subprocess.run(['umount', str(disk)], check=True)


def test_others_that_write_are_refused_in_one_line(tmp_path):
    with (
        pytest.raises(WriteError, match=rf'cannot write {tmp_path}: No space left on device \('),
        wrap_disk_errors(tmp_path),
        open('/dev/full', 'w') as opened,
    ):
        opened.write('x')
    with pytest.raises(FileNotFoundError), wrap_disk_errors(tmp_path):
        (tmp_path / 'none').read_text()


def test_outdated_files_go_when_told(tmp_path):
    backend = WholeFileBackend()
    backend.put(b'1', tmp_path / 'folder/a')
    backend.remove(tmp_path / 'folder/a')
    assert (tmp_path / 'folder/a').read_bytes() == b'1'
    backend.remove_outdated()
    assert not (tmp_path / 'folder/a').exists()
