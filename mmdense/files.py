"""Writing files atomically, and one-line errors when the disk refuses."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmdense.errors import UserError

__all__ = ['PART', 'WriteError', 'check_writable', 'refused_writing', 'sha256_of', 'write_whole']

PART = '.part'  # ends the name of a file that is being written
# What a disk that takes no more says: full, quota, read-only, a limit of the process.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def check_writable(file: Path) -> None:
    """Find out before the work whether its result can be written; make the folder.

    Raises:
        UserError: It cannot.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot write {file}: {error.strerror}') from error
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f'cannot write {file}')


class WriteError(UserError):
    """A file that could not be written."""


def write_whole(file: Path, content: bytes | memoryview) -> None:
    """Write a file that is there whole or not at all, whenever the process or the machine ends.

    It is written beside, under a hidden name that ends in ``.part``, brought to the disk and
    renamed: until then the file that was there before stays.

    Raises:
        WriteError: It can't be, with the reason, and the space that is needed and free.
    """
    part = file.with_name(f'.{file.name}{PART}')
    try:
        try:
            with part.open('wb') as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            part.replace(file)
            _flush_folder(file.parent)
        finally:
            if part.exists():  # a read-only system would refuse to remove even what isn't there
                part.unlink()
    except OSError as error:
        raise WriteError(
            f'cannot write {file}: {error.strerror} ({len(content) / 1e6:.1f} MB needed, '
            f'{_free(file.parent)})'
        ) from error


def _flush_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that can't flush folders
            raise
    finally:
        os.close(opened)


def _free(folder: Path) -> str:
    if not folder.is_dir():
        return 'no such folder'
    return f'{shutil.disk_usage(folder).free / 1e6:.1f} MB free'


@contextmanager
def refused_writing(folder: str | Path) -> Iterator[None]:
    """Make one line of it when the disk of a folder takes no more, whoever writes.

    Raises:
        WriteError: With the reason, and the space that is free.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = error.filename or folder
        raise WriteError(
            f'cannot write {where}: {error.strerror} ({_free(Path(folder))})'
        ) from error


def sha256_of(file: str | Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with Path(file).expanduser().open('rb') as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
