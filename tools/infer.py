"""Predict on images, and save the predictions as pictures and in COCO's format.

DIR/pictures gets a picture per image, with boxes, masks or a segmentation, and DIR/label_maps a
segmentor's label maps. DIR/predictions.json is a data set in COCO's format whose annotations have
scores. Images that cannot be read are reported and skipped, and the exit status is then 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from mmdense import cli
from mmdense.apis import Predictor, find_images, save_predictions
from mmdense.config.read import load_config
from mmdense.files import check_writable
from mmdense.runtime.results import PREDICTIONS, describe_files


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **cli.example('tools/infer.py CONFIG CHECKPOINT data/digits/val --out predictions'),
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument(
        'images', nargs='+', metavar='IMAGE_OR_FOLDER', help='folders are searched recursively'
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='output folder')
    cli.add_score(parser, 0.3, 'drawn and written')
    parser.add_argument('--device', help="such as cpu or cuda:1 (the GPU if there's one)")
    parser.add_argument(
        '--deploy', action='store_true', help="use the backbone's fastest form: same predictions"
    )
    cli.add_min_loaded(parser, of="model's")
    cli.add_cfg_options(parser)
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    cfg = load_config(args.config, options=args.cfg_options)
    images = find_images(args.images, args.out)
    check_writable(Path(args.out, PREDICTIONS))
    predictor = Predictor(
        cfg,
        args.checkpoint,
        device=args.device,
        deploy=args.deploy,
        min_loaded=args.min_loaded,
    )
    skipped = 0
    with Progress(console=Console(stderr=True)) as progress:
        results = save_predictions(predictor, images, args.out, score_thr=args.score)
        for failure in progress.track(results, total=len(images), description='images'):
            if failure:
                skipped += 1
                progress.console.print(
                    f'skipped: {failure}', markup=False, highlight=False, soft_wrap=True
                )
    line = describe_files(predictor, len(images), skipped, args.out)
    Console().print(line, markup=False, soft_wrap=True)
    sys.exit(1 if skipped else 0)


if __name__ == '__main__':
    main()
