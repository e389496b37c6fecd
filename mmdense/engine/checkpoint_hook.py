"""Checkpoints that are whole, whatever ends the run, and finding the last of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.runner import Runner

from mmdense.files import PART_SUFFIX, atomic_write
from mmdense.registry import HOOKS

__all__ = ['CheckpointHook', 'WholeFileBackend']

BACKEND = 'mmdense'
INTERRUPTED = 'interrupted.pth'


class WholeFileBackend(LocalBackend):
    """The local disk, where a file is there whole or not at all, and outdated ones stay a while.

    mmengine's hook deletes a checkpoint before it writes the one that takes its place.
    """

    def __init__(self) -> None:
        self._outdated: list[Path] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file, and its folder if there is none.

        Raises:
            WriteError: It can't be written: what was there before stays.
        """
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(filepath), obj)

    def remove(self, filepath: str | Path) -> None:
        """Remember to remove a file."""
        self._outdated.append(Path(filepath))

    def remove_outdated(self) -> None:
        """Remove what was to be removed."""
        while self._outdated:
            self._outdated.pop().unlink(missing_ok=True)


register_backend(BACKEND, WholeFileBackend, force=True)


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """mmengine's hook, with files that are written whole, before those that they replace go.

    The tools put it in place of mmengine's; the arguments are the same. Files of a ``Runner`` on
    the local disk are meant: those on other storage, and of strategies (``FlexibleRunner``), are
    written as by mmengine.

    Raises:
        WriteError: In training, if a file can't be written.
    """

    def before_train(self, runner: Runner) -> None:
        """Remove what a run that was killed has left half-written."""
        local = '://' not in str(self.out_dir or runner.work_dir)
        if local and self.backend_args is None and self.file_client_args is None:
            self.backend_args = dict(backend=BACKEND)
        super().before_train(runner)
        if local and is_main_process():
            for part in Path(self.out_dir).glob(f'.*.pth{PART_SUFFIX}'):
                part.unlink(missing_ok=True)

    def save_now(self, runner: Runner) -> str:
        """Write ``interrupted.pth``, from which ``--resume`` goes on; return its name.

        For between two iterations; other processes don't wait for the main one. It goes with the
        next checkpoint that is written.
        """
        with self._replacing():
            runner.save_checkpoint(
                self.out_dir,
                INTERRUPTED,
                self.file_client_args,
                meta=dict(epoch=runner.epoch, iter=runner.iter),
                backend_args=self.backend_args,
            )
        file = self.file_backend.join_path(self.out_dir, INTERRUPTED)
        if is_main_process():
            atomic_write(Path(runner.work_dir, 'last_checkpoint'), file.encode())
        return file

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        with self._replacing(INTERRUPTED):
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: Mapping[str, Any]) -> None:
        with self._replacing():
            super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _replacing(self, *outdated: str) -> Iterator[None]:
        """Remove what is outdated after the rest, on the main process."""
        yield
        if isinstance(self.file_backend, WholeFileBackend) and is_main_process():
            for name in outdated:
                self.file_backend.remove(Path(self.out_dir, name))
            self.file_backend.remove_outdated()
