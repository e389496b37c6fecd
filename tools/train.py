"""Train a detector, a segmentor or a classifier."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from mmdense import cli
from mmdense.config import edit
from mmdense.engine.checkpoint_hook import last_checkpoint
from mmdense.engine.out_of_memory import explain_out_of_memory
from mmdense.engine.resume import use_checkpoint
from mmdense.engine.runner import build_runner


def parser() -> argparse.ArgumentParser:
    parser = cli.config_parser(__doc__, 'tools/train.py CONFIG --amp --resume')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CKPT',
        help='resume from this checkpoint, or from the latest one in the work dir',
    )
    parser.add_argument(
        '--load-from', metavar='CKPT', help='start from the weights of a complete model'
    )
    cli.add_min_loaded(parser, of="backbone's")
    parser.add_argument(
        '--amp', action='store_true', help="mixed precision, of the recipe's type or float16"
    )
    parser.add_argument(
        '--amp-dtype',
        choices=('float16', 'bfloat16'),
        help='mixed precision of this type (a CPU has bfloat16 only, and float32 otherwise)',
    )
    parser.add_argument(
        '--channels-last', action='store_true', help='use the channels-last memory format'
    )
    parser.add_argument(
        '--compile-backbone',
        action='store_true',
        help='compile the backbone, which takes minutes at the start',
    )
    parser.add_argument(
        '--tensorboard', action='store_true', help='log to TensorBoard too, in the work dir'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by actual / base batch size, the config's auto_scale_lr",
    )
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args, cfg = cli.parse_config(parser(), argv)
    if args.amp or args.amp_dtype:
        edit.use_amp(cfg, args.amp_dtype)
    if args.channels_last:
        edit.use_hook(cfg, 'mmdense.ChannelsLastHook')
    if args.compile_backbone:
        edit.use_compiled_backbone(cfg)
    if args.tensorboard:
        edit.use_tensorboard(cfg)
    if args.auto_scale_lr:
        edit.use_auto_scale_lr(cfg)
    use_checkpoint(cfg, args.resume, args.load_from, args.min_loaded)
    with explain_out_of_memory(cfg, 'train'):
        runner = build_runner(cfg, loaders=('train', 'val'), min_loaded=args.min_loaded)
        runner.logger.info(describe(runner))
        runner.train()
    if last := last_checkpoint(cfg.work_dir):
        runner.logger.info(f'checkpoint: {os.path.relpath(last)}')


def describe(runner: Any) -> str:
    """Return what a run trains, on which data, for how long, and where it writes."""
    cfg, loop = runner.cfg, runner.train_loop
    loader, optimizer = loop.dataloader, cfg.optim_wrapper.get('optimizer') or {}
    kinds = [part['type'] for part in (cfg.model, cfg.model.get('backbone')) if part]
    processes = f' x {runner.world_size} processes' if runner.world_size > 1 else ''
    validation = f', {len(runner.val_dataloader.dataset)} to validate' if runner.val_loop else ''
    plural = 's' * (loop.max_epochs != 1)
    epochs = f'{loop.max_epochs} epoch{plural}, ' if 'max_epochs' in cfg.train_cfg else ''
    rate = f', {optimizer.type}, lr {optimizer.get("lr")}' if optimizer else ''
    return (
        'training\n'
        f'  model     {", backbone ".join(map(str, kinds))}\n'
        f'  data      {len(loader.dataset)} images in batches of '
        f'{loader.batch_sampler.batch_size}{processes}{validation}\n'
        f'  schedule  {epochs}{loop.max_iters} iterations{rate}\n'
        f'  work dir  {cfg.work_dir}\n'
        f'  log file  {os.path.relpath(runner.log_dir)}/{runner.timestamp}.log'
    )


if __name__ == '__main__':
    main()
