"""The ring never affects training, whatever its directory does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kha_train import compose
from kha_train.checkpoint.layout import FOLDER, RING
from kha_train.checkpoint.trainer_state import encode_state
from kha_train.distributed import World
from kha_train.train import ring as module
from kha_train.train.ring import Copy, Ring


def opened(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, dict[str, Any]]]:
    """What a ring with a copy of step 1 records when an event opens with step 2 and its directory cannot be listed."""

    def unreadable(folder: Path) -> list[tuple[int, Path]]:
        raise PermissionError(13, "Permission denied", str(folder))

    session: Any = SimpleNamespace(
        config=compose(["checkpoint.ring_steps=1"]),
        world=World.single(),
        run_dir=run_dir,
        progress=SimpleNamespace(step=1),
        watch=SimpleNamespace(verdict=SimpleNamespace(opened=True), event=None),
    )
    events: list[tuple[str, int, dict[str, Any]]] = []
    monkeypatch.setattr(module, "candidates", unreadable)
    ring = Ring(session, lambda kind, step, **fields: events.append((kind, step, fields)))
    ring._copies = [Copy(step=1, state=encode_state({}))]
    ring.after(2)
    return events


def test_a_ring_that_cannot_be_listed_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(tmp_path, monkeypatch) == [("ring_saved", 2, {"steps": [1]})]
    assert (tmp_path / RING / FOLDER / "step-00000001").is_dir()


def test_a_ring_that_cannot_be_written_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / RING).write_text("no directory")
    [(kind, step, fields)] = opened(tmp_path, monkeypatch)
    assert (kind, step) == ("ring_failed", 2) and "cannot prepare the checkpoint" in fields["problem"]
