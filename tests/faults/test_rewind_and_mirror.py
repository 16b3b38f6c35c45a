"""F6, F14: batches of noise, and an unavailable W&B."""

from __future__ import annotations

import pytest

from kha_train.checkpoint.retention import mark

pytestmark = pytest.mark.slow

NOISE = [{"at": f"batch:{step}", "do": "noise"} for step in range(191, 195)]
REWINDING = (
    "attention=gqa",
    "model.layers=1",
    "model.seq_len=32",
    "stability=rewind",
    "stability.rewind.after=4",
    "stability.rewind.margin=10",
    "stability.rewind.window=4",
    "checkpoint.every_steps=10",
    "validation.every_steps=0",
    "data.batch_schedule=[{start_step: 193, global_batch_size: 16}]",
)


def test_f6_a_poisoned_batch_is_rewound_and_a_kill_amid_that_changes_nothing(make_run) -> None:
    """Four batches of noise: back before them, without their samples; a checkpoint that a person marked is kept."""
    run, killed = (make_run(*REWINDING, steps=205) for _ in range(2))
    folder = run.run_dir / "checkpoints"
    folder.mkdir(parents=True)
    mark(folder, 190, keep=True)
    assert run.start(*NOISE) == [0], run.log.read_text()
    (event,) = run.events("rewind")
    assert event["to_step"] == 180 and event["trouble_step"] == 191
    assert [line["step"] for line in run.curve()] == list(range(1, 206))
    rows, (first, last) = 8, event["window"]
    assert [first, last] == [190 * rows, 190 * rows + 2 * rows + 2 * 16], "four batches, two of them larger"
    assert not any(first <= line["samples_first"] < last for line in run.curve())
    assert (folder / "step-00000190.undone" / "manifest.json").exists(), "what is marked is not deleted"

    assert killed.start(*NOISE, {"at": "rewind", "do": "kill_all"}) == [-9]
    assert killed.start(*NOISE) == [0], killed.log.read_text()
    assert killed.starts() == [0, 180]
    assert killed.equals(run)


UNREACHABLE = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}


def test_f14_a_run_does_not_miss_w_and_b_at_its_start_amid_it_or_after_a_restart(make_run, straight) -> None:
    settings = ("attention=gqa", "telemetry.wandb.mode=online")
    run = make_run(*settings)
    faults = [{"at": "wandb:3", "do": "eio"}, {"at": "step:5", "do": "kill_all"}]
    assert run.start(*faults, environment=UNREACHABLE) == [-9]
    assert "W&B is offline: http://127.0.0.1:9 cannot be reached" in run.log.read_text()
    assert run.start(environment=UNREACHABLE) == [0], run.log.read_text()
    assert run.curve() == straight("attention=gqa").curve()
    identities = {path.name.rpartition("-")[2] for path in (run.run_dir / "wandb").glob("offline-run-*")}
    assert len(identities) == 1, "every attempt continues one W&B run"


def test_f14_a_run_does_not_need_w_and_b_installed(make_run, straight) -> None:
    run = make_run("attention=gqa", "telemetry.wandb.mode=offline")
    assert run.start(without=["wandb"]) == [0]
    assert "W&B is disabled" in run.log.read_text()
    assert run.curve() == straight("attention=gqa").curve()
