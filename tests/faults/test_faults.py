"""The other faults: torn files, full disks, NaN on one rank, hangs, lost ranks, signals, clocks, changed settings."""

from __future__ import annotations

import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kha_train.checkpoint.layout import candidates
from kha_train.errors import MachineError, ResumeError
from kha_train.operate.status import run_status
from kha_train.record import first_failure, first_failure_line, read_discarded, read_metrics, read_owner
from kha_train.record.lock import RunLock

pytestmark = [pytest.mark.slow, pytest.mark.minutes]

TWO = ("attention=gqa", "engine=zero2")


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def flip(path: Path, canary: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path: Path, canary: Path) -> None:
    """The second half is missing."""
    os.truncate(path, path.stat().st_size // 2)


def poison(path: Path, canary: Path) -> None:
    """A pickle that runs code when it is loaded."""
    path.write_bytes(pickle.dumps(Canary(canary)))


DAMAGE = {
    "manifest.json": shorten,
    "trainer.json": poison,
    "model-00000.safetensors": flip,
    "model-00001.safetensors": poison,
    "optimizer-00000.safetensors": lambda path, canary: path.unlink(),
    "optimizer-00001.safetensors": flip,
}


def test_f3_damage_to_any_file_is_found_and_the_checkpoint_before_is_used(make_run, straight, tmp_path) -> None:
    """Each file in turn is damaged after a stop; nothing in it is ever executed."""
    twin, run, canary = straight(*TWO, steps=40, ranks=2), make_run(*TWO, steps=40), tmp_path / "canary"
    run.start({"at": "step:7", "do": "kill_all"}, ranks=2)
    for file, damage in DAMAGE.items():
        found, before = (step for step, _ in candidates(run.run_dir / "checkpoints")[:2])
        damage(run.newest() / file, canary)
        run.start({"at": f"step:{before + 7}", "do": "kill_all"}, ranks=2)
        assert run.starts()[-1] == before, (file, run.log.read_text())
        refused = run.events("checkpoint_refused")[-1]["text"]
        assert f"step-{found:08d} does not verify" in refused and (file in refused or damage is shorten)
        assert (run.run_dir / "checkpoints" / f"step-{found:08d}.corrupt").is_dir()
    run.to_the_end(ranks=2)
    assert run.equals(twin)
    assert not canary.exists()


def test_f3_a_strict_run_ends_at_a_damaged_checkpoint(make_run) -> None:
    run = make_run("resume.strict=true")
    run.start({"at": "step:5", "do": "kill_all"})
    flip(run.newest() / "model-00000.safetensors", Path())
    assert run.start() == [4]
    assert "resume.strict" in run.log.read_text()


@pytest.mark.parametrize(("do", "at"), [("enospc", "mid_shard"), ("erofs", "first_shard"), ("enospc", "before_rename")])
def test_f4_a_save_that_fails_on_one_rank_is_reported_and_training_goes_on(do, at, make_run, straight) -> None:
    rank = 0 if at == "before_rename" else 1
    run = make_run(*TWO)
    assert run.start({"at": f"save:2:{at}", "do": do, "rank": rank}, ranks=2) == [0, 0], run.log.read_text()
    assert run.equals(straight(*TWO, ranks=2))
    (failed,) = run.events("checkpoint_failed")
    assert failed["step"] == 2 and failed["in_a_row"] == 1
    assert [line["checkpoint/failures"] for line in read_metrics(run.run_dir)][-1] == 1
    assert [event["step"] for event in run.events("checkpoint_saved")] == [4, 6]
    assert {path.name for path in (run.run_dir / "checkpoints").iterdir()} == {"step-00000004", "step-00000006"}


def test_f4_saves_that_keep_failing_end_the_run_and_leave_the_last_good_one(make_run) -> None:
    run = make_run(*TWO, "checkpoint.max_failures=2", steps=10)
    faults = [{"at": f"save:{step}:mid_shard", "do": "enospc", "rank": 1} for step in (4, 6)]
    assert run.start(*faults, ranks=2) == [75, 75], run.log.read_text()
    assert [path.name for path in (run.run_dir / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (run.run_dir / "FATAL").exists() and run_status(run.run_dir).state == "ended"
    run.to_the_end(ranks=2)
    assert run.starts() == [0, 2]


def test_f4_saves_that_fail_from_the_first_on_are_not_tried_again_unseen(make_run) -> None:
    run = make_run(*TWO, "checkpoint.max_failures=2")
    faults = [{"at": f"save:{step}:mid_shard", "do": "enospc", "rank": 1} for step in (2, 4)]
    assert run.start(*faults, ranks=2) == [4, 4], run.log.read_text()
    assert (run.run_dir / "FATAL").exists()


def test_f4_the_kernel_refuses_the_bytes(make_run, straight) -> None:
    """A limit on file sizes, which neither the writer nor the trainer knows of."""
    run = make_run("checkpoint.max_failures=9")
    assert run.start({"at": "save:4:first_shard", "do": "file_limit"}) == [MachineError.exit_code]
    assert len(run.events("checkpoint_failed")) >= 1
    run.to_the_end()
    assert run.equals(straight("checkpoint.max_failures=9"))


def test_f4_a_last_save_that_fails_is_tried_again_from_the_checkpoint_before(make_run, straight) -> None:
    """Asked to stop, and the disk is full: the job may be requeued, for an earlier checkpoint stands."""
    run = make_run(*TWO)
    faults = [{"at": "batch:3", "do": "term", "rank": 1}, {"at": "save:3:mid_shard", "do": "enospc", "rank": 1}]
    assert run.start(*faults, ranks=2) == [75, 75], run.log.read_text()
    assert "an earlier one exists" in run.log.read_text() and run.newest().name == "step-00000002"
    assert not (run.run_dir / "FATAL").exists() and run_status(run.run_dir).state == "ended"
    run.to_the_end(ranks=2)
    assert run.starts() == [0, 2] and run.equals(straight(*TWO, ranks=2))


def test_f4_where_no_checkpoint_stands_a_failed_last_save_is_not_tried_again_unseen(make_run) -> None:
    run = make_run(*TWO, "checkpoint.every_steps=100")
    faults = [{"at": "batch:3", "do": "term", "rank": 0}, {"at": "save:3:mid_shard", "do": "enospc", "rank": 0}]
    assert run.start(*faults, ranks=2) == [4, 4], run.log.read_text()
    assert (run.run_dir / "FATAL").exists()


def test_f5_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(make_run) -> None:
    run = make_run(*TWO)
    assert run.start({"at": "gradient:3", "do": "nan", "rank": 1}, ranks=2) == [0, 0], run.log.read_text()
    assert [line["train/skipped"] for line in run.curve()] == [0, 0, 1, 0, 0, 0]
    assert run.curve()[-1]["train/skipped_steps"] == 1


def test_f5_bad_steps_in_a_row_end_the_run(make_run) -> None:
    run = make_run(*TWO, "stability.max_nonfinite_steps=2")
    faults = [{"at": f"gradient:{step}", "do": "nan", "rank": 1} for step in (4, 5)]
    assert run.start(*faults, ranks=2) == [5, 5], run.log.read_text()
    assert (run.run_dir / "FATAL").exists()


def test_f7_data_that_one_rank_cannot_read_ends_all_with_its_words(make_run) -> None:
    run = make_run(*TWO)
    assert run.start({"at": "batch:3", "do": "data", "rank": 1}, ranks=2) == [4, 4]
    failure = first_failure(run.run_dir)
    assert failure is not None and "damaged" in failure["error"]
    assert "rank 0: data error: rank 1: shard: damaged" in run.log.read_text()


@pytest.mark.parametrize("do", ["sleep", "stop"])
def test_f8_a_rank_that_hangs_is_found_and_the_run_goes_on_exactly(do, make_run, straight) -> None:
    """Asleep it wakes its own watchdog; stopped, or starved of its locks, it is missed by its neighbour."""
    settings = (*TWO, "engine.hang_timeout_seconds=15")
    run = make_run(*settings)
    codes = run.start({"at": "step:4", "do": do, "rank": 1}, ranks=2, patience=40)
    assert codes == ([75, 75] if do == "sleep" else [75, None]), run.log.read_text()
    told = first_failure_line(run.run_dir)
    assert told.startswith("rank 1 failed first: ") and "hang error: " in told
    if do == "stop":
        assert "rank 1 does not respond, last seen in step" in run.log.read_text()
    stacks = (run.run_dir / "hang" / "rank-00000.txt").read_text()
    assert "train_step" in stacks
    if do == "sleep":
        assert "in sleep" in (run.run_dir / "hang" / "rank-00001.txt").read_text()
    run.to_the_end(ranks=2)
    assert run.equals(straight(*settings, ranks=2))


def test_f8_all_ranks_suspended_longer_than_the_watchdogs_patience_go_on_exactly(make_run, straight) -> None:
    """As by `scontrol suspend` or `docker pause`: every rank at once, by signals that no process can notice."""
    settings = (*TWO, "engine.hang_timeout_seconds=8", "checkpoint.every_steps=100")
    run = make_run(*settings, steps=150)
    with ThreadPoolExecutor(1) as pool:
        codes = pool.submit(run.start, ranks=2)
        while not (run.run_dir / "metrics.jsonl").exists() or len(run.curve()) < 5:
            assert not codes.done(), run.log.read_text()
            time.sleep(0.02)
        group = os.getpgid(read_owner(run.run_dir)["process"])
        os.killpg(group, signal.SIGSTOP)
        before = len(run.curve())
        time.sleep(12)
        assert len(run.curve()) == before < 150, "it stands still"
        os.killpg(group, signal.SIGCONT)
        assert codes.result() == [0, 0], run.log.read_text()
    assert run.starts() == [0] and run.equals(straight(*settings, steps=150, ranks=2))


@pytest.mark.parametrize("killed", [0, 1])
def test_f9_the_others_do_not_wait_for_a_rank_that_was_killed_and_it_is_named(killed, make_run, straight) -> None:
    run, other = make_run(*TWO), 1 - killed
    codes = run.start({"at": "step:4", "do": "kill", "rank": killed}, ranks=2, patience=60)
    assert codes[killed] == -9 and codes[other] not in (0, None), codes
    assert [path.name for path in (run.run_dir / "errors").glob("rank-*")] == [f"rank-{other:05d}.json"]
    line = first_failure_line(run.run_dir)
    assert line.startswith(f"rank {killed} failed first: died without a message")
    assert f"rank {other} lost its connection: RuntimeError" in line
    assert line in run_status(run.run_dir).note
    run.to_the_end(ranks=2)
    assert run.equals(straight(*TWO, ranks=2))


@pytest.mark.parametrize("do", ["kill", pytest.param("sleep", marks=pytest.mark.soak)])
def test_f9_the_others_do_not_wait_amid_an_exchange_of_tokens_for_one_that_is_gone(do, make_run, straight) -> None:
    """Rank 1 dies, or hangs, while the other ranks that share its experts wait for its tokens."""
    settings = (*TWO, "engine=zero2", "engine.expert_parallel=2", "engine.hang_timeout_seconds=15")
    run = make_run(*settings)
    codes = run.start({"at": "exchange:4", "do": do, "rank": 1}, ranks=2, patience=60)
    assert codes[1] == (-9 if do == "kill" else 75) and codes[0] not in (0, None), codes
    assert first_failure_line(run.run_dir).startswith("rank 1 failed first: ")
    if do == "sleep":
        assert "in run_exchanged" in (run.run_dir / "hang" / "rank-00000.txt").read_text()
    run.to_the_end(ranks=2)
    assert run.equals(straight(*settings, ranks=2))


@pytest.mark.parametrize("do", ["term", "usr2"])
def test_f10_a_signal_to_one_rank_stops_all_after_the_step_with_a_checkpoint(do, make_run, straight) -> None:
    run = make_run(*TWO)
    faults = [{"at": "batch:3", "do": do, "rank": 1}, {"at": "save:3:mid_shard", "do": do, "rank": 0}]
    assert run.start(*faults, ranks=2) == [0, 0], run.log.read_text()
    assert (run.run_dir / "REQUEUE").exists() and run.newest().name == "step-00000003"
    run.to_the_end(ranks=2)
    assert run.starts() == [0, 3] and read_discarded(run.run_dir) == []
    assert run.equals(straight(*TWO, ranks=2))


def test_f11_a_clock_that_is_set_back_changes_nothing(make_run, straight) -> None:
    settings = (*TWO, "engine.hang_timeout_seconds=60", "checkpoint.every_minutes=1000", "run.max_minutes=1000")
    run = make_run(*settings)
    faults = [{"at": "step:3", "do": "clock"}, {"at": "step:5", "do": "kill_all"}]
    run.start(*faults, ranks=2)
    run.to_the_end(ranks=2)
    assert run.equals(straight(*settings, ranks=2))


def test_f11_a_run_with_a_time_limit_stops_in_good_order(make_run) -> None:
    run = make_run("run.max_minutes=0.000001")
    assert run.start() == [0]
    assert (run.run_dir / "REQUEUE").exists() and run.newest().name == "step-00000001"


def test_f13_a_second_job_in_the_same_directory_is_refused_by_name_and_harms_nothing(make_run) -> None:
    run = make_run()
    run.to_the_end()
    before = {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()}
    owner = RunLock(run.run_dir)
    try:
        assert run.start() == [6]
    finally:
        owner.close()
    assert f"process {os.getpid()}" in run.log.read_text() or str(os.getpid()) in run.log.read_text()
    after = {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()}
    changed = {path.name for path in before if before[path] != after.get(path)}
    assert changed <= {"owner.json", ".lock"}


CHANGES = {
    "model.rope_theta=5000.0": "model.rope_theta",
    "optim.lr=0.5": "optim.lr",
    "attention=kha_mlp": "attention.interaction.name",
    "run.steps=8": "run.steps",
    "stability=skip": "stability.policy",
}


@pytest.mark.parametrize("change", CHANGES)
def test_f15_a_changed_setting_is_refused_with_a_table_unless_it_is_allowed_by_name(change, make_run) -> None:
    run = make_run()
    run.to_the_end()
    assert run.start(overrides=(change,)) == [ResumeError.exit_code]
    told = run.log.read_text()
    assert f"  {CHANGES[change]} " in told and "run.init_from=" in told
    allowed = f"resume.allow_changes=[{CHANGES[change].partition('.')[0]}]"
    expected = 3 if change == "attention=kha_mlp" else 0
    assert run.start(overrides=(change, allowed)) == [expected], run.log.read_text()


def test_a_new_run_begins_with_the_weights_of_another(make_run, straight) -> None:
    """The paper's interaction is the identity at first: the loss of step 1 is what the other run reached."""
    source = straight("attention=gqa", steps=6)
    settings = (f"run.init_from={source.run_dir}", "optim.lr=1e-9")
    runs = [make_run(f"attention={variant}", *settings, steps=2) for variant in ("gqa", "kha_mlp")]
    for run in runs:
        run.to_the_end()
        (event,) = run.events("weights_inherited")
        assert event["taken"] == 24 and bool(event["new"]) == (run is runs[1]) and event["left_out"] == []
    first, second = (run.curve()[0]["train/loss"] for run in runs)
    assert abs(first - second) < 1e-5
    assert first < source.curve()[0]["train/loss"] - 0.01
