"""Write every generated document, metafile and table, or check that they are up to date."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from mmengine.logging import MMLogger

from dev.docs.counts import ROOT
from dev.docs.pages import files
from mmdense.cli import example


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m dev.docs', description=__doc__, **example('-m dev.docs --check')
    )
    parser.add_argument(
        '--check', action='store_true', help='write nothing; exit with 1 if a file is out of date'
    )
    args = parser.parse_args(argv)
    MMLogger.get_instance('docs', log_level='ERROR')
    warnings.filterwarnings('ignore', module='mmseg')
    outdated = []
    for name, text in files():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding='utf-8') != text:
            outdated.append(name)
            if not args.check:
                path.write_text(text, encoding='utf-8')
    if outdated and args.check:
        sys.stderr.write(f'out of date: {", ".join(outdated)}; run python -m dev.docs\n')
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
