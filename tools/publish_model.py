"""Write the weights of a training checkpoint, without optimizer and other state, to a new file.

The first 8 hex digits of its SHA-256 go into its name, as torch.hub expects them.
"""

import argparse
from collections.abc import Sequence

from rich.console import Console

from mmdense import cli
from mmdense.weights.publish import publish


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **cli.example('tools/publish_model.py work_dirs/CONFIG/epoch_12.pth model.pth --half'),
    )
    parser.add_argument('checkpoint', metavar='CKPT', help='checkpoint file')
    parser.add_argument(
        'out',
        metavar='OUT',
        help='.pth or .safetensors file: a/model.pth is written as a/model-1a2b3c4d.pth',
    )
    parser.add_argument(
        '--half', action='store_true', help='store tensors of two and more dimensions as float16'
    )
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    done = publish(args.checkpoint, args.out, half=args.half)
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    console.print(f'{done.file}{" (exists already)" if done.existed else ""}')
    console.print(f'size: {done.before / 1e6:.2f} MB before, {done.after / 1e6:.2f} MB after')
    console.print(f'tensors: {done.tensors}, {done.halves} of them float16')
    if 'ema_state_dict' in done.left_out:
        console.print('weights: the moving average')
    console.print(f'left out: {", ".join(done.left_out) or "nothing"}')


if __name__ == '__main__':
    main()
