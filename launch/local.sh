#!/usr/bin/env bash
# One run on this machine, one process a GPU (or NPROC processes on a CPU):
#   launch/local.sh attention=kha_mlp engine=zero2 data.global_batch_size=64        NPROC=2 launch/local.sh run.steps=50
set -euo pipefail
python="${KHA_PYTHON:-python}"
nproc_per_node="${NPROC:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$nproc_per_node" -m kha_train "$@"
