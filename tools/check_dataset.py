"""Find what is wrong with a config's data before training stops at it, or learns from it.

Every image and label map is decoded, every annotation is looked at. Errors stop training, or teach
it what isn't so; warnings say what is left out, cut off or changed. The exit status is 1 if there
are errors.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmdense import cli as options
from mmdense.cli import report_errors
from mmdense.config.read import load_config
from mmdense.datasets.check import ERROR, Finding
from mmdense.datasets.files import check_files, list_files
from mmdense.files import check_writable

LOADERS = ('train', 'val', 'test')
SHOWN = 3  # of each kind


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **options.example('tools/check_dataset.py CONFIG --loaders train val --json findings.json'),
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--loaders',
        nargs='+',
        choices=LOADERS,
        default=LOADERS,
        help='whose data are looked at (all)',
    )
    parser.add_argument('--json', metavar='FILE', help='write all that is found there')
    parser.add_argument(
        '--workers',
        type=int,
        default=os.cpu_count(),
        help='processes that decode images (%(default)s)',
    )
    options.add_cfg_options(parser)
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f'--workers {args.workers} is not positive')
    if args.json:
        check_writable(Path(args.json))
    cfg = load_config(args.config, options=args.cfg_options)
    with Progress(console=Console(stderr=True)) as progress:
        reading = progress.add_task('annotations', total=None)
        found, files = list_files(cfg, args.loaders)
        progress.update(reading, total=1, completed=1)
        checked = check_files(files, args.workers)
        for wrong in progress.track(checked, total=len(files), description='images'):
            found += wrong
    found = list(dict.fromkeys(found))
    if args.json:
        rows = [dict(dataclasses.asdict(f), severity=f.severity, fix=f.fix) for f in found]
        Path(args.json).write_text(json.dumps(rows, indent=1))
    sys.exit(_report(found, len(files)))


def _report(found: list[Finding], count: int) -> int:
    """Print what was found by its kind, errors first, and return the exit status."""
    console = Console()
    kinds = defaultdict(list)
    for finding in sorted(found, key=lambda finding: finding.severity):
        kinds[finding.kind].append(finding)
    table = Table('severity', 'kind', 'count', 'what can be done')
    for kind, findings in kinds.items():
        console.print(f'{findings[0].severity}: {kind}', markup=False)
        for finding in findings[:SHOWN]:
            console.print(f'  {finding}', markup=False, highlight=False, soft_wrap=True)
        if len(findings) > SHOWN:
            console.print(f'  and {len(findings) - SHOWN} more', markup=False)
        table.add_row(findings[0].severity, kind, str(len(findings)), findings[0].fix)
    if found:
        console.print(table, markup=False)
    errors = sum(finding.severity == ERROR for finding in found)
    console.print(f'{count} images: {errors} errors, {len(found) - errors} warnings')
    return 1 if errors else 0


if __name__ == '__main__':
    main()
