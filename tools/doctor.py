"""Say what is wrong with an installation, and the command that mends it.

Looks at versions and whether they fit, at imports, operators, GPUs and the machine, and with
--config at a config's data and weights. It needs nothing but Python, so it runs whatever is broken.
Ends with status 1 if there is an error; warnings are what works, though not as well as it could.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path


def load_doctor():
    """Return mmdense/doctor.py, without its package, which may be what is broken."""
    file = Path(__file__).resolve().parents[1] / 'mmdense/doctor.py'
    spec = importlib.util.spec_from_file_location('mmdense_doctor', file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printer():
    """Return what prints a line in a colour: rich, or plain text without it."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return lambda text, style: sys.stdout.write(f'{text}\n')
    console = Console(soft_wrap=True)
    return lambda text, style: console.print(Text(text, style))


COLOURS = dict(ok='green', warning='yellow', error='red')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example:\n  python tools/doctor.py --config CONFIG',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--config', help='config file whose data and weights to look for')
    parser.add_argument('--json', action='store_true', help='print a JSON document')
    args = parser.parse_args()
    doctor = load_doctor()
    findings = doctor.examine(args.config)
    if args.json:
        found = dict(versions=doctor.versions(), findings=[vars(one) for one in findings])
        sys.stdout.write(json.dumps(found, indent=2) + '\n')
    else:
        show = printer()
        for finding in findings:
            show(f'{finding.level:8} {finding.check}: {finding.says}', COLOURS[finding.level])
            if finding.mend:
                show(f'{"":8} mend it by: {finding.mend}', '')
    sys.exit(any(finding.level == 'error' for finding in findings))


if __name__ == '__main__':
    main()
