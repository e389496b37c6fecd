#!/usr/bin/env bash
# Train on several processes: tools/dist_train.sh CONFIG PROCESSES [options of train.py]
# One machine and any free port; for several set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
set -euo pipefail
if [ $# -lt 2 ]; then sed -n 2,3p "$0" >&2; exit 2; fi
where=(--standalone)
if [ "${NNODES:-1}" -gt 1 ] || [ -n "${PORT:-}" ]; then
    where=(--nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}"
        --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${where[@]}" --nproc_per_node "$2" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
