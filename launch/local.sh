#!/usr/bin/env bash
# One run on this machine, with one process per GPU (or NPROC processes on a CPU):
#   launch/local.sh attention=kha_mlp engine=zero2 data.global_batch_size=64        NPROC=2 launch/local.sh run.steps=50
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
KHA_PYTHON="${KHA_PYTHON:-python}"
check_python
nproc_per_node="${NPROC:-$("$KHA_PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
exec "$KHA_PYTHON" -m kha_train --ranks "$nproc_per_node" "$@"
