"""The one run on a GPU says where there is none, keeps to its time, and leaves what it had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kha_train.bench import gpu
from kha_train.bench.gpu import Stage, as_markdown, measure, stages
from kha_train.errors import ConfigError


def test_without_a_device_it_says_so_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device here, so nothing was measured"):
        measure(tmp_path / "out", seconds=500, rehearse=False, say=print)
    assert not (tmp_path / "out").exists()


def test_every_stage_leaves_its_outcome_also_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ("engine.device=cpu", "model.layers=1", "model.seq_len=16", "model.vocab_size=64", "telemetry.peak_tflops=1")
    works = Stage("works", ("step", *tiny, "--blocks", "3", "--warmup", "1", "--arm", "attention=gqa"), 100)
    given = [works, Stage("fails", ("step", "model=huge"), 60), Stage("tests", ("pytest", "tests/gpu"), 60)]
    monkeypatch.setattr(gpu, "stages", lambda rehearse: given)
    found = measure(tmp_path, seconds=200, rehearse=True, say=lambda text: None)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert "no such preset" in found["stages"]["fails"]["error"] and "skipped" in found["stages"]["tests"]["summary"]
    table = (tmp_path / "results.md").read_text()
    assert "REHEARSAL" in table and "| works | `attention=gqa` |" in table and "no such preset" in table


def test_what_there_is_no_time_for_is_left_out_and_said(tmp_path: Path) -> None:
    found = measure(tmp_path, seconds=1, rehearse=True, say=lambda text: None)
    assert all("no time left" in stage["error"] for stage in found["stages"].values())
    assert as_markdown(found).count("no time left") == len(stages(True))


def test_the_limits_of_the_stages_are_what_nine_minutes_hold_when_each_is_used_up() -> None:
    """But for the last two, which may be cut: the figures of KHA come before them."""
    limits = [stage.limit for stage in stages(False)]
    assert sum(limits[:-2]) < 530
