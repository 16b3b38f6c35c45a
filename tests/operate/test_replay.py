"""Stretches of a run are computed again from its checkpoints: bit-equal, or what differs is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kha_train.analysis.certify.certified import Replay
from kha_train.analysis.runs import load_run
from kha_train.checkpoint.manifest import _sealed
from kha_train.checkpoint.reader import Checkpoint, check_sizes
from kha_train.cli.main import run as command
from kha_train.config.compose import compose
from kha_train.errors import MachineError
from kha_train.operate.replay import replay_runs
from kha_train.operate.stretch import Job, compute, in_processes, in_this_process, stretches
from kha_train.record import read_metrics, read_run, timing_keys
from kha_train.train.run import train

SETTINGS = (
    "model.seq_len=16", "model.layers=1", "model.hidden_size=32", "model.query_heads=2", "model.kv_heads=1",
    "model.head_dim=16", "moe.expert_width=16", "data.global_batch_size=2", "engine.micro_batch_size=2",
    "engine.name=plain", "engine.device=cpu", "validation.rows=4", "validation.every_steps=3",
    "stability.probe_every=2", "checkpoint.every_steps=4", "checkpoint.keep_last=9", "run.steps=8", "attention=kha_mlp",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    """Eight steps, saved after 4 and 8, by two starts."""
    place = tmp_path_factory.mktemp("replayed") / "run"
    overrides = [*small, *SETTINGS, f"run.dir={place}"]
    train(compose(overrides), until=4)
    train(compose(overrides))
    return place


def replayed(run_dir: Path, count: int = 9) -> tuple[Replay, ...]:
    found = load_run(run_dir)
    return replay_runs(
        [found], count, 0, lambda text: None, lambda what, total: nullcontext(lambda done: None), in_this_process
    )


def fingerprint(directory: Path) -> dict[str, Any]:
    """Contents, times and links of every file and directory."""
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_nlink, path.is_file() and path.read_bytes())
        for path in sorted(directory.rglob("*"))
    }


def edited(run_dir: Path, step: int, key: str, value: float) -> Callable[[], None]:
    """Change a line of the record; the result puts it back."""
    file = run_dir / "metrics.jsonl"
    before = file.read_text()
    lines = [json.loads(line) for line in before.splitlines()]
    lines[step - 1][key] = value
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lambda: file.write_text(before) and None


def test_every_stretch_is_bit_equal_and_the_run_is_only_read(run_dir: Path) -> None:
    load_run(run_dir)
    before = fingerprint(run_dir)
    found = replayed(run_dir)
    assert sorted((one.first, one.last, one.outcome, one.differences, one.lines) for one in found) == [
        (0, 4, "equal", (), 4),
        (4, 8, "equal", (), 4),
    ]
    timings = timing_keys(read_run(run_dir))
    lines = read_metrics(run_dir)
    for one in found:
        assert one.entries == sum(key not in timings for line in lines[one.first : one.last] for key in line)
        assert one.tensors > 0
    assert fingerprint(run_dir) == before


@pytest.mark.slow
def test_a_changed_line_is_named_and_so_is_the_stretch(run_dir: Path) -> None:
    loss = read_metrics(run_dir)[5]["train/loss"]
    restore = edited(run_dir, 6, "train/loss", loss + 1e-12)
    found = {(one.first, one.last): one for one in replayed(run_dir)}
    restore()
    assert found[0, 4].outcome == "equal"
    assert found[4, 8].outcome == "differs"
    assert found[4, 8].differences == (f"step 6: train/loss is {loss}, recorded {loss + 1e-12}",)


@pytest.mark.slow
def test_a_run_cannot_declare_its_losses_to_be_timings(run_dir: Path) -> None:
    loss = read_metrics(run_dir)[5]["train/loss"]
    restore, file = edited(run_dir, 6, "train/loss", loss + 1.0), run_dir / "run.json"
    before = file.read_text()
    run = json.loads(before)
    run["metrics"]["train/loss"]["timing"] = True
    file.write_text(json.dumps(run))
    found = {(one.first, one.last): one.outcome for one in replayed(run_dir)}
    restore(), file.write_text(before)
    assert found == {(0, 4): "equal", (4, 8): "differs"}


@pytest.mark.slow
def test_a_stretch_that_cannot_be_computed_is_told_beside_those_that_were(run_dir: Path) -> None:
    file = run_dir / "metrics.jsonl"
    before = file.read_text()
    file.write_text("".join(line for line in before.splitlines(keepends=True) if json.loads(line)["step"] != 6))
    found = [(one.first, one.last, one.outcome, one.reason) for one in replayed(run_dir)]
    file.write_text(before)
    reason = "1 of 2 stretches: the record lacks lines of these steps"
    assert found == [(0, 4, "equal", ""), (0, 0, "not replayed", reason)]


@pytest.mark.slow
def test_a_checkpoint_that_the_run_did_not_make_is_found(run_dir: Path) -> None:
    """Its bytes fit its manifest, and a new chain of hashes would pass: recomputing does not."""
    folder = run_dir / "checkpoints" / "step-00000008"
    model, manifest = folder / "model-00000.safetensors", folder / "manifest.json"
    kept = model.read_bytes(), manifest.read_bytes()
    tampered = bytearray(kept[0])
    tampered[-2] ^= 1
    model.write_bytes(tampered)
    digests = [hashlib.sha256(content).hexdigest().encode() for content in (kept[0], bytes(tampered))]
    body, _, _ = kept[1].replace(*digests).rpartition(b',\n"sha256": ')
    manifest.write_bytes(_sealed(body))
    check_sizes(folder)
    found = {(one.first, one.last): one for one in replayed(run_dir)}
    model.write_bytes(kept[0])
    manifest.write_bytes(kept[1])
    assert found[4, 8].outcome == "differs" and found[4, 8].differences[0].startswith("checkpoint: ")


@pytest.mark.slow
def test_a_damaged_checkpoint_and_missing_data_are_not_replayed_and_say_why(run_dir: Path) -> None:
    file = run_dir / "checkpoints" / "step-00000004" / "trainer.json"
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + b" ")
    found = replayed(run_dir)
    file.write_bytes(kept)
    assert {one.outcome for one in found} == {"not replayed"} and all("trainer.json" in one.reason for one in found)
    config = run_dir / "run.json"
    kept_run = config.read_text()
    content = json.loads(kept_run)
    content["attempts"][0]["config"]["whole"]["data"]["train"] = "/nowhere/train"
    content["attempts"][1]["config"]["changed"]["data.train"] = "/nowhere/train"
    config.write_text(json.dumps(content))
    found = replayed(run_dir)
    config.write_text(kept_run)
    assert {one.outcome for one in found} == {"not replayed"} and all("/nowhere" in one.reason for one in found)


def test_what_cannot_be_computed_here_says_why(run_dir: Path) -> None:
    file = run_dir / "run.json"
    kept = file.read_text()
    for key, value, words in (
        ("world_size", 10_000, "computed by 10000 processes"),
        ("changed", {"device": "cuda"}, "computed on cuda"),
    ):
        content = json.loads(kept)
        content["attempts"][-1][key] = value
        file.write_text(json.dumps(content))
        found = [one.obstacle for one in stretches(load_run(run_dir))]
        file.write_text(kept)
        assert len(found) == 2 and words in "; ".join(found), found


def away(path: Path) -> Callable[[], None]:
    """Take a checkpoint away; the result puts it back."""
    hidden = path.rename(path.with_name(f".{path.name}.away"))
    return lambda: hidden.rename(path) and None


@pytest.mark.slow
def test_a_restart_inside_a_stretch_matters_only_with_other_settings(run_dir: Path) -> None:
    restore = away(run_dir / "checkpoints" / "step-00000004")
    (equal,) = replayed(run_dir)
    file = run_dir / "run.json"
    kept = file.read_text()
    content = json.loads(kept)
    content["attempts"][-1]["config"] = {"like": 1, "changed": {"optim.lr": 1.0}, "without": []}
    file.write_text(json.dumps(content))
    (refused,) = replayed(run_dir)
    file.write_text(kept)
    last = away(run_dir / "checkpoints" / "step-00000008")
    (nothing,) = replayed(run_dir)
    last()
    restore()
    assert (equal.first, equal.last, equal.outcome, equal.differences) == (0, 8, "equal", ())
    assert (refused.outcome, refused.reason) == (
        "not replayed",
        "the run was restarted inside them with another optim.lr",
    )
    assert (nothing.outcome, nothing.reason) == ("not replayed", "it has no checkpoint")


@pytest.mark.slow
def test_a_stretch_with_one_thing_changed_ends_elsewhere(run_dir: Path, tmp_path: Path) -> None:
    """What asks for the cause of a spike begins from the same state."""
    stretch = next(one for one in stretches(load_run(run_dir)) if one.first == 4)
    again = compute(
        stretch, tmp_path, in_this_process, lambda step: None,
        lambda config: replace(config, optim=replace(config.optim, lr=2 * config.optim.lr)),
    )  # fmt: skip
    lines, before = read_metrics(again), read_metrics(run_dir)
    assert [line["step"] for line in lines] == [5, 6, 7, 8]
    assert lines[0]["train/loss"] == before[4]["train/loss"] and lines[3]["train/loss"] != before[7]["train/loss"]
    path = again / "checkpoints" / "step-00000008"
    assert Checkpoint(path, check_sizes(path)).step == 8


@pytest.mark.slow
def test_the_command_replays_in_processes_of_their_own(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(["compare", str(run_dir), "--replay", "1", "--out", str(tmp_path / "report"), "--json"])
    assert not ended.value.code
    (one,) = json.loads(capsys.readouterr().out)["certificate"]["replays"]
    assert one["outcome"] == "equal" and one["lines"] == 4 and one["tensors"] > 0


@pytest.mark.slow
def test_the_exit_code_of_several_ranks_is_that_of_the_training(small: list[str], tmp_path: Path) -> None:
    """By which a replay that diverges is told from one that failed."""
    config = compose([*small, "data.train=/nowhere", f"run.dir={tmp_path}/run", "engine.device=cpu"])
    with pytest.raises(MachineError, match=r"training ended with 2: configuration error: .*data.train"):
        in_processes(Job(config, until=1, ranks=2, threads="1"), tmp_path, lambda step: None)
