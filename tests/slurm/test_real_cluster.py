"""Training on a real SLURM: two nodes, every way to be interrupted, sweeps, and errors that must not be requeued."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kha_train.operate.status import newest_checkpoint
from kha_train.record import read_metrics, read_owner, read_run

ROOT = Path(__file__).resolve().parents[2]
KHA = (sys.executable, "-c", "from kha_train.cli.main import run; run()")
STEPS, EVERY = 320, 5

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def settings(small: list[str]) -> list[str]:
    """A run of 320 small steps on two ranks with a checkpoint every five."""
    batch = ["data.global_batch_size=4", "engine.micro_batch_size=2", "model.layers=1"]
    return [*small, *batch, f"run.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "validation.every_steps=0"]


@pytest.fixture(scope="module")
def reference(
    settings: list[str], tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str], curve
) -> list[dict[str, Any]]:
    """The curve of that run on one machine without SLURM, never interrupted."""
    run_dir = tmp_path_factory.mktemp("reference")
    command = ["bash", str(ROOT / "launch" / "local.sh"), *settings, f"run.dir={run_dir}"]
    environment = {**clean_environment, "KHA_PYTHON": sys.executable, "NPROC": "2", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    return curve(run_dir)


@pytest.fixture
def slow(job_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A job's environment in which a step takes half a second and next to no CPU time, until `release` is called."""
    program = tmp_path / "slow_python"
    worker = Path(__file__).with_name("slow_worker.py")
    # torchrun calls it with -u -m kha_train and the overrides.
    program.write_text(f'#!/bin/bash\nexec "{sys.executable}" -u "{worker}" "${{@:4}}"\n')
    program.chmod(0o755)
    return {**job_environment, "PYTHON_EXEC": str(program), "PAUSE": "0.5", "RELEASE": str(tmp_path / "release")}


def release(slow: dict[str, str]) -> None:
    """From here on its steps are as fast as they can be."""
    Path(slow["RELEASE"]).touch()


def attempts(run_dir: Path) -> list[dict[str, Any]]:
    return read_run(run_dir).get("attempts", [])


def wait_for(what: Callable[[], bool], seconds: float, description: str) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"waited {seconds} s for {description}"
        time.sleep(0.2)


def trained_in(run_dir: Path, attempt: int, steps: int = 3) -> Callable[[], bool]:
    """Whether that attempt has made so many steps."""
    return lambda: sum(line["attempt"] == attempt for line in read_metrics(run_dir)) >= steps


def submit(cluster: Any, output: Path, overrides: list[str], env: dict[str, str], *options: str) -> str:
    options = ("--nodes=2", f"--output={output}", *options)
    return cluster.run("sbatch", "--parsable", *options, ROOT / "launch" / "train.sbatch", *overrides, env=env)


@pytest.mark.parametrize("limit", ["moved", pytest.param("as submitted", marks=pytest.mark.soak)])
def test_a_run_survives_every_interruption_and_its_curve_is_that_of_a_run_never_touched(
    limit: str, cluster, settings, reference, slow, curve, tmp_path: Path
) -> None:
    """One job, five interruptions. SLURM looks at time limits every half minute, and these are whole minutes: to wait
    for one takes a minute or two, so mostly the limit is moved close to the job once it trains."""
    run_dir, output = tmp_path / "run", tmp_path / "job.out"
    options = ("--time=60", "--signal=B:USR2@150") if limit == "moved" else ("--time=2", "--signal=B:USR2@45")
    job = submit(cluster, output, [*settings, f"run.dir={run_dir}"], slow, *options)

    # 1: the time limit.
    wait_for(trained_in(run_dir, 1), 240, "the first steps")
    if limit == "moved":
        hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 3}")
    wait_for(lambda: attempts(run_dir)[0]["state"] == "requeued", 240, "the stop before the time limit")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    # 2: an operator's requeue.
    wait_for(trained_in(run_dir, 2), 240, "the start after the time limit")
    cluster.run("scontrol", "requeue", job)
    # 3: a job of higher priority that wants the nodes.
    wait_for(trained_in(run_dir, 3), 240, "the start after scontrol requeue")
    urgent = cluster.run("sbatch", "--parsable", "-purgent", "-N2", "--exclusive", "-o/dev/null", "--wrap=sleep 1")
    cluster.ended(urgent)
    # 4: the node of the batch script loses power.
    wait_for(trained_in(run_dir, 4, EVERY + 3), 240, "the start after preemption")
    cluster.crash_node("n1")
    wait_for(lambda: cluster.node_states()["n1"].startswith("down"), 120, "SLURM to notice the crash")
    cluster.boot_node("n1")
    # 5: the other node's cable is pulled.
    wait_for(trained_in(run_dir, 5, EVERY + 3), 240, "the start after the crash")
    cluster.set_cable("n2", plugged=False)
    wait_for(lambda: cluster.node_states()["n2"].startswith("down"), 120, "SLURM to notice the partition")
    cluster.set_cable("n2", plugged=True)
    release(slow)

    ended = cluster.ended(job)
    assert ended["JobState"] == "COMPLETED", output.read_text()[-3000:]
    lives = attempts(run_dir)
    states = [life["state"] for life in lives]
    # Cut off, the run may still save if the cable is back before SLURM loses patience; SLURM may also stop a node's
    # first job after a crash once more. What holds for every life is what follows from how it ended.
    assert states[:4] == ["requeued", "requeued", "requeued", "lost"] and states[-1] == "done", states
    assert len(lives) >= 6 and int(ended["Restarts"]) >= 5
    for life, following in itertools.pairwise(lives):
        if life["state"] == "requeued":
            assert following["start_step"] == life["end_step"], "resumed at the very step"
        else:
            assert following["start_step"] % EVERY == 0, "resumed at the last periodic checkpoint"
            assert life["start_step"] < following["start_step"] <= life["end_step"]
    assert curve(run_dir) == reference


def test_two_nodes_compute_what_torchrun_computes_and_take_any_text_as_it_is(
    cluster, settings, reference, job_environment, curve, tmp_path: Path
) -> None:
    name = """a "b" 'c' $(touch injected) `id`; \\ *\n#SBATCH --wrap=id"""
    overrides = [*settings, f"run.dir={tmp_path}/with blanks", "run.name=" + hydra_quoted(name)]
    overrides[-2] = f"run.dir={hydra_quoted(str(tmp_path / 'with blanks'))}"
    ended = cluster.ended(submit(cluster, tmp_path / "job.out", overrides, job_environment))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), (tmp_path / "job.out").read_text()[-3000:]
    run_dir = tmp_path / "with blanks"
    assert curve(run_dir) == reference
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["run"]["name"] == name
    assert not list(ROOT.glob("injected")) and not list(run_dir.glob("**/injected"))
    # A job on a run that is done ends at once, and well.
    assert cluster.ended(submit(cluster, tmp_path / "again.out", overrides, job_environment))["ExitCode"] == "0:0"
    assert len(attempts(run_dir)) == 1


def test_what_would_fail_again_is_never_requeued(cluster, settings, job_environment, tmp_path: Path) -> None:
    def start(name: str, *overrides: str, **env: str) -> str:
        own = [*settings, f"run.dir={tmp_path}/{name}", *overrides]
        return submit(cluster, tmp_path / f"{name}.out", own, {**job_environment, **env})

    def end(name: str) -> tuple[str, str, str]:
        job = cluster.ended(jobs[name])
        return job["ExitCode"], job["Restarts"], (tmp_path / f"{name}.out").read_text()

    jobs = {
        "typing": start("typing", "run.steps=many"),
        "data": start("data", "data.train=/nowhere"),
        "crash": start("crash", PYTHON_EXEC="/bin/false"),
    }
    # Found by the batch script, before any node is used.
    code, restarts, said = end("typing")
    assert (code, restarts) == ("2:0", "0") and "run.steps" in said
    # Found by the trainer, whose code torchrun turns into 1.
    code, restarts, said = end("data")
    assert (code, restarts) == ("2:0", "0") and "/nowhere" in said
    # A crash at once: no checkpoint came of it.
    code, restarts, said = end("crash")
    assert code != "0:0" and restarts == "0" and "no new checkpoint" in said


def test_a_run_without_progress_is_given_up_also_when_slurm_itself_requeues_it(
    cluster, settings, job_environment, tmp_path: Path
) -> None:
    idle = tmp_path / "idle"
    idle.write_text(f"#!/bin/bash\ntouch {tmp_path}/up\nexec sleep 600\n")
    idle.chmod(0o755)
    env = {**job_environment, "PYTHON_EXEC": str(idle), "KHA_MAX_IDLE_STARTS": "2"}
    job = submit(cluster, tmp_path / "job.out", [*settings, f"run.dir={tmp_path}/run"], env)
    for _ in range(2):
        wait_for((tmp_path / "up").exists, 240, "a start")
        (tmp_path / "up").unlink()
        cluster.run("scontrol", "requeue", job)
    ended, said = cluster.ended(job), (tmp_path / "job.out").read_text()
    assert (ended["ExitCode"], ended["Restarts"]) == ("1:0", "2"), said
    assert "not started again: 2 starts in a row without a new checkpoint" in said


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(cluster, settings, slow, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path / "job.out", [*settings, f"run.dir={run_dir}"], slow)
    wait_for(trained_in(run_dir, 1), 240, "the first steps")
    cluster.run("scancel", job)
    ended, said = cluster.ended(job), (tmp_path / "job.out").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), said
    assert "ended by SIGTERM: not requeued" in said
    life = attempts(run_dir)[0]
    assert life["state"] == "requeued" and newest_checkpoint(run_dir) == life["end_step"], "saved at the very step"


def test_ranks_that_srun_starts_one_by_one_find_each_other(cluster, settings, job_environment, tmp_path: Path) -> None:
    short = [*settings, "run.steps=2", f"run.dir={tmp_path}/run"]
    cluster.run("srun", "-N2", "--ntasks-per-node=1", sys.executable, "-m", "kha_train", *short, env=job_environment)
    assert [(life["world_size"], life["state"]) for life in attempts(tmp_path / "run")] == [(2, "done")]


def test_a_second_job_in_the_same_directory_is_turned_away_and_a_stop_file_ends_the_first_without_a_requeue(
    cluster, settings, slow, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    overrides = [*settings, f"run.dir={run_dir}"]
    job = submit(cluster, tmp_path / "job.out", overrides, {**slow, "PAUSE": "1"})
    wait_for(trained_in(run_dir, 1), 240, "the first steps")
    (run_dir / "FATAL").write_text("a mark that only the owner may remove")
    second = cluster.ended(submit(cluster, tmp_path / "second.out", overrides, slow))
    assert (second["JobState"], second["ExitCode"], second["Restarts"]) == ("FAILED", "6:0", "0")
    assert f"another process is training here: {owner_of(run_dir)}" in (tmp_path / "second.out").read_text()
    assert (run_dir / "FATAL").exists() and not (run_dir / "STOP").exists()

    (run_dir / "STOP").touch()
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0")
    assert attempts(run_dir)[0]["state"] == "requeued" and not (run_dir / "DONE").exists()
    assert read_owner(run_dir) == {}


def owner_of(run_dir: Path) -> str:
    owner = read_owner(run_dir)
    return f"process {owner['process']} on {owner['host']}, SLURM job {owner['job']}"


def test_a_sweep_is_one_job_array_whose_points_are_comparable(cluster, settings, slow, tmp_path: Path) -> None:
    grid = [text for text in settings if not text.startswith(("run.steps", "checkpoint."))]
    grid += ["attention=gqa,kha_linear,kha_mlp", "run.steps=30", "checkpoint.every_steps=20"]
    command = [*KHA, "sweep", *grid, "--name", "three", "--dir", str(tmp_path), "--json"]
    answer = json.loads(cluster.run(*command, env=slow))
    assert answer["started"] == ["gqa-s0", "kha_linear-s0", "kha_mlp-s0"]
    # While they wait or train, the same command starts nothing.
    assert json.loads(cluster.run(*command, env=slow))["started"] == []
    elements = [f"{answer['job']}_{number}" for number in range(3)]
    runs = [tmp_path / "three" / label for label in answer["started"]]

    # One element alone is interrupted; the last one bears the array's own job id.
    wait_for(trained_in(runs[2], 1), 240, "the last point's first steps")
    cluster.run("scancel", "--batch", "--signal=USR2", elements[2])
    ended = [cluster.ended(element) for element in elements]
    log = "\n".join(path.read_text()[-1500:] for path in (tmp_path / "three" / "logs").glob("*"))
    assert [job["JobState"] for job in ended] == ["COMPLETED"] * 3, log
    assert [job["Restarts"] for job in ended] == ["0", "0", "1"]
    assert json.loads(cluster.run(*command, env=slow))["started"] == []

    report = json.loads(cluster.run(*KHA, "compare", *runs, "--out", tmp_path / "report", "--json"))
    assert [run["variant"] for run in report["runs"]] == ["gqa", "kha_linear", "kha_mlp"]
    assert all(pair["same_data"] for pair in report["pairs"])
    assert (tmp_path / "report" / "index.html").is_file()


def hydra_quoted(value: str) -> str:
    """The text between Hydra's quotes, which know one escape: of a quote."""
    return "'" + value.replace("'", "\\'") + "'"
