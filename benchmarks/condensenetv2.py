"""Compare the deployed CondenseNetV2 with the arithmetic of the released converted form.

Both have the same random weights. The released form is written from its description: it gathers,
norms, activates, convolves and shuffles one after the other, scatters by a dense product with a 0/1
matrix, and concatenates. Rounds run all forms in random order, each once untimed and then twice;
the figure is the median over rounds of the ratio of the released form's time, in the faster of its
two memory formats, to ours, with a bootstrap interval. Beside it stand the largest difference from
float64, as a share of a map's largest value, and the multiply-adds that each form executes at
224 x 224, without the classifier.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.runner import set_random_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmdense.apis.deploy import faster_dense
from mmdense.models import CondenseNetV2

RELEASED = ('released', 'released, channels-last')


class Released(nn.Module):
    """What the released converted form computes, from a network of the condensed form."""

    def __init__(self, net: CondenseNetV2) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        for block in list(self.net.features.values())[1:]:
            for layer in block:
                index = layer.sfr.index
                matrix = F.one_hot(index, len(index)).to(layer.sfr.conv.weight)
                layer.sfr.register_buffer('matrix', matrix)

    def forward(self, x: Tensor) -> list[Tensor]:
        stem, *blocks = self.net.features.values()
        x = stem(x)
        maps = []
        for block in blocks:
            if maps:
                x = F.avg_pool2d(x, 2)
            for layer in block:
                x = _released_layer(layer, x)
            maps.append(x)
        return maps


def _released_layer(layer: nn.Module, x: Tensor) -> Tensor:
    conv_1, (norm, activation, conv), sfr = layer.conv_1, layer.conv_2, layer.sfr
    act = _hard_swish if isinstance(activation, nn.Hardswish) else F.relu
    new = conv_1.conv(act(conv_1.norm(torch.index_select(x, 1, conv_1.index))))
    new = layer.se(conv(act(norm(_shuffle(new, conv_1.groups)))))
    added = act(sfr.norm(new))
    added = sfr.conv(_shuffle(added, added.shape[1] // sfr.groups))
    size = added.shape
    added = torch.matmul(added.flatten(2).transpose(1, 2).contiguous(), sfr.matrix)
    added = added.transpose(1, 2).contiguous().view(size)
    return torch.cat([x + added, new], 1)


def _hard_swish(x: Tensor) -> Tensor:
    return x * F.relu6(x + 3) / 6


def _shuffle(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).transpose(1, 2).contiguous().flatten(1, 2)


def network(arch: str) -> CondenseNetV2:
    """Return a fully pruned network with random weights and statistics, condensed."""
    set_random_seed(0)
    net = CondenseNetV2(arch=arch, out_indices=None).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                nn.init.uniform_(values, low, high)
    net.prune_to(1.0)
    net.condense()
    return net


def measure(arch: str, size: tuple[int, int], rounds: int, *, tune: bool) -> dict:
    net = network(arch)
    image = torch.randn(1, 3, *size)
    with torch.inference_mode():
        exact = copy.deepcopy(net).double()(image.double())
    dense = {'deployed': None, 'deployed, fewest multiply-adds': ()}
    if tune:
        dense['deployed, tuned'] = faster_dense(net, size)
    nets: dict[str, nn.Module] = {'condensed': net, RELEASED[0]: Released(net)}
    for name, names in dense.items():
        nets[name] = copy.deepcopy(net)
        nets[name].switch_to_deploy(names)
    runs: dict[str, Callable[[], object]] = {}
    for name, module in nets.items():
        runs[name] = lambda module=module: module(image)
    last = image.contiguous(memory_format=torch.channels_last)
    runs[RELEASED[1]] = lambda module=nets[RELEASED[0]]: module(last)
    seconds = {name: [] for name in runs}
    with torch.inference_mode():
        errors = {name: max(map(_difference, run(), exact)) for name, run in runs.items()}
        for _ in range(rounds):
            for name in random.sample(list(runs), len(runs)):
                runs[name]()
                begin = time.perf_counter()
                runs[name]()
                runs[name]()
                seconds[name].append((time.perf_counter() - begin) / 2)
    peer = min(RELEASED, key=lambda name: statistics.median(seconds[name]))
    macs = {name: executed_macs(module) for name, module in nets.items()}
    macs[RELEASED[1]] = macs[RELEASED[0]]
    rows = {}
    for name in runs:
        ratios = [a / b for a, b in zip(seconds[peer], seconds[name], strict=True)]
        rows[name] = dict(
            ratio=statistics.median(ratios),
            interval=_interval(ratios),
            error=errors[name],
            macs=macs[name],
        )
    return dict(arch=arch, size=size, peer=peer, rounds=rounds, forms=rows)


def executed_macs(net: nn.Module) -> int:
    """Return the multiply-adds that the network executes for an image of 224 x 224 pixels."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.randn(1, 3, 224, 224))
    return counter.get_total_flops() // 2  # it counts a multiply-add as two


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _interval(ratios: list[float]) -> tuple[float, float]:
    medians = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[49], medians[1949]  # 95 %


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--archs', nargs='+', default=['a', 'b', 'c'])
    parser.add_argument('--size', nargs=2, type=int, default=(512, 512))
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--tune', action='store_true', help='time dense against grouped first')
    parser.add_argument('--json', type=Path, help='write the result there')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for arch in args.archs:
        results.append(measure(arch, tuple(args.size), args.rounds, tune=args.tune))
        for name, row in results[-1]['forms'].items():
            low, high = row['interval']
            print(f'{arch} {name}: {row["ratio"]:.2f} x ({low:.2f} to {high:.2f}), error', end=' ')
            print(f'{row["error"]:.1e}')
    cpus = [line for line in Path('/proc/cpuinfo').read_text().splitlines() if 'model name' in line]
    record = dict(
        what='released converted form over ours, ratio of times, batch 1, float32, no gradients',
        date=datetime.date.today().isoformat(),
        device=f'{cpus[0].partition(":")[2].strip()}, {args.threads} threads',
        versions=dict(torch=torch.__version__, python=platform.python_version()),
        omp_wait_policy=os.environ.get('OMP_WAIT_POLICY', 'unset'),
        results=results,
    )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    main()
