"""Write the README's table of backbones from the networks themselves, or check that it is fresh."""

import argparse
import sys
from pathlib import Path

import torch

from mmdense import cli as options
from mmdense.flops import backbone_macs, count_parameters
from mmdense.models import CondenseNetV2, DenseNet, RDNet, ReXNet, ShuffleNetV2
from mmdense.models.backbones import condensenetv2, densenet, rdnet, rexnet, shufflenetv2

README = Path(__file__).parents[2] / 'README.md'
BEGIN, END = '<!-- backbones: written by dev/docs/update_readme.py -->', '<!-- /backbones -->'
FAMILIES = {
    RDNet: rdnet.ARCHS,
    DenseNet: densenet.ARCHS,
    ReXNet: rexnet.ARCHS,
    CondenseNetV2: condensenetv2.ARCHS,
    ShuffleNetV2: shufflenetv2.ARCHS,
}
OPTIONS = {CondenseNetV2: dict(form='condensed')}
SIZES = ((224, 224), (800, 1344))


def giga(macs: int) -> str:
    return f'{macs / 1e9:.{1 if macs >= 1e9 else 2}f}'


def table() -> str:
    titles = ['type', 'arch', 'channels', 'strides', 'params (M)']
    titles += [f'GMACs at {height} x {width}' for height, width in SIZES]
    rows = [titles, ['---'] * 4 + ['--:'] * 3]
    for family, archs in FAMILIES.items():
        for arch in archs:
            with torch.device('meta'):
                net = family(arch=arch, **OPTIONS.get(family, {})).eval()
            said = ''.join(f", `{k}='{v}'`" for k, v in OPTIONS.get(family, {}).items())
            rows.append(
                [
                    f'`mmdense.{family.__name__}`',
                    f'`{arch}`{said}',
                    ', '.join(map(str, net.out_channels)),
                    ', '.join(map(str, net.out_strides)),
                    f'{count_parameters(net) / 1e6:.2f}',
                    *(giga(backbone_macs(net, size)) for size in SIZES),
                ]
            )
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, **options.example('dev/docs/update_readme.py --check')
    )
    parser.add_argument('--check', action='store_true', help='write nothing; 1 if it is stale')
    args = parser.parse_args()
    text = README.read_text(encoding='utf-8')
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    fresh = f'{head}{BEGIN}\n{table()}\n{END}{tail}'
    if fresh == text:
        return
    if args.check:
        sys.exit(f'{README.name} is stale: run python dev/docs/update_readme.py')
    README.write_text(fresh, encoding='utf-8')


if __name__ == '__main__':
    main()
