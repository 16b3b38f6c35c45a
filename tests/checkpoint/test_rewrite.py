"""A checkpoint with another trainer state shares the bytes of its tensors, wherever links are possible."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from kha_train.checkpoint.background import BackgroundWriter
from kha_train.checkpoint.compare import compare
from kha_train.checkpoint.manifest import Kinds
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import Checkpoint, verify
from kha_train.checkpoint.rewrite import with_state
from kha_train.distributed import World


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    writer = BackgroundWriter(tmp_path / "run", World.single(), kinds=Kinds(("master",)))
    writer.begin(3, [Piece("w", "master", (6,), 0, torch.arange(6.0))], {"b": torch.ones(2)}, {"rate": 0.1})
    published = writer.wait()
    assert published is not None
    return Checkpoint(published.path, verify(published.path))


@pytest.mark.parametrize("linked", [True, False])
def test_another_state_beside_the_same_tensors(
    checkpoint: Checkpoint, tmp_path: Path, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.path.iterdir()}

    def other_file_system(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not linked:
        monkeypatch.setattr(os, "link", other_file_system)
    made = with_state(checkpoint, tmp_path / "other", {"rate": 0.2})
    found = Checkpoint(made, verify(made))
    assert found.trainer_state == {"rate": 0.2} and found.step == 3
    difference = compare(checkpoint, found)
    assert not difference.tensors and difference.settings == {"rate": (0.1, 0.2)}
    tensors = [name for name in before if name.endswith(".safetensors")]
    assert tensors and all((made / name).samefile(checkpoint.path / name) == linked for name in tensors)
    assert {path.name: path.read_bytes() for path in checkpoint.path.iterdir()} == before

    # A second call writes nothing, one with yet another state replaces it.
    times = {path.name: path.stat().st_mtime_ns for path in made.iterdir()} | {"": made.stat().st_ino}
    assert with_state(checkpoint, tmp_path / "other", {"rate": 0.2}) == made
    assert times == {path.name: path.stat().st_mtime_ns for path in made.iterdir()} | {"": made.stat().st_ino}
    again = with_state(checkpoint, tmp_path / "other", {"rate": 0.3})
    assert Checkpoint(again, verify(again)).trainer_state == {"rate": 0.3}
