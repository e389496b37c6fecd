"""Training loops that go on from a checkpoint as if they had never stopped.

On a CPU a run that was killed and resumed ends bit for bit as one that was not. mmengine's loops
leave that open in four ways, which are mended here: random numbers (:mod:`.seeding`), an epoch
that was left in the middle, the validation that was due when the run ended, and SIGTERM.

The tools put them in place of mmengine's; the arguments are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import barrier, get_rank, is_main_process
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterBasedTrainLoop
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmdense.engine.checkpoint_hook import CheckpointHook
from mmdense.engine.seeding import NumberedBatches, seed_all
from mmdense.engine.stopping import STATUS, Stopped, StopSignal
from mmdense.files import WriteError, wrap_disk_errors
from mmdense.registry import LOOPS

__all__ = ['EpochBasedTrainLoop', 'IterBasedTrainLoop']

MODEL, BATCH, VALIDATION = range(3)  # what is seeded: none may draw the numbers of another
# Entries of the message hub, which is part of each checkpoint.
EPOCH, VALIDATED = 'epoch_begun', 'validated_at'


class _Resumable:
    """What both loops share.

    After each iteration, a SIGTERM ends the run: with a checkpoint that it goes on from exactly,
    one line in the log and status 143. While gradients are accumulated, which no checkpoint holds,
    it waits for the step. A SIGTERM during a validation ends that, and it begins again on resuming;
    several processes write the checkpoint at once, and finish the validation if nobody kills them.

    A validation that was due at the iteration of the checkpoint, and isn't in it, comes first:
    checkpoints are written before it.

    Raises:
        WriteError: The disk takes no more.
    """

    endless: bool

    @property
    def dataloader(self) -> DataLoader:
        """The loader; its batch sampler is :class:`.NumberedBatches` as soon as it is set."""
        return self._dataloader

    @dataloader.setter
    def dataloader(self, loader: DataLoader) -> None:
        self._dataloader = loader
        self._batches = NumberedBatches(loader, endless=self.endless)

    @contextmanager
    def _running(self) -> Iterator[None]:
        runner = self.runner
        self._signal = StopSignal(self._keep)
        runner.register_hook(self._signal)
        try:
            with self._signal, wrap_disk_errors(runner.work_dir):
                yield
        except WriteError as error:
            last = Path(runner.work_dir, 'last_checkpoint')
            held = last.read_text().strip() if last.is_file() else ''
            whole = f'the last whole checkpoint is {held}' if held else 'there is no checkpoint yet'
            raise WriteError(
                f'{error}: stopped at iteration {self._iter}; {whole}. Make room, and go on '
                'with --resume'
            ) from error

    def _start_batches(self, skip: int) -> None:
        self._batches.start(self._key(BATCH), first=self._iter, skip=skip)

    def _key(self, kind: int) -> tuple[int, ...]:
        return self.runner.seed, kind, get_rank()

    def _train(self, *batch: Any) -> None:
        """Run an iteration: ``batch`` is what mmengine's ``run_iter`` takes."""
        seed_all(*self._key(MODEL), self._iter)
        self.run_iter(*batch)
        wrapper = self.runner.optim_wrapper
        stepped = not isinstance(wrapper, OptimWrapper) or wrapper.should_update()
        if self._signal.wanted() and stepped:
            self._stop()

    def _stop(self) -> None:
        kept = self._save()
        barrier()  # the launcher kills who is late
        self._say('stopped', kept)
        sys.exit(STATUS)

    def _save(self) -> str:
        hook = next((h for h in self.runner.hooks if isinstance(h, CheckpointHook)), None)
        if hook is None:
            return 'nothing is kept, as the config saves no checkpoints'
        return f'--resume goes on from {hook.save_now(self.runner)}'

    def _say(self, what: str, kept: str) -> None:
        done = f'after {self._iter} of {self.max_iters}'
        self.runner.logger.warning(f'SIGTERM: {what} {done}; {kept}')

    def _keep(self) -> None:
        """Write a checkpoint in a validation that goes on, on the main process."""
        runner = self.runner
        # Processes of a strategy would have to write together.
        if not (is_main_process() and isinstance(runner, Runner)):
            return
        averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        self._set_validated(None)
        for hook in averages:
            hook.after_val_epoch(runner)  # gives the weights back
        kept = self._save()
        for hook in averages:
            hook.before_val_epoch(runner)
        self._set_validated(self._iter)
        self._say('finishing the validation', kept)

    def _set_validated(self, iteration: int | None) -> None:
        self.runner.message_hub.update_info(VALIDATED, iteration)

    def _validate(self, done: int, last: int) -> None:
        """Validate if it is due after ``done`` of ``last`` epochs or iterations."""
        self._decide_current_val_interval()
        runner = self.runner
        due = done >= self.val_begin and (done % self.val_interval == 0 or done == last)
        known = runner.message_hub.runtime_info.get(VALIDATED)
        if runner.val_loop is None or not due or known == self._iter:
            return
        seed_all(*self._key(VALIDATION), self._iter)
        # Before it: a checkpoint that turns out to be the best is written again in its end.
        self._set_validated(self._iter)
        try:
            runner.val_loop.run()
        except Stopped:
            self._set_validated(None)
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)  # gives the weights back
            self._stop()


@LOOPS.register_module()
class EpochBasedTrainLoop(_Resumable, MMEngineEpochBasedTrainLoop):
    """mmengine's loop by epochs, resumable.

    An epoch that was left in the middle goes on with its next batch: with another number of
    processes or batch size, after the same share of it.
    """

    endless = False

    def run(self) -> nn.Module:
        """Train, and return the model."""
        self.runner.call_hook('before_train')
        with self._running():
            if self._iter and not self._done():
                self._validate(self._epoch, self._max_epochs)
            while self._epoch < self._max_epochs and not self.stop_training:
                self.run_epoch()
                self._validate(self._epoch, self._max_epochs)
            self.runner.call_hook('after_train')
        return self.runner.model

    def run_epoch(self) -> None:
        """Train for an epoch, or for what is left of it."""
        runner = self.runner
        done = self._done()
        if not done:
            begun = self._epoch, self._iter, len(self.dataloader)
            runner.message_hub.update_info(EPOCH, begun)
        runner.call_hook('before_train_epoch')
        runner.model.train()
        self._start_batches(skip=done)
        for i, batch in enumerate(self.dataloader, done):
            self._train(i, batch)
        runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _done(self) -> int:
        """Return how many batches of the epoch have been trained on."""
        epoch, begin, length = self.runner.message_hub.runtime_info.get(EPOCH, (-1, 0, 0))
        if epoch != self._epoch:
            return 0
        # Another number of processes, or batch size: the same share.
        return (self._iter - begin) * len(self.dataloader) // length


@LOOPS.register_module()
class IterBasedTrainLoop(_Resumable, MMEngineIterBasedTrainLoop):
    """mmengine's loop by iterations, resumable.

    No batch is loaded to find the place in the data.
    """

    endless = True

    def run(self) -> nn.Module:
        """Train, and return the model."""
        runner = self.runner
        runner.call_hook('before_train')
        with self._running():
            # One long epoch, for the hooks.
            runner.call_hook('before_train_epoch')
            self._start_batches(skip=self._iter)
            self.dataloader_iterator = type(self.dataloader_iterator)(self.dataloader)
            if self._iter:
                self._validate(self._iter, self._max_iters)
            while self._iter < self._max_iters and not self.stop_training:
                runner.model.train()
                self._train(next(self.dataloader_iterator))
                self._validate(self._iter, self._max_iters)
            runner.call_hook('after_train_epoch')
            runner.call_hook('after_train')
        return runner.model
