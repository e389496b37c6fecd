"""Test a trained detector or segmentor."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmdense import cli as options
from mmdense.apis import deploy
from mmdense.cli import report_errors
from mmdense.config import edit as config
from mmdense.engine import runner as run
from mmdense.engine.out_of_memory import explain_out_of_memory


@report_errors
def main() -> None:
    parser = options.config_parser(
        __doc__, 'tools/test.py CONFIG CHECKPOINT --deploy --show-dir pictures'
    )
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    options.add_min_coverage(parser, of="model's")
    parser.add_argument('--tta', action='store_true', help="augment as the config's tta_* say")
    parser.add_argument(
        '--out',
        metavar='FILE',
        help='predictions: one .pkl file (detection), a folder for label maps (segmentation)',
    )
    parser.add_argument(
        '--deploy', action='store_true', help="run the backbone's fastest form: same predictions"
    )
    parser.add_argument('--show-dir', metavar='DIR', help='save pictures of the predictions there')
    args, cfg = options.parse_config(parser)
    if args.tta:
        config.use_tta(cfg)
    if args.out:
        config.write_predictions(cfg, args.out)
    if args.show_dir:
        config.use_show_dir(cfg, args.show_dir)
    cfg.load_from = None
    runner = run.build_runner(cfg, loaders=('test',), min_coverage=args.min_coverage)
    run.load_weights(runner, args.checkpoint)
    if args.deploy:
        deploy(run.unwrap(runner.model))
    with explain_out_of_memory(cfg, 'test'):
        metrics = runner.test()
    if runner.rank == 0:
        table = Table('metric', 'value')
        for name, value in metrics.items():
            table.add_row(escape(name), f'{value:.3f}')
        Console().print(table)


if __name__ == '__main__':
    main()
