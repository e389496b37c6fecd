"""Train a detector or a segmentor."""

import argparse

from mmengine.config import DictAction

from mmdense.apis import config, report_errors, run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='where logs and checkpoints go (work_dirs/<config>)')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CKPT',
        help='go on from this checkpoint, or from the latest one in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision (plain on a CPU)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the real over the config's base batch size",
    )
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
    if args.amp:
        config.use_amp(cfg)
    if args.auto_scale_lr:
        config.use_auto_scale_lr(cfg)
    config.use_checkpoint(cfg, args.resume)
    run.build_runner(cfg, loaders=('train', 'val')).train()


if __name__ == '__main__':
    main()
