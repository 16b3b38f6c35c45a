"""The environment of the token loaders' benchmark."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from kha_train.bench import data


def test_peers_are_installed_again_until_all_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    broken = {"grain"}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        asked.append(command)
        (tmp_path / "peers").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, int(command[-1] in broken), "", "no matching distribution")

    monkeypatch.setattr(data.subprocess, "run", run)
    said: list[str] = []
    data.install_peers(tmp_path / "peers", said.append)
    assert said == ["grain does not install: no matching distribution"]
    broken.clear()
    data.install_peers(tmp_path / "peers", said.append)
    assert sum("grain" in command for command in asked) == 2
    asked.clear()
    data.install_peers(tmp_path / "peers", said.append)
    assert asked == [] and len(said) == 1
