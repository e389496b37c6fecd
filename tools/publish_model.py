"""Write the weights of a training checkpoint, without what only training wants, to a new file.

The first 8 hex digits of the SHA-256 of its content go into its name, as torch.hub has it.
"""

import argparse

from rich.console import Console

from mmdense import cli as options
from mmdense.cli import report_errors
from mmdense.weights.publish import Published, publish

WEIGHTS = dict(
    average='the moving average',
    trained='as they were trained, not the average',
    only='the only ones (the checkpoint keeps no average beside them)',
)


def describe(done: Published) -> list[str]:
    lines = [
        f'{done.file}{" (was there already)" if done.existed else ""}',
        f'size: {done.before / 1e6:.2f} MB before, {done.after / 1e6:.2f} MB after',
        f'tensors: {done.tensors}, {done.halves} of them float16',
        f'weights: {WEIGHTS[done.weights]}',
        f'left out: {", ".join(done.left_out) or "nothing"}',
    ]
    if done.overflowing:
        lines.append(f'too large for float16, left as they were: {", ".join(done.overflowing)}')
    return lines


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **options.example('tools/publish_model.py work_dirs/CONFIG/epoch_12.pth model.pth --half'),
    )
    parser.add_argument('checkpoint', metavar='CKPT', help='checkpoint file')
    parser.add_argument(
        'out',
        metavar='OUT',
        help='.pth or .safetensors file: a/model.pth is written as a/model-1a2b3c4d.pth',
    )
    parser.add_argument(
        '--no-ema',
        action='store_true',
        help='of a run with EMAHook take the weights as they were trained, not the average',
    )
    parser.add_argument(
        '--half',
        action='store_true',
        help='store tensors of two and more dimensions as float16',
    )
    args = parser.parse_args()
    done = publish(args.checkpoint, args.out, averaged=not args.no_ema, half=args.half)
    console = Console()
    for line in describe(done):
        console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)


if __name__ == '__main__':
    main()
