#!/usr/bin/env bash
# Shared by train.sbatch and sweep.sbatch: starts one `srun torchrun` per node in a job's allocation, and decides from
# its end whether the job is done, requeued or never requeued. Sourced, never run.
#
# Each start of a job has its own directory, RUN_DIR/launch/JOB.RESTART: the attempt. Until the trainer owns the run
# directory, nothing else in it is touched, because another job may be training there. This script and its trainer
# communicate through two files of the attempt (exit codes do not pass through torchrun):
#   STOP      created here on a signal: save and end
#   outcome   written by the trainer, once it owns the run directory or knows that it cannot:
#     training   training, or crashed while training  -> requeued while there are new checkpoints, else srun's code
#     requeue    saved and stopped in good order      -> the job requeues itself, unless SIGTERM stopped it
#     stopped    the same, because the user created the file STOP in the run directory -> the job ends with 0
#     done       all steps are trained                -> the job ends with 0
#     fatal N    an error that would happen again     -> the job ends with the code N, and is never requeued
#     failed N   an error that may not (disk, another rank) -> as after a crash
#     (no file)  it never owned the run               -> requeued only if a signal interrupted the start
# The markers DONE, REQUEUE, FATAL of the run directory say the same to people and to `kha status`.
#
# Settings (environment; see site/example.env):
#   KHA_PYTHON             interpreter of the environment kha_train is installed in (default: python)
#   KHA_SITE               file sourced at the job's start: modules, network, W&B; what it sets is exported
#   KHA_NPROC              ranks per node (default: the node's GPUs, else 1)
#   KHA_MAX_REQUEUES       restarts after which a job gives up (default: 100)
#   KHA_MAX_IDLE_STARTS    starts in a row without a new checkpoint after which a job gives up (default: 3)
#   KHA_MAX_RESTARTS       restarts of all workers inside a job before it counts as crashed (default: 0)

KHA_REQUEUE_CODE=85
KHA_AGENT='trap "" USR1 USR2; exec "$@"' # an ignored signal stays ignored after exec; torchrun would die of it

# If the message cannot be printed (a full disk), the script continues.
say() {
    printf 'kha: %s\n' "$*" >&2 || true
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
    if [[ -n ${KHA_NPROC:-} ]]; then
        printf '%s' "$KHA_NPROC"
    else
        at_least_one "${SLURM_GPUS_ON_NODE:-1}"
    fi
}

# $1 if it is a positive integer, else 1: a node without GPUs has one rank.
at_least_one() {
    if [[ $1 =~ ^[0-9]{1,9}$ ]] && ((10#$1 > 0)); then
        printf '%s' "$((10#$1))"
    else
        printf 1
    fi
}

# Checks that the setting named $1, if set, is an integer of at least $2. Otherwise arithmetic would evaluate any text in
# it, including commands.
check_number() {
    local value="${!1:-}"
    [[ -n $value ]] || return 0
    if [[ ! $value =~ ^[0-9]{1,9}$ ]] || ((10#$value < $2)); then
        say "$1 = '$value': allowed: integers from $2 on"
        exit 2
    fi
    export "$1=$((10#$value))"
}

# Settings of the libraries, unless the site file has set them. $1: the directory of this attempt.
export_library_settings() {
    export PYTHONFAULTHANDLER=1 TORCH_FORCE_WEIGHTS_ONLY_LOAD=1
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(at_least_one "${SLURM_CPUS_ON_NODE:-1}") / $(ranks_per_node)))}"
    [[ $OMP_NUM_THREADS != 0 ]] || OMP_NUM_THREADS=1
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
    # The flight recorder: the last collectives of every rank, written after a time-out.
    export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=20000
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$1/flight_recorder/rank_" TORCH_FR_DUMP_TEMP_FILE="$1/flight_recorder/rank_"
    export TORCHELASTIC_ERROR_FILE="$1/error.json" KHA_OUTCOME_FILE="$1/outcome" KHA_STOP_FILE="$1/STOP"
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

# How many starts of this job in a row, this one included, began after step $1, the newest checkpoint now. It counts what
# SLURM requeued by itself as well.
idle_starts() {
    local life file step count=0
    for ((life = $(restarts); life >= 0; life--)); do
        step=''
        file="$KHA_RUN_DIR/launch/$SLURM_JOB_ID.$life/start_step"
        [[ ! -s $file ]] || read -r step <"$file" || true
        [[ -n $step ]] || continue
        [[ $step == "$1" ]] || break
        count=$((count + 1))
    done
    printf '%s' "$count"
}

# Called by the traps. $1: "requeue", or "end" after SIGTERM, with which SLURM ends a job. A cancelled job must not come
# back, and SLURM itself restarts a preempted or requeued one. The first of two signals counts: SIGTERM also comes at
# the time limit, to a job that is still saving after its warning.
# The workers finish their step, save and end; they also see the file if the signal came before they could listen.
# srun forwards the signal to every process of the step.
on_signal() {
    KHA_STOPPING="${KHA_STOPPING:-$1}"
    say "asked to stop: saving, then $KHA_STOPPING"
    [[ -z ${KHA_ATTEMPT:-} ]] || : >"$KHA_ATTEMPT/STOP" || true
    [[ -z ${KHA_SRUN_PID:-} ]] || kill -USR2 "$KHA_SRUN_PID" 2>/dev/null || true
}

# Wait for the process $1 even if signals arrive; sets KHA_CODE to its exit code.
wait_for() {
    local last
    KHA_CODE=0
    while kill -0 "$1" 2>/dev/null; do
        KHA_CODE=0
        wait "$1" || KHA_CODE=$?
    done
    # A signal may have interrupted the last wait; 127: the shell has already returned the true code.
    last=0
    wait "$1" || last=$?
    ((last == 127)) || KHA_CODE=$last
}

# Why this job must not be restarted after $1 starts without a new checkpoint and $2 restarts; empty if it may be.
given_up() {
    local most_idle="${KHA_MAX_IDLE_STARTS:-3}" most="${KHA_MAX_REQUEUES:-100}"
    if (($1 >= most_idle)); then
        printf '%s starts in a row without a new checkpoint (KHA_MAX_IDLE_STARTS)' "$1"
    elif (($2 >= most)); then
        printf '%s restarts already (KHA_MAX_REQUEUES)' "$2"
    fi
}

# Requeue the job, or end with $1 if that is not possible or useful.
requeue() {
    local code="$1" why
    why="$(given_up "$(idle_starts "$(newest_step "$KHA_RUN_DIR")")" "$(restarts)")"
    if [[ -n $why ]]; then
        say "not requeued: $why"
        exit "$((code ? code : 1))"
    fi
    if scontrol requeue "$(job_name)"; then
        say "requeued"
        exit 0
    fi
    if scontrol show config | grep -Eq "^RequeueExit +=.*\b$KHA_REQUEUE_CODE\b"; then
        exit "$KHA_REQUEUE_CODE"
    fi
    say "this site does not let a job requeue itself: submit the same command again; it continues from the checkpoint"
    exit "$((code ? code : 1))"
}

# Print the rank that failed first, with its error; a rank without an error file is named too.
say_who_failed_first() {
    local line
    line="$("$KHA_PYTHON" - "$KHA_RUN_DIR" <<'PYTHON'
import sys
from pathlib import Path

from kha_train.record import first_failure_line

print(first_failure_line(Path(sys.argv[1]), ended=True))
PYTHON
)" || true
    [[ -z $line ]] || say "$line"
}

# Decide what the end of srun (code KHA_CODE) means. $1: newest checkpoint at its start.
conclude() {
    local outcome='' code='' newest
    newest="$(newest_step "$KHA_RUN_DIR")"
    if [[ -e $KHA_ATTEMPT/outcome ]]; then
        read -r outcome code <"$KHA_ATTEMPT/outcome" || true
        # The process that created the file owned the run; a machine crash may have lost its content.
        outcome="${outcome:-training}"
    fi
    case "$outcome" in
    done)
        say "done"
        exit 0
        ;;
    stopped)
        say "stopped by the file STOP: submit the same command again to continue"
        exit 0
        ;;
    fatal)
        say "ended with code $code: not requeued"
        exit "$code"
        ;;
    esac
    if [[ ${KHA_STOPPING:-} == end ]]; then
        say "ended by SIGTERM: not requeued by itself; submit the same command again to continue"
        [[ $outcome != requeue ]] || exit 0
        exit "${code:-$((KHA_CODE ? KHA_CODE : 1))}"
    fi
    if [[ $outcome == requeue || -n ${KHA_STOPPING:-} ]]; then
        requeue 0
    fi
    # Without an outcome the run was never ours, and its checkpoints and errors may be another job's.
    [[ -z $outcome ]] || say_who_failed_first
    # The newest may be older than the one at the start, if that was damaged or a rewind undid it.
    if [[ -n $outcome ]] && ((newest != $1)); then
        say "crashed with code ${code:-$KHA_CODE}; the newest checkpoint was step $1 and is step $newest"
        requeue "${code:-$((KHA_CODE ? KHA_CODE : 1))}"
    fi
    say "crashed with code ${code:-$KHA_CODE} and no new checkpoint: not requeued"
    exit "${code:-$((KHA_CODE ? KHA_CODE : 1))}"
}

# Train in the allocation of this job. $1: run directory, the rest: overrides. Never returns.
train_in_allocation() {
    local attempt before nodes why
    KHA_RUN_DIR="$1"
    shift
    nodes="$SLURM_JOB_NUM_NODES"
    if [[ -e $KHA_RUN_DIR/DONE ]]; then
        say "$KHA_RUN_DIR is already done"
        exit 0
    fi
    before="$(newest_step "$KHA_RUN_DIR")"
    attempt="$KHA_RUN_DIR/launch/$SLURM_JOB_ID.$(restarts)"
    mkdir -p "$attempt/flight_recorder"
    rm -f "$attempt/STOP" "$attempt/outcome"
    echo "$before" >"$attempt/start_step"
    KHA_ATTEMPT="$attempt" # from here on a signal creates its file there
    export_library_settings "$KHA_ATTEMPT"
    # A job that SLURM requeued itself (after losing a node) never passed through `requeue`.
    why="$(given_up "$(($(idle_starts "$before") - 1))" "$(($(restarts) - 1))")"
    if [[ -n $why ]]; then
        say "not started again: $why; submit it again when the cause is fixed"
        exit 1
    fi
    case "${KHA_STOPPING:-}" in
    requeue) requeue 0 ;;
    end) exit 0 ;;
    esac
    say "job $(job_name), start $(restarts) after step $before, $nodes nodes x $(ranks_per_node) ranks, $KHA_RUN_DIR"
    # In the background, because a trap waits for a foreground command.
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 \
        bash -c "$KHA_AGENT" agent "$KHA_PYTHON" -m torch.distributed.run \
        --nnodes="$nodes" --nproc-per-node="$(ranks_per_node)" --max-restarts="${KHA_MAX_RESTARTS:-0}" \
        --rdzv-backend=c10d --rdzv-endpoint="$(first_host):$(rendezvous_port)" \
        --rdzv-id="$SLURM_JOB_ID.$(restarts)" --log-dir="$KHA_ATTEMPT/logs" --tee=3 \
        -m kha_train "$@" &
    KHA_SRUN_PID=$!
    wait_for "$KHA_SRUN_PID"
    conclude "$before"
}

# Fill KHA_ARGUMENTS with the run directory and the overrides printed by `kha launch-arguments "$@"`. They are separated
# by NUL bytes and never become shell text. A configuration that cannot run ends the job here, with its code.
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

# Ends with 2 when kha_train is not installed in KHA_PYTHON: no environment is active.
check_python() {
    command -v "$KHA_PYTHON" >/dev/null || {
        say "there is no $KHA_PYTHON here: activate the environment that kha_train is installed in, \`source .venv/bin/activate\` (\`make quickstart\` makes it), or set KHA_PYTHON=/path/to/its/python"
        exit 2
    }
    "$KHA_PYTHON" - <<'PYTHON' || exit 2
import sys
from importlib.util import find_spec

if find_spec("kha_train") is None:
    sys.exit(
        f"kha: {sys.executable} has no kha_train: activate the environment that it is installed in, "
        "`source .venv/bin/activate` (`make quickstart` makes it), or set KHA_PYTHON=/path/to/its/python"
    )
from kha_train.interpreter import require

require()
PYTHON
}

# Called when a command fails while the site file is read. $1: its code, $2: its line, $3: the command, $4: the file.
# A false condition is not a failure; anything else means that a setting is missing.
note_site_failure() {
    [[ $4 == "$KHA_SITE" ]] || return 0
    case "$3" in
    '[['* | '['* | '(('* | test\ * | let\ * | grep\ * | false) KHA_SITE_CONDITION="$1" ;;
    *)
        say "KHA_SITE $KHA_SITE, line $2: a command failed with code $1; if that is intended, end the line with || true"
        KHA_SITE_FAILED=yes
        ;;
    esac
}

# Sources the file KHA_SITE as in a user's own shell, which modules and conda expect; everything it sets is exported.
# Ends with 2 when the file cannot be read or parsed, or when a command in it fails, because settings would be missing.
source_site() {
    local code=0
    KHA_SITE_FAILED='' KHA_SITE_CONDITION='' KHA_SITE_BEFORE_RETURN=''
    [[ -r $KHA_SITE && ! -d $KHA_SITE ]] || {
        say "cannot read KHA_SITE: $KHA_SITE"
        exit 2
    }
    bash -n -- "$KHA_SITE" || {
        say "KHA_SITE $KHA_SITE is not valid bash: nothing was started"
        exit 2
    }
    set +euo pipefail
    set -a
    trap 'note_site_failure "$?" "$LINENO" "$BASH_COMMAND" "${BASH_SOURCE[0]}"' ERR
    trap 'KHA_SITE_BEFORE_RETURN=$?' RETURN
    # shellcheck disable=SC1090  # the user's own file
    source "$KHA_SITE"
    code=$?
    trap - ERR RETURN
    set +a
    set -euo pipefail
    # The last command may be a false condition. The code before it tells a `return` of the file itself.
    if ((code != 0)) && [[ "$code $code" != "$KHA_SITE_CONDITION $KHA_SITE_BEFORE_RETURN" ]]; then
        KHA_SITE_FAILED=yes
    fi
    [[ -z $KHA_SITE_FAILED ]] || {
        say "KHA_SITE $KHA_SITE ended with code $code: nothing was started"
        exit 2
    }
}

# Listen to signals from here on; then set up modules, virtual environment and network for this site.
enter_site() {
    trap 'on_signal requeue' USR1 USR2
    trap 'on_signal end' TERM
    [[ -z ${KHA_SITE:-} ]] || source_site
    check_number KHA_NPROC 1
    check_number KHA_MAX_REQUEUES 0
    check_number KHA_MAX_IDLE_STARTS 1
    check_number KHA_MAX_RESTARTS 0
    KHA_PYTHON="${KHA_PYTHON:-python}"
    [[ -n ${SLURM_JOB_ID:-} ]] || {
        say "no SLURM job: submit this with sbatch, or use launch/local.sh"
        exit 2
    }
    check_python
}
