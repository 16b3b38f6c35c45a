"""Where a checkpoint lies."""

from __future__ import annotations

from pathlib import Path

from kha_train.checkpoint.layout import run_of


def test_a_checkpoint_belongs_to_its_run_also_in_a_ring_and_in_a_run_of_that_name(tmp_path: Path) -> None:
    assert run_of(tmp_path / "ring" / "checkpoints" / "step-00000001") == tmp_path / "ring"
    (tmp_path / "run.json").write_text("{}")
    assert run_of(tmp_path / "checkpoints" / "step-00000001") == tmp_path
    assert run_of(tmp_path / "ring" / "checkpoints" / "step-00000001") == tmp_path
    moved = tmp_path / "step-00000001"
    assert run_of(moved) == moved
