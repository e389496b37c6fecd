"""Write weights of other projects with the keys of mmdense."""

from argparse import ArgumentParser

from rich.console import Console

from mmdense import cli as options
from mmdense.apis.convert import convert_weights
from mmdense.cli import report_errors
from mmdense.config.read import load_config
from mmdense.weights.formats import FORMATS


@report_errors
def main() -> None:
    parser = ArgumentParser(
        description=__doc__,
        **options.example('tools/convert_weights.py timm://rdnet_tiny.nv_in1k rdnet-t.safetensors'),
    )
    parser.add_argument('source', help='file, URL, or a scheme such as timm://NAME')
    parser.add_argument('target', help='new file, .pth or .safetensors')
    parser.add_argument(
        '--from',
        dest='format',
        choices=list(FORMATS),
        help='format of the source (recognised by its keys; docs/weights.md lists them)',
    )
    parser.add_argument('--prefix', help="take the source's keys that begin so, without it")
    parser.add_argument('--config', help='model, or model of the backbone, that must be filled')
    parser.add_argument(
        '--check',
        action='store_true',
        help="compare the maps with those of the source's network, where it is installed",
    )
    args = parser.parse_args()
    done = convert_weights(
        args.source,
        args.target,
        format_name=args.format,
        prefix=args.prefix,
        config=load_config(args.config) if args.config else None,
        check=args.check,
    )
    console = Console(soft_wrap=True)
    console.print(
        f'{args.target}: {done.tensors} tensors from the format {done.format}; left out: '
        f'{", ".join(done.dropped) or "nothing"}',
        markup=False,
    )
    if not done.report and not done.compared:
        console.print('whether these fill a network was not checked: --config or --check does')
    if done.report:
        console.print(f'{done.report.model}:\n{done.report.table()}', highlight=False, markup=False)
    if done.compared:
        differences = ', '.join(f'{difference:.1e}' for difference in done.differences)
        console.print(f'maps of {done.compared} differ by {differences} of their largest value')


if __name__ == '__main__':
    main()
