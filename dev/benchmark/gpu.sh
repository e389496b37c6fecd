#!/usr/bin/env bash
# Check and time mmdense on a GPU, in 8 minutes at most; --help lists the options, --dry needs no GPU.
#   dev/benchmark/gpu.sh [--dry] [--limit SECONDS] [--parts NAME...] [--json FILE]
# PYTHON is the interpreter (.venv/bin/python); COMMIT names the commit where git is not installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-$root/.venv/bin/python}" -m dev.benchmark gpu "$@"
