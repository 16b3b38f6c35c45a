"""The TensorBoard mirror, read back by TensorBoard itself."""

from __future__ import annotations

import errno
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kha_train.config.compose import compose
from kha_train.errors import ConfigError
from kha_train.metric import Metric
from kha_train.telemetry import tensorboard
from kha_train.telemetry.sinks import Beginning, Sink, Sinks, open_sinks
from kha_train.variants.registry import sinks

CANARY = "canary-0123456789abcdef"


class Warnings(list[str]):
    """What the mirror has said."""


def opened(run_dir: Path, start_step: int = 0, warn: Any = None, **fields: Any) -> Sinks:
    config = compose(["telemetry.sinks=[tensorboard]", f"telemetry.wandb.group=token-{CANARY}"])
    given = Warnings() if warn is None else warn
    return open_sinks(Beginning(config, run_dir, "id", start_step, given.append, **fields))


def line(step: int, loss: float, **further: Any) -> dict[str, Any]:
    return {"step": step, "attempt": 1, "time": 1e9 + step, "train/loss": loss, **further}


def read(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / tensorboard.FOLDER), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def curve(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in read(run_dir).Scalars(tag)]


def test_every_number_of_a_line_is_a_point_at_its_step_and_time(tmp_path: Path) -> None:
    layers = Metric("moe/load_by_layer", "1", "a list", mirrored=False)
    mirror = opened(tmp_path, metrics=[layers])
    for step, loss in enumerate([2.1, math.nan, math.inf, 1.0 / 3.0], start=1):
        mirror.step(line(step, loss, **{"moe/load_by_layer": [0.5, 0.5], "train/skipped": 0, "note": "a text"}))
    mirror.event({"kind": "checkpoint_saved", "step": 4, "time": 2e9})
    mirror.event({})
    mirror.spikes([{"onset": 2, "kind": "a|b"}], [], [(1, 2.1)])
    mirror.summary({"final/loss": 0.5})
    mirror.close()
    found = read(tmp_path)
    points = found.Scalars("train/loss")
    values = [point.value for point in points]
    np.testing.assert_array_equal(values, np.float32([2.1, math.nan, math.inf, 1 / 3]))
    assert [(point.step, point.wall_time) for point in points] == [(step, 1e9 + step) for step in (1, 2, 3, 4)]
    assert curve(tmp_path, "events/checkpoint_saved") == [(4, pytest.approx(1 / 3))]
    assert set(found.Tags()["scalars"]) == {
        "attempt", "time", "step", "train/loss", "train/skipped", "events/checkpoint_saved",
    }  # fmt: skip
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert set(texts) == {"config", "spike/events", "spike/actions", "summary"}
    assert "| 2 | a\\|b |" in texts["spike/events"] and texts["spike/actions"] == "none"
    assert "    zero_stage: 1" in texts["config"]


def test_a_resume_and_a_rewind_leave_the_curve_of_the_record(tmp_path: Path) -> None:
    """As in metrics.jsonl: only the last value of a step counts, and steps that were undone are gone."""
    first = opened(tmp_path)
    for step in range(1, 9):
        first.step(line(step, float(step)))
    # Killed after step 8; the checkpoint was of step 5.
    first.close()
    second = opened(tmp_path, start_step=5)
    for step in (6, 7, 8, 9):
        second.step(line(step, 10.0 + step))
    second.event({"kind": "rewind", "step": 9, "to_step": 7, "time": 1e9})
    second.step(line(8, 28.0))
    second.close()
    expected = [(step, float(step)) for step in range(1, 6)] + [(6, 16.0), (7, 17.0), (8, 28.0)]
    assert curve(tmp_path, "train/loss") == expected
    assert curve(tmp_path, "events/rewind") == [(7, 19.0)], "at the step from which it goes on"


def test_a_failure_warns_once_and_never_reaches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Warnings()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
        mirror = opened(tmp_path / "absent", warn=said)
    (tmp_path / "absent").mkdir()
    mirror.step(line(1, 1.0))
    mirror.close()
    assert len(said) == 1 and said[0].startswith("TensorBoard is disabled from here on: ")

    said.clear()

    def full(self: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, f"no space left, token={CANARY}")

    (tmp_path / "full").mkdir()
    mirror = opened(tmp_path / "full", warn=said)
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    for step in (1, 2):
        mirror.step(line(step, 1.0))
    mirror.close()
    assert len(said) == 1 and "no space left" in said[0] and CANARY not in said[0]


def test_security_no_file_of_the_mirror_has_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", CANARY)
    mirror = opened(tmp_path)
    mirror.summary({"note": f"Authorization: Bearer {CANARY}"})
    mirror.close()
    (file,) = (tmp_path / tensorboard.FOLDER).iterdir()
    assert CANARY.encode() not in file.read_bytes()


def test_the_sinks_are_the_modules_that_open_one_and_each_is_told_everything() -> None:
    assert sinks() == ("tensorboard", "wandb")
    with pytest.raises(ConfigError, match=r"twice.*telemetry.sinks=\[wandb,tensorboard\]"):
        compose(["telemetry.sinks=[wandb,tensorboard,wandb]"])
    told: list[tuple[str, str]] = []

    class Listening(Sink):
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self, line: dict[str, Any]) -> None:
            told.append((self.name, "step"))

        def close(self, exit_code: int = 0) -> None:
            told.append((self.name, f"close {exit_code}"))

    both = Sinks([Listening("a"), Listening("b")])
    both.step({})
    both.event({"kind": "rewind"})
    both.close(5)
    assert told == [("a", "step"), ("b", "step"), ("a", "close 5"), ("b", "close 5")]
