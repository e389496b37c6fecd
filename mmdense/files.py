"""Atomic writes, checksums, and one-line errors for a disk that cannot be written."""

import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmdense.errors import UserError

IMAGE_FORMATS = ('BMP', 'DIB', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP')  # never EPS
PART_SUFFIX = '.part'  # of a file that is being written
# The disk is full, over quota or read-only, or the process has reached its limit of file size.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class WriteError(UserError):
    """A file could not be written."""


def check_writable(file: Path) -> None:
    """Make a file's folder; raise UserError, before any work, if the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot write {file}: {error.strerror}') from error
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f'cannot write {file}')


def atomic_write(file: Path, content: bytes | memoryview) -> None:
    """Write a file completely or not at all, even if the process or the machine stops.

    The content goes to a hidden ``.part`` file in the same folder, is flushed and renamed.
    WriteError has the reason and the space needed and free.
    """
    part = file.with_name(f'.{file.name}{PART_SUFFIX}')
    try:
        try:
            with part.open('wb') as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(file)
            _flush_folder(file.parent)
        finally:
            if part.exists():  # unlink fails on a read-only disk even if there is no such file
                part.unlink()
    except OSError as error:
        raise WriteError(
            f'cannot write {file}: {error.strerror} ({len(content) / 1e6:.1f} MB needed, '
            f'{_free_space(file.parent)})'
        ) from error


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # this file system cannot flush folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def wrap_disk_errors(folder: str | Path) -> Iterator[None]:
    """Turn any library's error from a full or read-only disk into a WriteError.

    It has the reason and the free space of ``folder``, into which the files are written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        path = error.filename or folder
        raise WriteError(
            f'cannot write {path}: {error.strerror} ({_free_space(Path(folder))})'
        ) from error


def _free_space(folder: Path) -> str:
    if not folder.is_dir():
        return 'no such folder'
    return f'{shutil.disk_usage(folder).free / 1e6:.1f} MB free'


def relative_paths(files: Iterable[str | Path]) -> dict[str, Path]:
    """Return each file's path below the deepest folder that contains all of them."""
    paths = {str(file): os.path.abspath(file) for file in files}
    root = os.path.commonpath([os.path.dirname(path) for path in paths.values()] or ['/'])
    return {file: Path(os.path.relpath(path, root)) for file, path in paths.items()}


def change_suffix(names: Mapping[Any, Path], suffix: str) -> dict[Any, Path]:
    """Return names with another suffix, which is appended to names that differ only in theirs."""
    count = Counter(name.with_suffix(suffix) for name in names.values())
    return {
        key: short if count[short := name.with_suffix(suffix)] == 1 else Path(f'{name}{suffix}')
        for key, name in names.items()
    }


def sha256_of(file: str | Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with Path(file).expanduser().open('rb') as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def ends_in_zeros(file: str | Path) -> bool:
    """Whether a JPEG ends in zeros, as after a crash or an aborted download."""
    content = Path(file).read_bytes()
    end_of_image, start_of_scan = content.rfind(b'\xff\xd9'), content.rfind(b'\xff\xda')
    return content.endswith(b'\0') and end_of_image < start_of_scan
