"""What the command lines have in common."""

from __future__ import annotations

import argparse

from mmengine.config import Config, DictAction

from mmdense.apis.config import load_config

__all__ = ['config_parser', 'parse_config']


def config_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser for a command on a config file; the command adds its own arguments."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='logs and checkpoints (work_dirs/<config>)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config; data_root=FOLDER moves all data sets',
    )
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='how the processes were started (%(default)s)',
    )
    return parser


def parse_config(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Config]:
    """Parse the command line and read the config that it names.

    Raises:
        UserError: As :func:`.load_config`.
    """
    args = parser.parse_args()
    cfg = load_config(
        args.config, options=args.cfg_options, work_dir=args.work_dir, launcher=args.launcher
    )
    return args, cfg
