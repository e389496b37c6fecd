"""Test a trained detector or segmentor."""

import argparse

from mmengine.config import DictAction
from rich.console import Console
from rich.table import Table

from mmdense.apis import config, report_errors, run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--work-dir', help='where logs go (work_dirs/<config>)')
    parser.add_argument('--tta', action='store_true', help="augment as the config's tta_* say")
    parser.add_argument(
        '--out',
        metavar='FILE',
        help='predictions: one .pkl file (detection), a folder for label maps (segmentation)',
    )
    parser.add_argument('--show-dir', metavar='DIR', help='save pictures of the predictions there')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config; data_root=FOLDER moves all data sets',
    )
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none')
    return parser.parse_args()


@report_errors
def main() -> None:
    args = parse_args()
    cfg = config.load_config(
        args.config, options=args.cfg_options, work_dir=args.work_dir, launcher=args.launcher
    )
    if args.tta:
        config.use_tta(cfg)
    if args.out:
        config.write_predictions(cfg, args.out)
    if args.show_dir:
        config.use_show_dir(cfg, args.show_dir)
    cfg.load_from = None
    runner = run.build_runner(cfg, loaders=('test',))
    run.load_weights(runner, args.checkpoint)
    metrics = runner.test()
    if runner.rank == 0:
        table = Table('metric', 'value')
        for name, value in metrics.items():
            table.add_row(name, f'{value:.3f}')
        Console().print(table)


if __name__ == '__main__':
    main()
