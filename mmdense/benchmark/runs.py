"""Trainings of a sweep, each in a process of its own: here one after the other, or as jobs.

Jobs are submitit's, side by side on this machine or on a SLURM cluster.
"""

import ctypes
import fcntl
import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mmdense.benchmark.bootstrap import keep_matches
from mmdense.config.read import load_config
from mmdense.errors import UserError, one_line, warn
from mmdense.files import atomic_write
from mmdense.visualization import logs

# In mmengine's log: epoch (if it counts them), iteration, their number, time left, loss.
STATE = r'\(train\)\s*(?:\[(\d+)\])?\[\s*(\d+)/(\d+)\].*?eta: ([\d days,:]+\d).*? loss: (\S+)'
ACCURACY = r'\(val\).*? (?:coco/)?(\w+_mAP|mIoU): (\S+)'
RAISED = re.compile(r'[\w.]*(Error|Exception|Interrupt)\b')
LOG_TAIL = 20_000  # characters
POLL = 0.5  # seconds
TRIES = 3  # of a training whose job was killed
DAY, YEAR = 60 * 24, 60 * 24 * 365  # minutes: time limits on a cluster and on this machine
DIES_WITH_PARENT = 1  # Linux: PR_SET_PDEATHSIG

Progress = Callable[[str, str, float], None]  # name, state, share


@dataclass(frozen=True)
class TrainingRun:
    """A training of a sweep, or the test of a checkpoint; calling it runs it."""

    name: str  # for people
    seed: int
    config: Path
    folder: Path
    epochs: int | None  # None if it counts iterations
    weights: str | None = None  # checkpoint that is tested

    @property
    def state(self) -> dict[str, Any]:
        """``status`` ('waiting', 'training', 'done' or 'failed'), ``seconds`` and ``error``."""
        file = self.folder / 'state.json'
        return json.loads(file.read_text()) if file.exists() else dict(status='waiting', seconds=0)

    def save_state(self, status: str, seconds: float, **more: Any) -> None:
        state = dict(status=status, seconds=seconds, **more)
        atomic_write(self.folder / 'state.json', json.dumps(state).encode())

    def __call__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Train, or continue, and write the state; see :meth:`.Sweep.train`.

        ``env`` is added to this process's environment. If there is a training in the same folder,
        UserError with ``progress``; without, this is a job, which waits for its end.
        """
        with (self.folder / 'lock').open('w') as lock:
            try:  # the process inherits the lock
                fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if progress else 0))
            except BlockingIOError as error:
                raise UserError(
                    f'a training in {self.folder} is still running, from this sweep or a stopped '
                    'one: wait for it, or stop it'
                ) from error
            state = self.state
            if state['status'] == 'done':
                return
            self.save_state('training', state['seconds'])  # no longer failed, if it is killed now
            begin = time.monotonic() - state['seconds']
            if self.weights:
                command = [part.replace('train.py', 'test.py') for part in command]
            with self.log.open('w') as output:
                process = subprocess.Popen(
                    [*command, str(self.config), self.weights or '--resume'],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(env or {})},
                    pass_fds=[lock.fileno()],
                    preexec_fn=_end_with_parent,
                )
            try:
                while process.poll() is None:
                    if progress:
                        progress(self.name, *self.read_progress())
                    self.save_state('training', time.monotonic() - begin)
                    time.sleep(POLL)
            except BaseException:  # such as Ctrl-C or a preemption; the checkpoints stay
                process.terminate()
                process.wait()
                raise
        seconds = time.monotonic() - begin
        if process.returncode:
            self.save_state('failed', seconds, error=self._read_error(process.returncode))
        else:
            try:
                keep_matches(load_config(str(self.config)))
            except Exception as error:  # from any library; the training is done
                warn(f'{self.name}: no matches: {one_line(error)}')
            self.save_state('done', seconds)

    def checkpoint(self, *args: Any) -> Any:
        """Return what a preempted job does when it is queued again: it continues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args)

    @property
    def log(self) -> Path:
        return self.folder / 'output.log'

    def read_progress(self) -> tuple[str, float]:
        """Return the state and the share of the training that is done."""
        text = self.log.read_text(errors='replace')[-LOG_TAIL:] if self.log.exists() else ''
        if not (matches := re.findall(STATE, text)):
            return 'testing' if self.weights else 'starting', 0.0
        epoch, step, steps, left, loss = matches[-1]
        share, place = int(step) / int(steps), f'iteration {step} of {steps}'
        if epoch and self.epochs:
            share, place = (int(epoch) - 1 + share) / self.epochs, f'epoch {epoch} of {self.epochs}'
        figures = [f'loss {loss}', *(f'{k} {v}' for k, v in re.findall(ACCURACY, text)[-1:])]
        return ', '.join([place, f'{left} left', *figures]), share

    def read_log(self) -> tuple[list[list[float]], list[dict[str, float]]]:
        """Return the losses, by iteration, and validations, or the test of a checkpoint."""
        if self.weights:
            tests = (json.loads(file.read_text()) for file in sorted(self.folder.glob('*/*.json')))
            return [], [dict(iter=0) | _rename(logs.numbers_of(test)) for test in tests]
        losses, validations = [], []
        with suppress(UserError):  # nothing logged yet
            losses, validations = logs.read_scalars(self.folder)
        return (
            [[record['step'], record['loss']] for record in losses],
            [dict(iter=record['iter']) | _rename(record) for record in validations],
        )

    def _read_error(self, status: int) -> str:
        """Return the line of the log that says why the process ended."""
        if status < 0:
            return f'killed by signal {-status}'
        text = re.sub(r'^\[rank\d+\]: ', '', self.log.read_text(errors='replace'), flags=re.M)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        messages = [line.removeprefix('error: ') for line in lines if line.startswith('error: ')]
        # torchrun's own error follows that of its processes.
        raised = [line for line in lines if RAISED.match(line) and 'ChildFailedError' not in line]
        return [*lines[-1:], f'ended with status {status}', *raised[-1:], *messages[-1:]][-1][:300]


def _rename(record: Mapping[str, Any]) -> dict[str, float]:
    names = (name for name in record if name not in logs.NO_METRICS)
    return {logs.METRIC_NAMES.get(name, name): record[name] for name in names}


def _end_with_parent() -> None:
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGTERM)


def train_as_jobs(
    runs: Sequence[TrainingRun],
    command: Sequence[str],
    *,
    progress: Progress,
    finished: Callable[[TrainingRun], None],
    folder: Path,
    cluster: str = 'local',
    parallel: int | None = None,
    gpus: int = 1,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Train as submitit's jobs. A training whose job was killed continues in another one.

    Args:
        runs: Trainings that are not done.
        command, progress: See :meth:`.Sweep.train`.
        finished: Called after each training.
        folder: For the jobs' files; on a cluster, all its machines must see it.
        cluster: 'local': processes on this machine, which share its GPUs and cores. 'slurm': a job
            array.
        parallel: How many train at a time; by default all.
        gpus: Number of GPUs of each.
        options: Parameters of submitit's AutoExecutor, such as ``slurm_partition``,
            ``timeout_min`` and ``mem_gb``.

    UserError if submitit is missing or refuses an option, there is no SLURM here, or this machine
    has fewer GPUs.
    """
    parallel = min(parallel or len(runs), len(runs))
    executor = _executor(folder, cluster, parallel, gpus, options or {})
    # A cluster has them all at once, and its own queue.
    shares = _shares(parallel, gpus) if cluster == 'local' else [{}] * len(runs)
    waiting, jobs, tries = list(runs), {}, Counter()
    try:
        while waiting or jobs:
            free = [share for share in range(len(shares)) if share not in jobs]
            begun = {share: waiting.pop(0) for share in free[: len(waiting)]}
            if begun:
                try:
                    with executor.batch():
                        begun = {
                            share: (run, executor.submit(run, command, shares[share]))
                            for share, run in begun.items()
                        }
                except RuntimeError as error:  # such as an unknown partition
                    raise UserError(f'submitit: {one_line(error)}') from error
                jobs |= begun
            for share, (run, job) in list(jobs.items()):
                progress(run.name, *run.read_progress())
                if job.done():
                    del jobs[share]
                    tries[run] += 1
                    state = run.state
                    if state['status'] not in ('done', 'failed'):
                        if tries[run] < TRIES:
                            waiting.append(run)
                            continue
                        error = f'its job ended {TRIES} times (logs: {folder})'
                        run.save_state('failed', state['seconds'], error=error)
                    finished(run)
            time.sleep(POLL)
    except BaseException:
        for _, job in jobs.values():
            job.cancel(check=False)
        raise


def run_as_job(
    function: Callable[[], Any],
    folder: Path,
    cluster: str,
    gpus: int,
    options: Mapping[str, Any],
) -> Any:
    """Return what a function returns in a job of its own; see :func:`train_as_jobs`."""
    job = _executor(folder, cluster, 1, gpus, options).submit(function)
    try:
        return job.result()
    except BaseException:
        job.cancel(check=False)
        raise


def _executor(
    folder: Path, cluster: str, parallel: int, gpus: int, options: Mapping[str, Any]
) -> Any:
    try:
        # Otherwise its import sets up logging, which closes the log files of all other packages.
        with mock.patch.dict(os.environ, SUBMITIT_LOG_LEVEL='NOCONFIG'):
            import submitit
    except ModuleNotFoundError as error:
        raise UserError('jobs need another package: pip install submitit') from error
    try:
        parameters = dict(name='sweep', tasks_per_node=1)
        if cluster == 'local':
            executor = submitit.AutoExecutor(folder, cluster)
            parameters |= dict(timeout_min=YEAR)
        else:  # a job that reaches its time limit is queued again, and continues
            executor = submitit.AutoExecutor(folder, cluster, slurm_max_num_timeout=1000)
            parameters |= dict(timeout_min=DAY, gpus_per_node=gpus)
            parameters |= dict(slurm_array_parallelism=parallel)
        executor.update_parameters(**parameters | options)
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise UserError(f'submitit: {one_line(error)}') from error
    return executor


def _shares(parallel: int, gpus: int) -> list[dict[str, str]]:
    """Return the environment of each training that runs beside others on this machine."""
    threads = dict(OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // parallel)))
    count = torch.cuda.device_count()
    if not count:
        return [threads | dict(CUDA_VISIBLE_DEVICES='')] * parallel
    visible = os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(count)))
    devices = visible.split(',')
    if parallel * gpus > count:
        raise UserError(f'{parallel} x {gpus} GPUs are needed, and there are {count}')
    parts = [devices[i * gpus : (i + 1) * gpus] for i in range(parallel)]
    return [threads | dict(CUDA_VISIBLE_DEVICES=','.join(part)) for part in parts]
