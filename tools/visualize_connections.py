"""Draw how strongly each layer of a CondenseNetV2 reads and reactivates each earlier one.

A heat map for each block shows mean absolute weights; pruned connections count as 0. The checkpoint
is of any model with a learned or condensed CondenseNetV2, or a released one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmdense import cli

# isort: split

from mmengine.runner import CheckpointLoader
from rich.console import Console

import mmdense.models  # noqa: F401  (adds the addresses of weights)
from mmdense.errors import UserError, suggest_file
from mmdense.files import check_writable
from mmdense.visualization.connections import connection_strengths, draw_connections
from mmdense.weights.formats import recognise, state_dict_of


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **cli.example('tools/visualize_connections.py CHECKPOINT --out connections.png'),
    )
    parser.add_argument('checkpoint', help='checkpoint file or address')
    parser.add_argument('--out', default='connections.png', metavar='FILE', help='(%(default)s)')
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if '://' not in args.checkpoint and not Path(args.checkpoint).exists():
        raise UserError(f'no checkpoint {args.checkpoint}{suggest_file(args.checkpoint, "*.pth")}')
    check_writable(Path(args.out))
    try:
        weights = state_dict_of(CheckpointLoader.load_checkpoint(args.checkpoint, 'cpu'))
        if known := recognise(weights):
            weights = known.map(weights).weights
        blocks = connection_strengths(weights)
    except (UserError, ValueError) as error:
        raise UserError(f'{args.checkpoint}: {error}') from error
    draw_connections(blocks).savefig(args.out)
    Console().print(f'picture: {args.out}', soft_wrap=True, markup=False)


if __name__ == '__main__':
    main()
