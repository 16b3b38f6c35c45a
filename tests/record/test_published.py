"""A directory gets its name when everything in it is written, and what cannot be renamed is refused before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kha_train.errors import ConfigError
from kha_train.record.files import published


def test_a_link_to_an_empty_directory_is_filled_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "out").symlink_to("large_disk")
    with published(tmp_path / "out", "--out") as beside:
        (beside / "file").write_text("written")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "large_disk/file").read_text() == "written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large_disk", "out"]


@pytest.mark.parametrize("place", [".", "", "a/..", "mounted"])
def test_what_no_rename_can_replace_is_refused_before_the_work(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    with pytest.raises(ConfigError, match="no rename can replace"), published(Path(place), "--out"):
        raise AssertionError("the block must not begin")
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_on_the_disk_before_the_directory_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    named = os.rename

    def rename(source: Path, target: Path) -> None:
        assert {path.stat().st_ino for path in source.rglob("*")} <= synced
        named(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with published(tmp_path / "out", "--out") as beside:
        (beside / "deep").mkdir()
        (beside / "deep" / "file").write_text("written")
    assert (tmp_path / "out/deep/file").is_file()
