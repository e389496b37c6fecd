#!/usr/bin/env bash
# Train under Slurm: tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]
# GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS come from the environment.
set -euo pipefail
if [ $# -lt 4 ]; then sed -n 2,3p "$0" >&2; exit 2; fi
per_node=${GPUS_PER_NODE:-8}
# SRUN_ARGS holds several words on purpose.
# shellcheck disable=SC2086
exec srun --partition "$1" --job-name "$2" --gres "gpu:$per_node" --ntasks "${GPUS:-8}" \
    --ntasks-per-node "$per_node" --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$3" --work-dir "$4" --launcher slurm "${@:5}"
