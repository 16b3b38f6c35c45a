"""Faults on one rank alone: all ranks end together with the same error, and nothing of the run is lost."""

from __future__ import annotations

import shutil

import pytest

from kha_train.record import first_failure

pytestmark = pytest.mark.slow

TWO = ("attention=gqa", "engine=zero2")
MACHINE = 75


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_that_cannot_read_its_share_stops_all_and_the_next_start_goes_on(stage, make_run, straight) -> None:
    settings = ("attention=gqa", f"engine=zero{stage}")
    run = make_run(*settings)
    run.start({"at": "step:5", "do": "kill_all"}, ranks=2)
    assert run.start({"at": "restore", "do": "eio", "rank": 1}, ranks=2) == [MACHINE, MACHINE], run.log.read_text()
    assert not (run.run_dir / "FATAL").exists()
    failure = first_failure(run.run_dir)
    assert failure is not None and "Input/output error" in failure["error"]
    run.to_the_end(ranks=2)
    assert run.equals(straight(*settings, ranks=2))
    assert first_failure(run.run_dir) is None, "failures of earlier starts are forgotten"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_that_cannot_read_what_it_inherits_stops_all(stage, make_run, straight) -> None:
    source = straight(*TWO, ranks=2)
    run = make_run("attention=gqa", f"engine=zero{stage}", f"run.init_from={source.run_dir}", steps=2)
    assert run.start({"at": "restore", "do": "eio", "rank": 1}, ranks=2) == [MACHINE, MACHINE], run.log.read_text()
    run.to_the_end(ranks=2)


def test_a_defect_of_one_rank_stops_all_and_is_not_taken_for_a_mistake(make_run) -> None:
    run = make_run(*TWO)
    run.start({"at": "step:5", "do": "kill_all"}, ranks=2)
    assert run.start({"at": "restore", "do": "defect", "rank": 1}, ranks=2) == [1, 1], run.log.read_text()
    assert "rank 1: ZeroDivisionError: a defect" in run.log.read_text()
    assert not (run.run_dir / "FATAL").exists()


@pytest.mark.parametrize("do", ["memory", "oom", "host_oom"])
def test_a_snapshot_for_which_one_rank_has_no_memory_is_a_failed_save_and_training_goes_on(
    do, make_run, straight
) -> None:
    run = make_run(*TWO)
    assert run.start({"at": "snapshot:2", "do": do, "rank": 1}, ranks=2) == [0, 0], run.log.read_text()
    (failed,) = run.events("checkpoint_failed")
    assert failed["step"] == 2 and "copy the state to host memory" in failed["problem"]
    assert run.equals(straight(*TWO, ranks=2))


@pytest.mark.parametrize("at", ["event:checkpoint_saved", "event:attempt_started", "marker:DONE"])
def test_what_rank_0_alone_cannot_write_ends_all_ranks_together(at, make_run, straight) -> None:
    run = make_run(*TWO)
    codes = run.start({"at": at, "do": "enospc", "rank": 0}, ranks=2)
    assert codes == [MACHINE, MACHINE], run.log.read_text()
    run.to_the_end(ranks=2)
    assert run.equals(straight(*TWO, ranks=2))


def test_what_fails_at_the_end_does_not_hide_what_ended_the_run(make_run) -> None:
    """Data one rank cannot read ends the run; then the disk is full when the end of the attempt is recorded."""
    run = make_run(*TWO)
    faults = [{"at": "batch:3", "do": "data", "rank": 0}, {"at": "event:attempt_ended", "do": "enospc", "rank": 0}]
    assert run.start(*faults, ranks=2) == [4, 4], run.log.read_text()
    assert "damaged" in (run.run_dir / "FATAL").read_text()


def test_files_of_ranks_that_are_no_more_do_not_outlive_a_shrinking_world(make_run) -> None:
    run = make_run(*TWO)
    run.start({"at": "batch:3", "do": "data", "rank": 1}, ranks=2)
    assert (run.run_dir / "errors" / "rank-00001.json").exists()
    run.to_the_end(ranks=1)
    assert first_failure(run.run_dir) is None
    assert not list(run.run_dir.glob("*/rank-00001.*")) and not (run.run_dir / "errors").exists()
    assert [path.name for path in (run.run_dir / ".ranks").glob("rank-*")] == ["rank-00000.json"]


def test_a_secret_reaches_no_file_of_a_run(make_run) -> None:
    """The value of a secret variable stands in a setting, so every text that quotes the configuration is in danger."""
    canary = "hunter2-canary-value"
    run = make_run(*TWO, f"run.name={canary}", f"data.validation=/nowhere/{canary}")
    more = {"environment": {"SOME_API_KEY": canary, "WANDB_MODE": "disabled"}, "ranks": 2}
    assert run.start(**more) == [2, 2], run.log.read_text()
    run.overrides.pop()
    assert run.start({"at": "batch:5", "do": "data", "rank": 1}, **more) == [4, 4], run.log.read_text()
    files = [path for path in run.run_dir.rglob("*") if path.is_file()]
    assert {"trainer.json", "config.yaml", "FATAL", "rank-00001.json"} <= {path.name for path in files}
    assert [path.name for path in files if canary.encode() in path.read_bytes()] == []
    assert run.start(**more) == [0, 0], "what was redacted is not taken for a change"


def test_data_may_move_but_not_change(make_run, dataset, tmp_path) -> None:
    shutil.copytree(dataset, tmp_path / "elsewhere")
    run = make_run("attention=gqa", steps=2)
    sources = [
        f"{{name: a, path: {dataset}/train, weight: 2.0}}",
        f"{{name: b, path: {dataset}/validation, weight: 1.0}}",
    ]
    run.overrides = [
        "data.train=",
        f"data.sources=[{', '.join(sources)}]",
        *[override for override in run.overrides if not override.startswith("data.train=")],
    ]
    run.to_the_end()
    run.overrides[1] = run.overrides[1].replace(f"{dataset}/train", f"{tmp_path}/elsewhere/train")
    run.to_the_end(overrides=(f"data.validation={tmp_path}/elsewhere/validation",))
    assert run.start(overrides=(f"data.validation={dataset}/train",)) == [3]
    assert "validation_content_id" in run.log.read_text()
    swapped = run.overrides[1].replace("name: a", "name: c")
    assert run.start(overrides=(swapped,)) == [3]


def test_checkpoints_that_rank_0_cannot_find_stop_all_ranks_and_a_finished_run_ends_well_on_all(make_run) -> None:
    run = make_run(*TWO)
    run.to_the_end(ranks=2)
    curve = run.curve()
    shutil.rmtree(run.run_dir / "checkpoints")
    assert run.start(ranks=2) == [0, 0], run.log.read_text()
    (run.run_dir / "DONE").unlink()
    assert run.start(ranks=2) == [4, 4], run.log.read_text()
    assert run.starts() == [0] and run.curve() == curve and not (run.run_dir / "FATAL").exists()
