"""Check a config's data before training: decode every image and label map, read every annotation.

Errors stop training or make the model learn something wrong; warnings list what is ignored,
clipped or changed. The exit status is 1 if there are errors.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmdense import cli
from mmdense.config.evaluators import check_metric_files
from mmdense.config.read import load_config
from mmdense.config.validate import check_prefixes
from mmdense.datasets.check import ERROR, Finding
from mmdense.datasets.files import check_files, list_files
from mmdense.errors import UserError, positive
from mmdense.files import check_writable

LOADERS = ('train', 'val', 'test')
EXAMPLES = 3  # of each kind, in the terminal


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **cli.example('tools/check_dataset.py CONFIG --loaders train val --json findings.json'),
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--loaders',
        nargs='+',
        choices=LOADERS,
        default=LOADERS,
        help='data loaders to check (all)',
    )
    parser.add_argument('--json', metavar='FILE', help='write all findings to this file')
    parser.add_argument(
        '--workers',
        type=positive,
        default=os.cpu_count(),
        help='processes that decode images (%(default)s)',
    )
    cli.add_cfg_options(parser)
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.json:
        check_writable(Path(args.json))
    cfg = load_config(args.config, options=args.cfg_options)
    check_prefixes(cfg, args.loaders)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task('annotations', total=None)
        findings, files = list_files(cfg, args.loaders)
        try:
            check_metric_files(cfg, args.loaders)
        except UserError as error:
            findings.append(Finding('wrong setting', args.config, str(error)))
        progress.update(task, total=1, completed=1)
        results = check_files(files, args.workers)
        for more in progress.track(results, total=len(files), description='images'):
            findings += more
    findings = list(dict.fromkeys(findings))
    if args.json:
        rows = [dict(dataclasses.asdict(f), severity=f.severity, fix=f.fix) for f in findings]
        Path(args.json).write_text(json.dumps(rows, indent=1))
    print_summary(findings, len(files))
    sys.exit(any(finding.severity == ERROR for finding in findings))


def print_summary(findings: list[Finding], count: int) -> None:
    """Print examples of each kind of finding, errors first, and a table of all kinds."""
    console = Console()
    kinds = defaultdict(list)
    for finding in sorted(findings, key=lambda finding: finding.severity):
        kinds[finding.kind].append(finding)
    table = Table('severity', 'kind', 'count', 'fix')
    for kind, group in kinds.items():
        console.print(f'{group[0].severity}: {kind}', markup=False)
        for finding in group[:EXAMPLES]:
            console.print(f'  {finding}', markup=False, highlight=False, soft_wrap=True)
        if len(group) > EXAMPLES:
            console.print(f'  and {len(group) - EXAMPLES} more', markup=False)
        table.add_row(group[0].severity, kind, str(len(group)), group[0].fix)
    if findings:
        console.print(table, markup=False)
    errors = sum(finding.severity == ERROR for finding in findings)
    console.print(f'{count} images: {errors} errors, {len(findings) - errors} warnings')


if __name__ == '__main__':
    main()
