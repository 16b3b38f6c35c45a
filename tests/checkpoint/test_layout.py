"""Where a checkpoint lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from kha_train.checkpoint.layout import home_of, run_of


def test_a_checkpoint_belongs_to_its_run_also_in_a_ring_and_in_a_run_of_that_name(tmp_path: Path) -> None:
    assert run_of(tmp_path / "ring" / "checkpoints" / "step-00000001") == tmp_path / "ring"
    (tmp_path / "run.json").write_text("{}")
    assert run_of(tmp_path / "checkpoints" / "step-00000001") == tmp_path
    assert run_of(tmp_path / "ring" / "checkpoints" / "step-00000001") == tmp_path
    moved = tmp_path / "step-00000001"
    assert run_of(moved) == moved


def test_the_run_of_a_checkpoint_is_found_from_inside_it_and_through_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    checkpoint = run / "checkpoints" / "step-00000001"
    elsewhere.mkdir()
    (elsewhere / "manifest.json").touch()
    checkpoint.parent.mkdir(parents=True)
    checkpoint.symlink_to(elsewhere)
    monkeypatch.chdir(checkpoint.parent)
    assert home_of(Path(checkpoint.name)) == run_of(Path(checkpoint.name)) == run
    assert home_of(checkpoint) == home_of(run) == run
    whole = run / "checkpoints" / "step-00000002"
    whole.mkdir()
    (whole / "manifest.json").touch()
    (tmp_path / "other").symlink_to(whole)
    monkeypatch.chdir(whole)
    assert home_of(Path()) == home_of(tmp_path / "other") == run
