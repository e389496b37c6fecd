"""Train a detector or a segmentor."""

from mmdense import cli as options
from mmdense.cli import report_errors
from mmdense.config import edit as config
from mmdense.engine import resume
from mmdense.engine import runner as run
from mmdense.engine.out_of_memory import explain_out_of_memory


@report_errors
def main() -> None:
    parser = options.config_parser(__doc__, 'tools/train.py CONFIG --amp --resume')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CKPT',
        help='go on from this checkpoint, or from the latest one in the work dir',
    )
    parser.add_argument(
        '--load-from', metavar='CKPT', help='start from the weights of a whole model'
    )
    options.add_min_coverage(parser, of="backbone's")
    parser.add_argument(
        '--amp', action='store_true', help="mixed precision, of the recipe's type or float16"
    )
    parser.add_argument(
        '--amp-dtype',
        choices=('float16', 'bfloat16'),
        help='mixed precision of this type; on a CPU bfloat16 alone, else plain float32',
    )
    parser.add_argument(
        '--channels-last', action='store_true', help='run the model in this memory format'
    )
    parser.add_argument(
        '--compile-backbone',
        action='store_true',
        help='train with the backbone compiled, which takes minutes at the start',
    )
    parser.add_argument(
        '--tensorboard', action='store_true', help='log to TensorBoard too, in the work dir'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the real over the config's base batch size",
    )
    args, cfg = options.parse_config(parser)
    if args.amp or args.amp_dtype:
        config.use_amp(cfg, args.amp_dtype)
    if args.channels_last:
        config.use_channels_last(cfg)
    if args.compile_backbone:
        config.use_compiled_backbone(cfg)
    if args.tensorboard:
        config.use_tensorboard(cfg)
    if args.auto_scale_lr:
        config.use_auto_scale_lr(cfg)
    resume.use_checkpoint(cfg, args.resume, args.load_from, args.min_coverage)
    with explain_out_of_memory(cfg, 'train'):
        run.build_runner(cfg, loaders=('train', 'val'), min_coverage=args.min_coverage).train()


if __name__ == '__main__':
    main()
