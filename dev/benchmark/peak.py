"""Print the peak memory of one run, in bytes: started by compare.peak_memory (Linux only)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from dev.benchmark.compare import Contender, Setting

STATUS, CLEAR = Path('/proc/self/status'), Path('/proc/self/clear_refs')


def resident(field: str) -> int:
    """Return resident memory in bytes: 'VmRSS' (now) or 'VmHWM' (peak)."""
    return int(re.search(rf'{field}:\s+(\d+) kB', STATUS.read_text())[1]) * 1024


def main() -> None:
    task = json.loads(sys.argv[1])
    task['setting']['size'] = tuple(task['setting']['size'])
    contender, setting = Contender(**task['contender']), Setting(**task['setting'])
    run = contender.runner(contender.build(setting), setting)
    CLEAR.write_text('5')  # resets the peak
    before = resident('VmRSS')
    run()
    sys.stdout.write(f'{resident("VmHWM") - before}\n')


if __name__ == '__main__':
    main()
