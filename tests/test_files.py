"""Atomic writes and one-line errors of the disk."""

import os
import subprocess

import pytest

from mmdense import files
from mmdense.errors import UserError
from mmdense.files import WriteError, atomic_write, wrap_disk_errors


def test_the_old_file_stays_until_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    file = tmp_path / 'a.pth'
    atomic_write(file, b'old')
    flush, seen = os.fsync, []

    def fsync(opened):
        seen.append((file.read_bytes(), sorted(f.name for f in tmp_path.iterdir())))
        flush(opened)

    monkeypatch.setattr(files.os, 'fsync', fsync)
    atomic_write(file, b'new')
    # The file is flushed under its hidden name, then the folder after the renaming.
    assert seen == [(b'old', ['.a.pth.part', 'a.pth']), (b'new', ['a.pth'])]


def test_a_full_disk(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'none', str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting needs root')
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


def test_errors_of_other_writers_become_one_line(tmp_path):
    with (
        pytest.raises(WriteError, match=rf'cannot write {tmp_path}: No space left on device \('),
        wrap_disk_errors(tmp_path),
        open('/dev/full', 'w') as opened,
    ):
        opened.write('x')
    with pytest.raises(FileNotFoundError), wrap_disk_errors(tmp_path):
        (tmp_path / 'none').read_text()
