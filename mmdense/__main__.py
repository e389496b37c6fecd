"""Run a tool or a script with mmdense imported first: ``python -m mmdense TOOL [arguments]``.

A tool is one of tools/, by name: ``python -m mmdense train CONFIG``. Anything else is the path of a
script, such as mmdet's own ``test.py``, which imports ``mmcv.ops`` before it reads a config with
``custom_imports``.
"""

import runpy
import sys
from pathlib import Path

TOOLS = Path(__file__).parent / '.mim/tools'


def main() -> None:
    """Run what the command line names, as Python itself would."""
    if len(sys.argv) < 2:
        tools = ', '.join(sorted(file.stem for file in TOOLS.glob('*.py')))
        sys.exit(f'{__doc__.splitlines()[0].replace("``", "")}\ntools: {tools}')
    del sys.argv[0]
    tool = TOOLS / f'{sys.argv[0]}.py'
    if tool.is_file():
        sys.argv[0] = str(tool)
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
