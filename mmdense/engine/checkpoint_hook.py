"""Checkpoints that stay intact however the run ends."""

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

BACKEND = 'mmdense'
INTERRUPTED = 'interrupted.pth'
POINTER = 'last_checkpoint'  # mmengine's file


class AtomicFileBackend(LocalBackend):
    """The local disk with atomic writes and deferred removal.

    Removal is deferred because mmengine's hook deletes the old checkpoint before it writes the
    new one.
    """

    def __init__(self) -> None:
        self._outdated: list[Path] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file and make its folder; an existing file stays if there is a WriteError."""
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(filepath), obj)

    def remove(self, filepath: str | Path) -> None:
        self._outdated.append(Path(filepath))

    def remove_outdated(self) -> None:
        while self._outdated:
            self._outdated.pop().unlink(missing_ok=True)


register_backend(BACKEND, AtomicFileBackend, force=True)


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """mmengine's hook with atomic writes; an old checkpoint is removed after its successor exists.

    The tools use it in place of mmengine's, with the same arguments. Other storage than the local
    disk, and strategies (``FlexibleRunner``), work as in mmengine. A file that can't be written
    raises WriteError.
    """

    def before_train(self, runner: Runner) -> None:
        """Remove partly written files of a killed run."""
        local = '://' not in str(self.out_dir or runner.work_dir)
        if local and self.backend_args is None and self.file_client_args is None:
            self.backend_args = dict(backend=BACKEND)
        super().before_train(runner)
        if local and is_main_process():
            for part in Path(self.out_dir).glob(f'.*.pth{PART_SUFFIX}'):
                part.unlink(missing_ok=True)

    def save_now(self, runner: Runner) -> str:
        """Write ``interrupted.pth``, which the next checkpoint replaces, and return its path.

        Call it between two iterations. Other processes don't wait for the main one.
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
            atomic_write(Path(runner.work_dir, POINTER), file.encode())
        return file

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        with self._replacing(INTERRUPTED):
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: Mapping[str, Any]) -> None:
        with self._replacing():
            super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _replacing(self, *outdated: str) -> Iterator[None]:
        """Remove outdated files after the new ones are written, on the main process."""
        yield
        if isinstance(self.file_backend, AtomicFileBackend) and is_main_process():
            for name in outdated:
                self.file_backend.remove(Path(self.out_dir, name))
            self.file_backend.remove_outdated()


def last_checkpoint(work_dir: str | Path) -> str:
    """Return the checkpoint that a run has written last, or ''."""
    pointer = Path(work_dir, POINTER)
    return pointer.read_text().strip() if pointer.is_file() else ''
