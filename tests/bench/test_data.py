"""The environment of the token loaders' benchmark."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from kha_train.bench import data
from kha_train.data.format.shards import ShardSet

PACKAGES = [("datatrove",), ("grain",)]


def test_peers_are_installed_again_until_all_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    broken = {"grain"}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        asked.append(command)
        (tmp_path / "peers").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, int(command[-1] in broken), "", "no matching distribution")

    monkeypatch.setattr(data.subprocess, "run", run)
    said: list[str] = []
    data.install_peers(tmp_path / "peers", PACKAGES, said.append)
    assert said == ["grain does not install: no matching distribution"]
    broken.clear()
    data.install_peers(tmp_path / "peers", PACKAGES, said.append)
    assert sum("grain" in command for command in asked) == 2
    asked.clear()
    data.install_peers(tmp_path / "peers", PACKAGES, said.append)
    assert asked == [] and len(said) == 1


def test_a_billion_rows_take_no_disk_and_are_read_as_any_other(tmp_path: Path) -> None:
    data.write_sparse(tmp_path)
    assert data._is_whole(tmp_path / "ours")
    shards = ShardSet.open(tmp_path / "ours", check_crc=False)
    assert sum((shard.tokens - 1) // data.SEQ_LEN for shard in shards.manifest.shards) == data.HUGE_ROWS
    assert shards.read(999, shards.manifest.shards[999].tokens - 5, 5).tolist() == [0] * 5
    taken = {(status := path.stat()).st_ino: 512 * status.st_blocks for path in (tmp_path / "ours").iterdir()}
    assert sum(taken.values()) < 10 * 2**20
