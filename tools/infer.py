"""Draw a trained model's predictions on images, and write them in COCO's format.

DIR/pictures gets a picture of each image, with boxes, masks or a segmentation;
DIR/predictions.json is a data set in COCO's format whose annotations have scores. An image that
cannot be read is named and left out, and the exit status is then 1.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from mmdense import cli as options
from mmdense.apis import Predictor
from mmdense.apis.predict import PICTURES, PREDICTIONS, find_images, save_predictions
from mmdense.cli import report_errors
from mmdense.config.read import load_config
from mmdense.files import check_writable


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **options.example('tools/infer.py CONFIG CHECKPOINT data/digits/val --out predictions'),
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument(
        'images', nargs='+', metavar='IMAGE_OR_FOLDER', help='folders are searched to the bottom'
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='where results go')
    parser.add_argument(
        '--score',
        type=float,
        default=0.3,
        help='lowest score of an instance that is drawn and written, 0 to 1 (%(default)s)',
    )
    parser.add_argument('--device', help="such as cpu or cuda:1 (the GPU if there's one)")
    parser.add_argument(
        '--deploy', action='store_true', help="run the backbone's fastest form: same predictions"
    )
    options.add_min_loaded(parser, of="model's")
    options.add_cfg_options(parser)
    args = parser.parse_args()
    if not 0 <= args.score <= 1:
        parser.error(f'--score {args.score} is not from 0 to 1')
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
    failed = 0
    with Progress(console=Console(stderr=True)) as progress:
        results = save_predictions(predictor, images, args.out, score_thr=args.score)
        for failure in progress.track(results, total=len(images), description='images'):
            if failure:
                failed += 1
                progress.console.print(
                    f'left out: {failure}', markup=False, highlight=False, soft_wrap=True
                )
    skipped = f', {failed} left out' if failed else ''
    Console().print(
        f'{len(images) - failed} images{skipped}; '
        f'pictures: {args.out}/{PICTURES}; predictions: {args.out}/{PREDICTIONS}',
        markup=False,
        soft_wrap=True,
    )
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
