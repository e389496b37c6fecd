"""Comparisons in several settings at once: all compile side by side, then take turns.

A compiled configuration has a process of its own, and the eager ones of a setting share one. Once
all are ready, or have had their time, each setting is timed in rounds of random order, while
nothing else runs.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from dev.benchmark.compare import Contender, Setting, exact_outputs, prepare, summary, timed
from mmdense.errors import UserError

__all__ = ['compare_side_by_side']


def compare_side_by_side(
    settings: Mapping[Setting, Sequence[Contender]],
    *,
    rounds: int,
    patience: float,
    peaks: Mapping[str, float] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Yield a result for each setting, as :func:`.compare` returns it.

    Args:
        settings: The configurations of each setting.
        rounds: Number of timed runs of each configuration, each after a warm-up run.
        patience: Seconds to wait for compilers; who is not ready then has failed.
        peaks: What the GPU can do, as :func:`.device_peaks` returns it.
        progress: Called with one line about the current step.
    """
    end = time.monotonic() + patience
    context = get_context('forkserver')  # which imports once, and never uses CUDA itself
    context.set_forkserver_preload([__name__])
    one = context.Lock()  # float64 references of all settings at once would fill the GPU
    workers = []
    for setting, contenders in settings.items():
        groups: dict[str, list[Contender]] = {}
        for contender in contenders:
            key = contender.library + contender.form if contender.compiled else 'eager'
            groups.setdefault(key, []).append(contender)
        for group in groups.values():
            connection, theirs = context.Pipe()
            arguments = theirs, setting, group, one
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            workers.append((setting, group, connection, process))
    rows: dict[Setting, dict[Contender, dict]] = {setting: {} for setting in settings}
    ready: dict[Setting, dict[Contender, Connection]] = {setting: {} for setting in settings}
    try:
        for setting, group, connection, process in workers:
            for contender in group:
                progress(f'{setting.network}, {setting.mode}: preparing {contender.name}')
                row = dict(failed=f'not ready after {patience:.0f} s')
                try:
                    if connection.poll(max(0, end - time.monotonic())):
                        row = connection.recv()
                    else:
                        process.kill()
                except EOFError:
                    row = dict(failed='its process ended')
                rows[setting][contender] = row
                if 'failed' not in row:
                    ready[setting][contender] = connection
        for setting, runners in ready.items():
            seconds: dict[Contender, list[float]] = {contender: [] for contender in runners}
            for number in range(rounds):
                progress(f'{setting.network}, {setting.mode}: round {number + 1} of {rounds}')
                for contender in random.sample(list(runners), len(runners)):
                    runners[contender].send(contender)
                    seconds[contender].append(runners[contender].recv())
            try:
                yield summary(setting, rows[setting], seconds, peaks)
            except UserError as error:
                progress(str(error))
    finally:
        for *_, process in workers:
            process.kill()


def _work(connection: Connection, setting: Setting, group: list[Contender], one: Any) -> None:
    """Prepare contenders, send their rows, then send the time of a run for each one received."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 8))
    with one:
        exact = exact_outputs(setting)
        torch.cuda.empty_cache()
    runs = {}
    for contender in group:
        runs[contender], row = prepare(contender, setting, exact)
        connection.send(row)
    while True:
        connection.send(timed(runs[connection.recv()], setting.device))
