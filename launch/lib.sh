#!/usr/bin/env bash
# What train.sbatch and sweep.sbatch share: from a job's allocation to one `srun torchrun` a node, and from how that
# ended to "done", "again" or "never again". Sourced, never run.
#
# How a run ended is told by files in its directory, because exit codes do not pass through torchrun:
#   DONE      all steps are trained             -> the job ends with 0
#   REQUEUE   saved and stopped in good order   -> the job requeues itself (not when the user made the file STOP)
#   FATAL     an error that would come back     -> the job ends with the trainer's code, and is never requeued
#   none      a crash                           -> requeued while checkpoints advance, else ends with srun's code
# The trainer's own exit code lies in the file $KHA_EXIT_FILE of the attempt.
#
# Settings (environment; see site/example.env):
#   KHA_PYTHON             interpreter of the environment kha_train is installed in (default: python)
#   KHA_SITE               file sourced at the job's start: modules, network, W&B
#   KHA_NPROC              ranks a node (default: the node's GPUs, else 1)
#   KHA_MAX_REQUEUES       restarts after which a job gives up (default: 100)
#   KHA_MAX_RESTARTS       restarts of all workers inside a job before it counts as crashed (default: 0)

KHA_REQUEUE_CODE=85
KHA_AGENT='trap "" USR1 USR2; exec "$@"' # an ignored signal stays ignored after exec: torchrun would die of it

say() {
    printf 'kha: %s\n' "$*" >&2
}

restarts() {
    printf '%s' "${SLURM_RESTART_COUNT:-0}"
}

# The job as scontrol must name it: the last element of an array has the array's own number as its job id, and
# `scontrol requeue` of that number would requeue every element.
job_name() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        printf '%s_%s' "$SLURM_ARRAY_JOB_ID" "$SLURM_ARRAY_TASK_ID"
    else
        printf '%s' "$SLURM_JOB_ID"
    fi
}

first_host() {
    local host
    read -r host < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    printf '%s' "$host"
}

# A port that two jobs on one node, or two lives of one job, are unlikely to share.
rendezvous_port() {
    printf '%s' "$((20000 + (SLURM_JOB_ID + $(restarts) * 7919) % 10000))"
}

ranks_per_node() {
    printf '%s' "${KHA_NPROC:-${SLURM_GPUS_ON_NODE:-1}}"
}

# Settings of the libraries, unless the site file made them. $1: the directory of this attempt.
export_library_settings() {
    export PYTHONFAULTHANDLER=1 TORCH_FORCE_WEIGHTS_ONLY_LOAD=1
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_ON_NODE:-1} / $(ranks_per_node)))}"
    ((OMP_NUM_THREADS > 0)) || OMP_NUM_THREADS=1
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
    # The flight recorder: the last collectives of every rank, written after a time-out.
    export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=20000
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$1/flight_recorder/rank_" TORCH_FR_DUMP_TEMP_FILE="$1/flight_recorder/rank_"
    export TORCHELASTIC_ERROR_FILE="$1/error.json" KHA_EXIT_FILE="$1/exit_code"
    # Without it a restart inside the job reads the addresses of the dead workers out of the shared store.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"
}

# The step of the newest published checkpoint of the run directory $1; 0 without one.
newest_step() {
    local newest=0 path step
    for path in "$1"/checkpoints/step-*; do
        step="${path##*/step-}"
        [[ $step =~ ^[0-9]+$ ]] || continue
        ((10#$step > newest)) && newest=$((10#$step))
    done
    printf '%s' "$newest"
}

# Called by the traps: the workers finish their step, save and leave; they also see the file if the signal came before
# they could listen. srun passes the signal on to every process of the step.
on_signal() {
    KHA_STOPPING=1
    say "asked to stop: saving, then requeue"
    [[ -z ${KHA_RUN_DIR:-} ]] || : >"$KHA_RUN_DIR/STOP"
    [[ -z ${KHA_SRUN_PID:-} ]] || kill -USR2 "$KHA_SRUN_PID" 2>/dev/null || true
}

# Wait for the process $1 although signals arrive meanwhile; its exit code in KHA_CODE.
wait_for() {
    local last
    KHA_CODE=0
    while kill -0 "$1" 2>/dev/null; do
        KHA_CODE=0
        wait "$1" || KHA_CODE=$?
    done
    # The last wait may have been cut short by a signal; 127: the shell gave the true code out already.
    last=0
    wait "$1" || last=$?
    ((last == 127)) || KHA_CODE=$last
}

# Give the job back to SLURM to be started again, or end with $1 where that is not possible.
requeue() {
    local code="$1"
    if (($(restarts) >= ${KHA_MAX_REQUEUES:-100})); then
        say "not requeued: $(restarts) restarts already (KHA_MAX_REQUEUES)"
        exit "$((code ? code : 1))"
    fi
    if scontrol requeue "$(job_name)"; then
        say "requeued"
        exit 0
    fi
    if scontrol show config | grep -Eq "^RequeueExit +=.*\b$KHA_REQUEUE_CODE\b"; then
        exit "$KHA_REQUEUE_CODE"
    fi
    say "this site does not let a job requeue itself: submit the same command again, it goes on from the checkpoint"
    exit "$((code ? code : 1))"
}

# What the end of srun (code KHA_CODE) means. $1: directory of the attempt, $2: newest checkpoint at its start.
conclude() {
    local own='' newest
    newest="$(newest_step "$KHA_RUN_DIR")"
    [[ -s $1/exit_code ]] && read -r own <"$1/exit_code"
    [[ $own =~ ^[0-9]+$ ]] || own=''
    if [[ $own =~ ^[2-6]$ ]]; then
        say "ended with code $own: not requeued"
        exit "$own"
    fi
    if [[ -e $KHA_RUN_DIR/DONE ]]; then
        say "done"
        exit 0
    fi
    if [[ -e $KHA_RUN_DIR/FATAL ]]; then
        say "FATAL: $(head -c 1000 "$KHA_RUN_DIR/FATAL")"
        exit "${own:-1}"
    fi
    if [[ -e $KHA_RUN_DIR/REQUEUE && -z ${KHA_STOPPING:-} ]] && grep -q 'the STOP file' "$KHA_RUN_DIR/REQUEUE"; then
        say "stopped by the file STOP: submit the same command again to go on"
        exit 0
    fi
    if [[ -e $KHA_RUN_DIR/REQUEUE || -n ${KHA_STOPPING:-} ]]; then
        requeue 0
    fi
    if ((newest > $2)); then
        say "crashed with code $KHA_CODE after new checkpoints (now step $newest)"
        requeue "$((KHA_CODE ? KHA_CODE : 1))"
    fi
    say "crashed with code $KHA_CODE and no new checkpoint: not requeued"
    exit "$((own ? own : KHA_CODE ? KHA_CODE : 1))"
}

# Train in the allocation of this job. $1: run directory, the rest: overrides. Never returns.
train_in_allocation() {
    local attempt before nodes
    KHA_RUN_DIR="$1"
    shift
    attempt="$KHA_RUN_DIR/launch/$SLURM_JOB_ID.$(restarts)"
    nodes="$SLURM_JOB_NUM_NODES"
    mkdir -p "$attempt/flight_recorder"
    if [[ -e $KHA_RUN_DIR/DONE ]]; then
        say "$KHA_RUN_DIR is done already"
        exit 0
    fi
    rm -f "$KHA_RUN_DIR/STOP" "$KHA_RUN_DIR/REQUEUE" "$KHA_RUN_DIR/FATAL"
    before="$(newest_step "$KHA_RUN_DIR")"
    export_library_settings "$attempt"
    [[ -z ${KHA_STOPPING:-} ]] || requeue 0
    say "job $(job_name), start $(restarts) after step $before, $nodes nodes x $(ranks_per_node) ranks, $KHA_RUN_DIR"
    # In the background, because a trap waits for a foreground command.
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 \
        bash -c "$KHA_AGENT" agent "$KHA_PYTHON" -m torch.distributed.run \
        --nnodes="$nodes" --nproc-per-node="$(ranks_per_node)" --max-restarts="${KHA_MAX_RESTARTS:-0}" \
        --rdzv-backend=c10d --rdzv-endpoint="$(first_host):$(rendezvous_port)" \
        --rdzv-id="$SLURM_JOB_ID.$(restarts)" --log-dir="$attempt/logs" --tee=3 \
        -m kha_train "$@" &
    KHA_SRUN_PID=$!
    wait_for "$KHA_SRUN_PID"
    conclude "$attempt" "$before"
}

# Fill KHA_ARGUMENTS with the run directory and the overrides that `kha launch-arguments "$@"` answers: they travel
# between NUL bytes and are never shell text. A configuration that cannot run ends the job here, with its code.
read_arguments() {
    local answer code
    answer="$(mktemp)"
    "$KHA_PYTHON" -c 'from kha_train.cli.main import run; run()' launch-arguments "$@" >"$answer" || {
        code=$?
        rm -f "$answer"
        say "not started, not requeued"
        exit "$code"
    }
    # shellcheck disable=SC2034  # read by the scripts that source this file
    mapfile -d '' -t KHA_ARGUMENTS <"$answer"
    rm -f "$answer"
}

# Listen to signals from here on; then modules, virtual environment, network: what python needs to start at this site.
enter_site() {
    trap on_signal USR1 USR2 TERM
    if [[ -n ${KHA_SITE:-} ]]; then
        # shellcheck disable=SC1090  # the user's own file
        source "$KHA_SITE"
    fi
    KHA_PYTHON="${KHA_PYTHON:-python}"
    [[ -n ${SLURM_JOB_ID:-} ]] || {
        say "no SLURM job: submit this with sbatch, or use launch/local.sh"
        exit 2
    }
}
