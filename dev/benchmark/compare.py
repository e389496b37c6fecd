"""Compare a backbone of ours with others' of the same weights, side by side.

All contenders run in one process, in rounds of random order, so that what the machine does
meanwhile falls on all of them. A figure is the median over the rounds of the ratio of times, with a
bootstrap interval; peers count in the fastest of their configurations. Before a figure counts, the
outputs must agree: no contender of ours may be further from float64 than a peer is.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dev.benchmark.networks import NETWORKS
from mmdense.benchmark.timing import timed
from mmdense.errors import UserError

__all__ = ['Contender', 'Setting', 'compare', 'contenders', 'peak_memory']

OURS = 'mmdense'
MODES = ('infer', 'train')
GATE = 1.5  # times a peer's own distance from float64: memory formats of theirs differ by 2
DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        network: One of ``NETWORKS``.
        mode: 'infer' (evaluation without gradients) or 'train' (forward and backward pass of
            batch statistics, without an optimizer).
        size: Height and width of the images in pixels.
        batch: Number of images.
        dtype: 'float32', or 'bfloat16' or 'float16': of weights and images in 'infer', of autocast
            in 'train'.
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
    """A network in one of its configurations.

    Attributes:
        whose: 'mmdense', or a peer's name.
        form: How it is built, such as 'deployed' or 'lean'; '' is plain.
        channels_last: Memory format of weights and images.
        compiled: By torch.compile.
    """

    whose: str
    form: str = ''
    channels_last: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """Return such as 'timm, channels-last, compiled'."""
        words = [self.whose, self.form, 'channels-last' if self.channels_last else '']
        return ', '.join(word for word in [*words, 'compiled' if self.compiled else ''] if word)

    def build(self, setting: Setting) -> nn.Module:
        """Return the network, on the device and in the types of a setting."""
        network = NETWORKS[setting.network]
        options = network.options.get(self.form, {}) if self.whose == OURS else {}
        net: nn.Module = network.create(**options)
        if self.whose != OURS:
            net = network.peers[self.whose](net)
        elif self.form == 'deployed':
            net.switch_to_deploy()
        if setting.mode == 'infer':
            net.to(DTYPES[setting.dtype])
        net.train(setting.mode == 'train').to(setting.device)
        if self.channels_last:
            net.to(memory_format=torch.channels_last)
        if self.compiled:
            net.compile()
        return net

    def image(self, setting: Setting) -> Tensor:
        """Return the images of a setting, as the network takes them."""
        image = setting.image()
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return image.to(DTYPES[setting.dtype]) if setting.mode == 'infer' else image

    def runner(self, net: nn.Module, setting: Setting) -> Callable[[], Any]:
        """Return what runs the network once on images of the setting."""
        image = self.image(setting)
        dtype = DTYPES[setting.dtype]
        if setting.mode == 'infer':

            def infer() -> Any:
                with torch.inference_mode():
                    return net(image)

            return infer
        narrow = dtype != torch.float32

        def train() -> None:
            net.zero_grad(set_to_none=True)
            with torch.autocast(setting.device, dtype, enabled=narrow):
                maps = net(image)
            _loss(maps).backward()

        return train


def contenders(
    setting: Setting, *, against: Sequence[str] | None = None, compiled: bool = True
) -> list[Contender]:
    """Return ours and the peers', the peers' in all of their configurations.

    Args:
        setting: What is measured.
        against: Peers; all that have the network by default.
        compiled: Also channels-last by torch.compile.

    Raises:
        UserError: An unknown network or mode, or a peer that has it not.
    """
    if setting.network not in NETWORKS:
        raise UserError(f'no network {setting.network} (known: {", ".join(NETWORKS)})')
    if setting.mode not in MODES:
        raise UserError(f'mode is {setting.mode}, must be one of {MODES}')
    network = NETWORKS[setting.network]
    peers = list(network.peers) if against is None else list(against)
    for peer in peers:
        if peer not in network.peers:
            raise UserError(f'{peer} has no {setting.network}; {", ".join(network.peers)} has')
    if setting.mode == 'infer':  # recomputation is of no use there
        peers = [peer for peer in peers if not peer.endswith('memory_efficient')]
        forms = ['', *(['deployed'] if hasattr(network.build(), 'switch_to_deploy') else [])]
    else:
        forms = list(network.options)
    found = []
    for whose, form in [(OURS, form) for form in forms] + [(peer, '') for peer in peers]:
        if not form or setting.mode == 'infer':
            found.append(Contender(whose, form))
        found.append(Contender(whose, form, channels_last=True))
        # Compilation takes a minute each: in the faster format alone, and of ours the fastest form.
        if compiled and (whose != OURS or setting.mode == 'train' or form == forms[-1]):
            found.append(Contender(whose, form, channels_last=True, compiled=True))
    return found


def compare(
    setting: Setting,
    *,
    against: Sequence[str] | None = None,
    compiled: bool = True,
    rounds: int = 30,
    memory: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Return times, errors and memory of all contenders, ready for JSON.

    Args:
        setting: What is measured.
        against: Peers; all that have the network by default.
        compiled: Also by torch.compile.
        rounds: Of each contender, each after a run that is not timed.
        memory: Measure peak memory too, of eager contenders, each in a process of its own.
        progress: Is told what goes on.

    Returns:
        ``setting``, ``peer`` (the fastest of the peers' configurations), ``contenders``: for each
        its ``ratio`` (the peer's time over its own), ``interval`` (95 %), ``error`` (distance from
        float64 in root mean square, as a share of what it is a distance from: of the worst map, or
        in 'train' of the images' gradient), ``memory`` (bytes above what the weights take), or
        ``failed``. ``inexact`` names those of ours that are more than 1.5 times as far from
        float64 as all peers.

    Raises:
        UserError: As :func:`contenders`; none of the peers could be run.
    """
    found = contenders(setting, against=against, compiled=compiled)
    if memory and setting.device == 'cpu' and not Path('/proc/self/clear_refs').exists():
        raise UserError('peak memory on a CPU is measured on Linux alone: add --no-memory')
    exact = _exact(setting)
    runs, rows = {}, {}
    for contender in found:
        progress(f'building {contender.name}')
        try:
            net = contender.build(setting)
            run = contender.runner(net, setting)
            run()
            error = _error(net, contender, setting, exact)
        except Exception as failure:  # of a compiler, or of a format that a network doesn't take
            rows[contender] = dict(failed=f'{type(failure).__name__}: {failure}'.splitlines()[0])
            continue
        runs[contender] = run
        rows[contender] = dict(error=error)
    theirs = [contender for contender in runs if contender.whose != OURS]
    if not theirs:
        raise UserError(f'no peer of {setting.network} could be run: {list(rows.values())}')
    seconds: dict[Contender, list[float]] = {contender: [] for contender in runs}
    for number in range(rounds):
        progress(f'round {number + 1} of {rounds}')
        for contender in random.sample(list(runs), len(runs)):
            seconds[contender].append(_seconds(runs[contender], setting.device))
    peer = min(theirs, key=lambda contender: statistics.median(seconds[contender]))
    allowed = GATE * max(rows[contender]['error'] for contender in theirs)
    del runs
    for contender, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[peer], times, strict=True)]
        rows[contender] |= dict(ratio=statistics.median(ratios), interval=_interval(ratios))
        if setting.device == 'cuda':  # elsewhere times are of no machine that anybody has
            rows[contender]['milliseconds'] = 1e3 * statistics.median(times)
        if memory and not contender.compiled:
            progress(f'memory of {contender.name}')
            rows[contender]['memory'] = peak_memory(contender, setting)
    return dict(
        setting=asdict(setting),
        rounds=rounds,
        peer=peer.name,
        inexact=[c.name for c in seconds if c.whose == OURS and rows[c]['error'] > allowed],
        contenders={contender.name: row for contender, row in rows.items()},
    )


def _exact(setting: Setting) -> list[Tensor]:
    """Return the maps in float64, and in 'train' the gradient of the images."""
    net = NETWORKS[setting.network].create().double().to(setting.device)
    net.train(setting.mode == 'train')
    return _outputs(net, setting, setting.image().double(), torch.float64)


def _outputs(net: nn.Module, setting: Setting, image: Tensor, dtype: torch.dtype) -> list[Tensor]:
    if setting.mode == 'infer':
        with torch.no_grad():
            return [x.cpu().double() for x in net(image)]
    image.requires_grad_()
    narrow = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(setting.device, dtype if narrow else None, enabled=narrow):
        maps = net(image)
    _loss(maps).backward()
    return [x.detach().cpu().double() for x in (*maps, image.grad)]


def _loss(maps: Sequence[Tensor]) -> Tensor:
    return sum(x.to(torch.promote_types(x.dtype, torch.float32)).square().mean() for x in maps)


def _error(
    net: nn.Module, contender: Contender, setting: Setting, exact: Sequence[Tensor]
) -> float:
    found = _outputs(net, setting, contender.image(setting), DTYPES[setting.dtype])
    # The largest distance of any pixel would differ by a fifth from one image to the next.
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def _seconds(run: Callable[[], Any], device: str) -> float:
    """Time a run after one that fetches what the other contenders have displaced."""
    run()
    return timed(run, device)


def _interval(ratios: Sequence[float]) -> tuple[float, float]:
    medians = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[49], medians[1949]


def peak_memory(contender: Contender, setting: Setting) -> int:
    """Return the bytes that a run takes above weights and images, at its peak.

    On a GPU they are those of torch's allocator; on a CPU the resident memory of a process of its
    own, which runs the network once and gives freed tensors back to the system.
    """
    if setting.device == 'cuda':
        run = contender.runner(contender.build(setting), setting)
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    task = json.dumps(dict(contender=asdict(contender), setting=asdict(setting)))
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, '-m', 'dev.benchmark.peak', task],
        # glibc would keep freed tensors of less than 32 MiB for other sizes to come.
        env={**os.environ, 'OMP_NUM_THREADS': threads, 'MALLOC_MMAP_THRESHOLD_': str(2**20)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.split()[-1])
