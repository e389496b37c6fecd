"""Say how much memory one run of a contender takes, in a process of its own (Linux)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from dev.benchmark.compare import Contender, Setting

STATUS, CLEAR = Path('/proc/self/status'), Path('/proc/self/clear_refs')


def resident(what: str) -> int:
    """Return bytes: 'VmRSS' of now, 'VmHWM' of the peak."""
    return int(re.search(rf'{what}:\s+(\d+) kB', STATUS.read_text())[1]) * 1024


def main() -> None:
    task = json.loads(sys.argv[1])
    task['setting']['size'] = tuple(task['setting']['size'])
    contender, setting = Contender(**task['contender']), Setting(**task['setting'])
    run = contender.runner(contender.build(setting), setting)
    CLEAR.write_text('5')  # the peak begins here
    before = resident('VmRSS')
    run()
    sys.stdout.write(f'{resident("VmHWM") - before}\n')


if __name__ == '__main__':
    main()
