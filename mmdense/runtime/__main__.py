"""Predict on images by an exported model, and save pictures and COCO results, as infer.py does."""

import argparse
import sys
from collections.abc import Sequence

from mmdense.errors import UserError, positive, printable, share
from mmdense.runtime.images import find_images
from mmdense.runtime.models import open_model
from mmdense.runtime.results import describe_files, save_predictions
from mmdense.runtime.session import PACKAGES


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the exit status is 1 if images were skipped."""
    parser = argparse.ArgumentParser('python -m mmdense.runtime', description=__doc__)
    parser.add_argument('model', metavar='MODEL.onnx', help='from tools/export_onnx.py')
    parser.add_argument('images', nargs='+', metavar='IMAGE_OR_FOLDER')
    parser.add_argument('--out', required=True, metavar='DIR', help='output folder')
    text = 'lowest score of the instances that are drawn and written, 0 to 1 (%(default)s)'
    parser.add_argument('--score', type=share, default=0.3, help=text)
    parser.add_argument('--batch', type=positive, default=1, help='images at once (%(default)s)')
    parser.add_argument('--threads', type=positive, help='on the CPU (one for each core)')
    parser.add_argument('--provider', choices=PACKAGES, default='cpu', help='(%(default)s)')
    args = parser.parse_args(argv)
    skipped = 0
    try:
        images = find_images(args.images, args.out)
        options = dict(provider=args.provider, threads=args.threads, batch=args.batch)
        model = open_model(args.model, **options)
        for failure in save_predictions(model, images, args.out, score_thr=args.score):
            if failure:
                skipped += 1
                sys.stderr.write(f'skipped: {printable(failure)}\n')
    except UserError as error:
        sys.stderr.write(f'error: {printable(str(error))}\n')
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write('interrupted\n')
        sys.exit(130)
    sys.stdout.write(f'{describe_files(model, len(images), skipped, args.out)}\n')
    sys.exit(1 if skipped else 0)


if __name__ == '__main__':
    main()
