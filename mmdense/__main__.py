"""Run a script with mmdense imported first: ``python -m mmdense SCRIPT [arguments]``.

For scripts that import ``mmcv.ops`` before they read a config with ``custom_imports``, such as
mmdet's own ``test.py``.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script that the command line names, as Python itself would."""
    if len(sys.argv) < 2:
        sys.exit(__doc__.splitlines()[0].replace('``', ''))
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
