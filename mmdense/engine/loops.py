"""Training loops that resume as if the run had never stopped.

On a CPU a killed and resumed run ends bit for bit like an uninterrupted one. The tools use these
loops in place of mmengine's, with the same arguments. These differ in four points: random numbers
(:mod:`.seeding`), resuming within an epoch, a validation that was due at the end, and SIGTERM.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.dist import barrier, get_rank, is_main_process
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.param_scheduler import INF
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterBasedTrainLoop
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmdense.config.validate import is_endless
from mmdense.engine.checkpoint_hook import CheckpointHook, last_checkpoint
from mmdense.engine.seeding import NumberedBatches, seed_all
from mmdense.engine.stopping import STATUS, Stopped, StopSignal
from mmdense.errors import UserError
from mmdense.files import WriteError, wrap_disk_errors
from mmdense.registry import LOOPS

MODEL, BATCH, VALIDATION = range(3)  # independent random streams
# Entries of the message hub, which is saved with each checkpoint. Those that begin with 'val' would
# be logged as metrics.
EPOCH, VALIDATED = 'epoch_begun', 'last_validated'


class _Resumable:
    """Base of both loops.

    SIGTERM ends the run at the next optimizer step, or within ten iterations if there are several
    processes, with a checkpoint to resume from exactly and status 143. A validation ends too, and
    starts again on resuming; several processes save at once and finish it if they have the time.

    Checkpoints are written before validation. If that of the resumed checkpoint is missing, it runs
    first. A full or read-only disk raises WriteError.
    """

    endless: bool

    @property
    def dataloader(self) -> DataLoader:
        """The loader, whose batch sampler is a :class:`.NumberedBatches`."""
        return self._dataloader

    @dataloader.setter
    def dataloader(self, loader: DataLoader) -> None:
        images, batches = len(loader.dataset), loader.batch_sampler
        if not images:
            raise UserError('train_dataloader: the data set has no images')
        if not len(loader) and not (self.endless and is_endless(type(batches.sampler))):
            raise UserError(
                f'train_dataloader: {images} images are less than a batch of {batches.batch_size}: '
                'add --cfg-options train_dataloader.drop_last=False'
            )
        self._dataloader = loader
        self._batches = NumberedBatches(loader, endless=self.endless)

    @contextmanager
    def _running(self) -> Iterator[None]:
        runner = self.runner
        runner.call_hook('before_train')
        self._signal = StopSignal(self._save_in_validation)
        runner.register_hook(self._signal)
        for line in misfits(runner):
            runner.logger.warning(line)
        try:
            with self._signal, wrap_disk_errors(runner.work_dir):
                yield
                runner.call_hook('after_train')
        except WriteError as error:
            last = last_checkpoint(runner.work_dir) or 'none yet'
            raise WriteError(
                f'{error}: stopped at iteration {self._iter}; last checkpoint: {last}. Free some '
                'space and continue with --resume'
            ) from error

    def _key(self, kind: int) -> tuple[int, ...]:
        return self.runner.seed, kind, get_rank()

    def _train(self, *batch: Any) -> None:
        """Run an iteration; ``batch`` are the arguments of mmengine's ``run_iter``."""
        seed_all(*self._key(MODEL), self._iter)
        self.run_iter(*batch)
        wrapper = self.runner.optim_wrapper
        stepped = not isinstance(wrapper, OptimWrapper) or wrapper.should_update()
        if self._signal.wanted(self._iter) and stepped:
            self._stop()

    def _stop(self) -> None:
        outcome = self._save()
        barrier()  # the launcher kills the processes that are late
        self._warn('stopped', outcome)
        sys.exit(STATUS)

    def _save(self) -> str:
        hook = next((h for h in self.runner.hooks if isinstance(h, CheckpointHook)), None)
        if hook is None:
            return 'nothing was saved, since the config saves no checkpoints'
        return f'--resume continues from {hook.save_now(self.runner)}'

    def _warn(self, action: str, outcome: str) -> None:
        progress = f'after {self._iter} of {self.max_iters} iterations'
        self.runner.logger.warning(f'SIGTERM: {action} {progress}; {outcome}')

    def _save_in_validation(self) -> None:
        """Write a checkpoint from the main process while the validation continues."""
        # With a strategy, all processes would have to write together.
        if not (is_main_process() and isinstance(self.runner, Runner)):
            return
        averages = self._leave_validation()
        outcome = self._save()
        for hook in averages:
            hook.before_val_epoch(self.runner)
        self._set_validated(self._iter)
        self._warn('finishing the validation', outcome)

    def _leave_validation(self) -> list[EMAHook]:
        """Undo the start of a validation; return the hooks that swapped in averaged weights."""
        self._set_validated(None)
        averages = [hook for hook in self.runner.hooks if isinstance(hook, EMAHook)]
        for hook in averages:
            hook.after_val_epoch(self.runner)  # swaps the weights back
        return averages

    def _set_validated(self, iteration: int | None) -> None:
        self.runner.message_hub.update_info(VALIDATED, iteration)

    def _validate(self, done: int, last: int) -> None:
        """Validate if it is due after ``done`` of ``last`` epochs or iterations."""
        self._decide_current_val_interval()
        runner = self.runner
        due = done >= self.val_begin and (done % self.val_interval == 0 or done == last)
        last_validated = runner.message_hub.runtime_info.get(VALIDATED)
        if runner.val_loop is None or not due or last_validated == self._iter:
            return
        seed_all(*self._key(VALIDATION), self._iter)
        # Before the validation, which ends with saving the best checkpoint.
        self._set_validated(self._iter)
        try:
            runner.val_loop.run()
        except Stopped:
            self._leave_validation()
            self._stop()


@LOOPS.register_module()
class EpochBasedTrainLoop(_Resumable, MMEngineEpochBasedTrainLoop):
    """mmengine's loop by epochs, resumable at any iteration.

    A resumed epoch continues with its next batch, or after the same share of the epoch if the
    number of processes or the batch size has changed.
    """

    endless = False

    def run(self) -> nn.Module:
        with self._running():
            if self._iter and not self._done():
                self._validate(self._epoch, self._max_epochs)
            while self._epoch < self._max_epochs and not self.stop_training:
                self.run_epoch()
                self._validate(self._epoch, self._max_epochs)
        return self.runner.model

    def run_epoch(self) -> None:
        """Train for an epoch or for the rest of it."""
        runner = self.runner
        done = self._done()
        if not done:
            begin = self._epoch, self._iter, len(self.dataloader)
            runner.message_hub.update_info(EPOCH, begin)
        runner.call_hook('before_train_epoch')
        runner.model.train()
        self._batches.start(self._key(BATCH), first=self._iter, skip=done)
        for i, batch in enumerate(self.dataloader, done):
            self._train(i, batch)
        runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _done(self) -> int:
        """Return the number of batches of the epoch that the run has trained on."""
        epoch, begin, length = self.runner.message_hub.runtime_info.get(EPOCH, (-1, 0, 0))
        if epoch != self._epoch:
            return 0
        return (self._iter - begin) * len(self.dataloader) // length


@LOOPS.register_module()
class IterBasedTrainLoop(_Resumable, MMEngineIterBasedTrainLoop):
    """mmengine's loop by iterations, resumable without loading batches to find its position."""

    endless = True

    def run(self) -> nn.Module:
        runner = self.runner
        with self._running():
            # To the hooks, the run is one epoch.
            runner.call_hook('before_train_epoch')
            self._batches.start(self._key(BATCH), first=self._iter, skip=self._iter)
            self.dataloader_iterator = type(self.dataloader_iterator)(self.dataloader)
            if self._iter:
                self._validate(self._iter, self._max_iters)
            while self._iter < self._max_iters and not self.stop_training:
                runner.model.train()
                self._train(next(self.dataloader_iterator))
                self._validate(self._iter, self._max_iters)
            runner.call_hook('after_train_epoch')
        return runner.model


def misfits(runner: Runner) -> Iterator[str]:
    """Yield a line for each schedule, interval and hook that the training is too short for.

    The schedules are those of the checkpoint, if the training is resumed.
    """
    loop, schedules = runner.train_loop, runner.param_schedulers or []
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    limits = {True: loop.max_epochs, False: loop.max_iters}
    epoch = f' (epoch {loop.max_epochs})' if by_epoch else ''
    length = f'since training ends at iteration {loop.max_iters}{epoch}'
    groups = schedules.values() if isinstance(schedules, dict) else [schedules]
    for i, schedule in (pair for group in groups for pair in enumerate(group)):
        limit, unit = limits[schedule.by_epoch], 'epoch' if schedule.by_epoch else 'iteration'
        kind, value, end = type(schedule).__name__, schedule.param_name, schedule.end
        steps = sorted(schedule.begin + step for step in getattr(schedule, 'milestones', ()))
        if late := [str(step) for step in steps if limit <= step < end]:
            fault = f'changes {value} at {unit} {", ".join(late)}, which is never reached'
        elif steps or not limit < end < INF:
            continue
        else:
            fault = f'ends at {unit} {end}: {value} never reaches its final value'
        yield f'param_scheduler.{i}: {kind} {fault}, {length}'
    for hook in runner.hooks:
        name = type(hook).__name__
        if isinstance(hook, CheckpointHook) and hook.interval > limits[hook.by_epoch]:
            yield f'{name}.interval={hook.interval}: it saves only at the end, {length}'
        for key in ('num_last_epochs', 'switch_epoch') if by_epoch else ():
            if (epoch := getattr(hook, key, -1)) >= loop.max_epochs:
                yield f'{name}.{key}={epoch}: it never takes effect, {length}'
    if runner.val_loop is not None and loop.val_interval > limits[by_epoch]:
        yield f'train_cfg.val_interval={loop.val_interval}: validation only at the end, {length}'
