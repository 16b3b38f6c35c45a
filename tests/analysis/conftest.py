"""Shared by tests of the analyses: runs with checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

OLD = Path(__file__).parents[1] / "fixtures" / "old_runs"


@pytest.fixture
def old_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old runs: `gqa` of one process under ZeRO 1, `kha_mlp` of two under ZeRO 3."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"
