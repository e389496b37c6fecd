"""Convert weights of other projects to a file with mmdense's keys."""

import argparse
from collections.abc import Sequence

from rich.console import Console

from mmdense import cli
from mmdense.apis.convert import convert_weights
from mmdense.config.read import load_config
from mmdense.weights.formats import FORMATS


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **cli.example('tools/convert_weights.py timm://rdnet_tiny.nv_in1k rdnet-t.safetensors'),
    )
    parser.add_argument('source', help='file, URL, or a scheme such as timm://NAME')
    parser.add_argument('target', help='new file, .pth or .safetensors')
    parser.add_argument(
        '--from',
        dest='format',
        choices=list(FORMATS),
        help='format of the source, as listed in docs/weights.md (recognised by its keys)',
    )
    parser.add_argument(
        '--prefix', help="convert the source's keys with this prefix, and remove it"
    )
    parser.add_argument('--config', help='model that the weights must fill, or its backbone')
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    converted = convert_weights(
        args.source,
        args.target,
        format=args.format,
        prefix=args.prefix,
        config=load_config(args.config) if args.config else None,
    )
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    console.print(
        f'{args.target}: {converted.tensors} tensors from the format {converted.format}; left out: '
        f'{", ".join(converted.dropped) or "nothing"}'
    )
    if converted.report:
        console.print(f'{converted.report.model}:\n{converted.report.table()}')
    else:
        console.print('not checked whether they fill a network: add --config CONFIG')


if __name__ == '__main__':
    main()
