#!/usr/bin/env bash
# Send the files of offline runs to W&B, from a machine with a network (a login node):
#   launch/sync_wandb.sh runs/kha_mlp-s0 [RUN_DIR ...]
# Every attempt of a run is one folder. They belong to one W&B run and must be sent in the order they were started, which
# is the order of their names.
set -euo pipefail
if (($# == 0)); then
    echo "usage: $0 RUN_DIR [RUN_DIR ...]" >&2
    exit 2
fi
for run_dir in "$@"; do
    folders=()
    for folder in "$run_dir"/wandb/offline-run-*; do # a pattern expands in sorted order
        [[ -d $folder ]] && folders+=("$folder")
    done
    if ((${#folders[@]} == 0)); then
        echo "$run_dir: nothing to send" >&2
        continue
    fi
    echo "$run_dir: ${#folders[@]} attempt(s)" >&2
    "${WANDB:-wandb}" sync "${folders[@]}"
done
