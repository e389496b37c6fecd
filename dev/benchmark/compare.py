"""Compare a backbone with other implementations of the same network and the same weights.

All configurations run in one process, in rounds of random order, so that other load on the machine
affects all of them. A speedup is the median over the rounds of the ratio of times to the fastest
configuration of the peers, with a bootstrap interval. Outputs must agree: configurations of mmdense
whose error against float64 is larger than the peers' are marked.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dev.benchmark.floors import Floor
from dev.benchmark.networks import NETWORKS
from mmdense.benchmark.memory import peak_bytes
from mmdense.benchmark.timing import seconds_of
from mmdense.errors import UserError

__all__ = [
    'Contender',
    'Setting',
    'compare',
    'contenders',
    'exact_outputs',
    'peak_memory',
    'prepare',
    'summary',
    'timed',
]

MMDENSE = 'mmdense'
MODES = ('infer', 'train')
# Allowed error against float64, relative to the peers': two memory formats of a peer differ by 2.
TOLERANCE = 1.5
CHECKED = 4  # images that errors are computed for
DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)


@dataclass(frozen=True)
class Setting:
    """The setting of a comparison.

    Attributes:
        network: One of ``NETWORKS``.
        mode: 'infer' (eval mode, no gradients) or 'train' (forward and backward pass in training
            mode, no optimizer step).
        size: Height and width of the images in pixels.
        batch: Number of images.
        dtype: 'float32', 'bfloat16' or 'float16': of weights and images in 'infer', of autocast in
            'train'.
        device: 'cpu' or 'cuda'.
    """

    network: str
    mode: str = 'infer'
    size: tuple[int, int] = (512, 512)
    batch: int = 1
    dtype: str = 'float32'
    device: str = 'cpu'

    def image(self) -> Tensor:
        """Return random images [N, 3, H, W]."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, 3, *self.size, generator=generator).to(self.device)


@dataclass(frozen=True)
class Contender:
    """One implementation of a network in one configuration.

    Attributes:
        library: 'mmdense', or the name of a peer.
        form: How mmdense's network is built: 'deployed', a memory mode, 'unshared' (compiled, but
            without shared batch statistics), or '' for plain.
        channels_last: Use channels-last for weights and images.
        compiled: Use torch.compile.
        graph: Replay a CUDA graph, which launches all kernels at once; for inference.
    """

    library: str
    form: str = ''
    channels_last: bool = False
    compiled: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        """The name in tables, such as 'timm, channels-last, compiled'."""
        options = ('channels-last', self.channels_last), ('compiled', self.compiled)
        words = [word for word, used in (*options, ('CUDA graph', self.graph)) if used]
        return ', '.join(filter(None, [self.library, self.form, *words]))

    def build(self, setting: Setting) -> nn.Module:
        """Return the network on the device and in the dtype of a setting."""
        network = NETWORKS[setting.network]
        options = network.options.get(self.form, {}) if self.library == MMDENSE else {}
        net: nn.Module = network.create(**options)
        if self.library != MMDENSE:
            net = network.peers[self.library](net)
        elif self.form == 'deployed':
            net.switch_to_deploy()
        if setting.mode == 'infer':
            net.to(DTYPES[setting.dtype])
        net.train(setting.mode == 'train').to(setting.device)
        if self.channels_last:
            net.to(memory_format=torch.channels_last)
        if self.compiled and self.form == 'unshared':
            nn.Module.compile(net)
        elif self.compiled:
            net.compile()
        return net

    def image(self, setting: Setting) -> Tensor:
        """Return the images of a setting in the network's memory format and dtype."""
        image = setting.image()
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return image.to(DTYPES[setting.dtype]) if setting.mode == 'infer' else image

    def runner(self, net: nn.Module, setting: Setting) -> Callable[[], Any]:
        """Return a function that runs the network once on the images of a setting."""
        image = self.image(setting)
        dtype = DTYPES[setting.dtype]
        if setting.mode == 'infer':

            def infer() -> Any:
                with torch.inference_mode():
                    return net(image)

            return capture(infer) if self.graph else infer
        mixed = dtype != torch.float32

        def train() -> Any:
            net.zero_grad(set_to_none=True)
            with torch.autocast(setting.device, dtype, enabled=mixed):
                features = net(image)
            _loss(features).backward()
            return features

        return train


def capture(run: Callable[[], Any]) -> Callable[[], Any]:
    """Capture a run in a CUDA graph, and return a function that replays it.

    The function returns the result of the capture, whose values each replay writes anew.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is allocated or compiled once must not be captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay(_keep: Any = run) -> Any:  # the graph reads its weights and images by address
        graph.replay()
        return result

    return replay


def contenders(
    setting: Setting,
    *,
    against: Sequence[str] | None = None,
    forms: Sequence[str] | None = None,
    compiled: bool = True,
    graphs: bool = False,
) -> list[Contender]:
    """Return all configurations to compare, of mmdense and of the peers.

    Args:
        setting: The setting.
        against: Names of peers; by default all that have the network.
        forms: Of mmdense's network: 'plain', 'deployed', memory modes; by default all.
        compiled: Include torch.compile, in channels-last.
        graphs: Include CUDA graphs of the channels-last configurations, in 'infer'.

    Raises:
        UserError: If the network or mode is unknown, a peer doesn't have the network, or CUDA
            graphs are asked for on another device.
    """
    if graphs and setting.device != 'cuda':
        raise UserError(f'CUDA graphs need a GPU, and the device is {setting.device}')
    if setting.network not in NETWORKS:
        raise UserError(f'no network {setting.network} (known: {", ".join(NETWORKS)})')
    if setting.mode not in MODES:
        raise UserError(f'mode is {setting.mode}, must be one of {MODES}')
    network = NETWORKS[setting.network]
    peers = list(network.peers) if against is None else list(against)
    for peer in peers:
        if peer not in network.peers:
            raise UserError(
                f'{peer} has no {setting.network}; choose from {", ".join(network.peers)}'
            )
    if setting.mode == 'infer':  # they differ in training only
        peers = [peer for peer in peers if not peer.endswith('memory_efficient')]
        known = ['', *(['deployed'] if hasattr(network.build(), 'switch_to_deploy') else [])]
    else:
        known = list(network.options)
        if compiled and setting.device == 'cuda' and setting.network.startswith('densenet'):
            known.append('unshared')
    names = {form or 'plain': form for form in known}
    if forms and not {*forms} <= names.keys():
        raise UserError(f'{setting.network} has no forms {forms} here; choose from {[*names]}')
    forms = [form for name, form in names.items() if not forms or name in forms]
    configurations = []
    for library, form in [(MMDENSE, form) for form in forms] + [(peer, '') for peer in peers]:
        if not form or setting.mode == 'infer':
            configurations.append(Contender(library, form))
        if form != 'unshared':
            configurations.append(Contender(library, form, channels_last=True))
        # Compiling takes a minute: only the faster format, and of mmdense only the fastest form to
        # infer with. Compiled for a CPU, lean is plain.
        trains = setting.mode == 'train' and (form != 'lean' or setting.device != 'cpu')
        infers = setting.mode == 'infer' and form == forms[-1]
        if compiled and (library != MMDENSE or trains or infers):
            configurations.append(Contender(library, form, channels_last=True, compiled=True))
    if graphs and setting.mode == 'infer':
        configurations += [replace(c, graph=True) for c in configurations if c.channels_last]
    return configurations


def compare(
    setting: Setting,
    *,
    against: Sequence[str] | None = None,
    forms: Sequence[str] | None = None,
    compiled: bool = True,
    graphs: bool = False,
    rounds: int = 30,
    memory: bool = True,
    peaks: Mapping[str, float] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure time, error and memory of all configurations; the result is ready for JSON.

    Args:
        setting: The setting.
        against: Names of peers; by default all that have the network.
        forms: Of mmdense's network: 'plain', 'deployed', memory modes; by default all.
        compiled: Include torch.compile.
        graphs: Include CUDA graphs.
        rounds: Number of timed runs of each configuration, each after a warm-up run.
        memory: Measure peak memory as well; on a CPU, of eager configurations.
        peaks: What the device reaches, as :func:`.device_peaks` returns it.
        progress: Called with one line about the current step.

    Returns:
        ``setting``, ``rounds``, ``peer`` (the fastest configuration of the peers), ``contenders``
        and ``inexact`` (configurations of mmdense with more than 1.5 times the error of every
        peer). Each contender has ``ratio`` (time of ``peer`` over its time), ``interval`` (95 %),
        ``error`` (relative root mean square error against float64 of the worst output; in 'train'
        that of the first weight's gradient too) and ``memory`` (bytes above weights and images), or
        only ``failed``. On a GPU there are ``milliseconds`` too, and with ``peaks`` the network's
        ``floor`` (:class:`.Floor`) and each contender's ``of_floor``, the share of its time.

    Raises:
        UserError: As :func:`contenders`, or if all peers fail.
    """
    configurations = contenders(
        setting, against=against, forms=forms, compiled=compiled, graphs=graphs
    )
    if memory and setting.device == 'cpu' and not Path('/proc/self/clear_refs').exists():
        raise UserError('peak memory on a CPU can be measured on Linux only: add --no-memory')
    torch.compiler.reset()  # or another size would be compiled for dynamic shapes
    exact = exact_outputs(setting)
    runs, rows = {}, {}
    for contender in configurations:
        progress(f'building {contender.name}')
        run, rows[contender] = prepare(contender, setting, exact, memory=memory)
        if run:
            runs[contender] = run
    seconds: dict[Contender, list[float]] = {contender: [] for contender in runs}
    for number in range(rounds):
        progress(f'round {number + 1} of {rounds}')
        for contender in random.sample(list(runs), len(runs)):
            seconds[contender].append(timed(runs[contender], setting.device))
    for contender in seconds:
        if memory and setting.device == 'cpu' and not contender.compiled:
            progress(f'memory of {contender.name}')
            rows[contender]['memory'] = peak_memory(contender, setting)
    return summary(setting, rows, seconds, peaks)


def prepare(
    contender: Contender, setting: Setting, exact: Sequence[Tensor], *, memory: bool = True
) -> tuple[Callable[[], Any] | None, dict[str, Any]]:
    """Return a contender's run and its row, with ``error``; or no run, and ``failed``.

    On a GPU the row has ``memory``: the peak of torch's allocator in the second run, above weights
    and images.
    """
    try:
        net = contender.build(setting)
        run = contender.runner(net, setting)
        row = {}
        if memory and setting.device != 'cpu' and not contender.graph:
            before = torch.cuda.memory_allocated()
            run()
            net.zero_grad(set_to_none=True)
            cached = torch.cuda.memory_allocated() - before  # by the network, for its next run
            row['memory'] = cached + peak_bytes(run, setting.device)
        return run, row | dict(error=_error(net, run, setting, exact))
    except Exception as failure:  # a compiler error, or an unsupported memory format
        return None, dict(failed=f'{type(failure).__name__}: {failure}'.splitlines()[0])


def summary(
    setting: Setting,
    rows: Mapping[Contender, dict[str, Any]],
    seconds: Mapping[Contender, Sequence[float]],
    peaks: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the result of :func:`compare` from rows of contenders and their times in each round.

    Raises:
        UserError: If all peers failed.
    """
    peers = [contender for contender in seconds if contender.library != MMDENSE]
    if not peers:
        raise UserError(f'all peers of {setting.network} failed: {list(rows.values())}')
    peer = min(peers, key=lambda contender: statistics.median(seconds[contender]))
    allowed = TOLERANCE * max(rows[contender]['error'] for contender in peers)
    floor = peaks and Floor.of(setting, peaks)
    for contender, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[peer], times, strict=True)]
        rows[contender] |= dict(ratio=statistics.median(ratios), interval=_interval(ratios))
        if setting.device != 'cpu':  # times of an unnamed CPU tell readers nothing
            rows[contender]['milliseconds'] = 1e3 * statistics.median(times)
        if floor:
            rows[contender]['of_floor'] = floor.seconds / statistics.median(times)
    return dict(
        setting=asdict(setting),
        rounds=len(seconds[peer]),
        peer=peer.name,
        inexact=[c.name for c in seconds if c.library == MMDENSE and rows[c]['error'] > allowed],
        contenders={contender.name: row for contender, row in rows.items()},
        **(dict(floor=asdict(floor)) if floor else {}),
    )


def exact_outputs(setting: Setting) -> list[Tensor]:
    """Return the outputs in float64, in 'train' with the gradient of the first weight."""
    trains = setting.mode == 'train'
    # A memory mode has the same results, and in float64 a large batch needs it.
    net = NETWORKS[setting.network].create(**(dict(memory='recompute') if trains else {}))
    net.double().to(setting.device).train(trains)

    def run() -> Sequence[Tensor]:
        with torch.inference_mode(not trains):
            features = net(setting.image().double())
        if trains:
            _loss(features).backward()
        return features

    return _results(net, run, setting)


def _results(net: nn.Module, run: Callable[[], Any], setting: Setting) -> list[Tensor]:
    results = [x[:CHECKED] for x in run()]
    if setting.mode == 'train':
        results.append(next(net.parameters()).grad)
    return [x.detach().cpu().double() for x in results]


def _loss(features: Sequence[Tensor]) -> Tensor:
    return sum(x.to(torch.promote_types(x.dtype, torch.float32)).square().mean() for x in features)


def _error(
    net: nn.Module, run: Callable[[], Any], setting: Setting, exact: Sequence[Tensor]
) -> float:
    # Root mean square: the largest error of a pixel varies by a fifth between images.
    pairs = zip(_results(net, run, setting), exact, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def timed(run: Callable[[], Any], device: str) -> float:
    """Time a run, after one that refills the caches."""
    run()
    return seconds_of(run, device)


def _interval(ratios: Sequence[float]) -> tuple[float, float]:
    medians = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[49], medians[1949]


def peak_memory(contender: Contender, setting: Setting) -> int:
    """Return the peak memory of a run on a CPU above weights and images, in bytes.

    It is the resident memory of a separate process that runs the network once and returns freed
    tensors to the system.
    """
    task = json.dumps(dict(contender=asdict(contender), setting=asdict(setting)))
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, '-m', 'dev.benchmark.peak', task],
        # By default glibc keeps freed tensors below 32 MiB, and resident memory with them.
        env={**os.environ, 'OMP_NUM_THREADS': threads, 'MALLOC_MMAP_THRESHOLD_': str(2**20)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.split()[-1])
