"""Cached arrays: made once by one of several processes, memory-mapped afterwards, made again when damaged."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kha_train.data.format.canonical import sha256_of_file
from kha_train.data.kept import kept_arrays
from kha_train.errors import MachineError


class Maker:
    """Makes two arrays and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.times += 1
        return {"a": np.arange(1000), "b": np.ones((3, 4))}


def test_arrays_are_made_once_and_mapped_afterwards(tmp_path: Path) -> None:
    make = Maker()
    for _ in range(3):
        found = kept_arrays(tmp_path / "deep" / "table", make)
        assert {name: array.tolist() for name, array in found.items()} == {n: a.tolist() for n, a in Maker()().items()}
        assert all(isinstance(array, np.memmap) for array in found.values())
    assert make.times == 1


@pytest.mark.parametrize("name", ["a.npy", "b.npy", "digests.json"])
def test_what_is_damaged_is_made_again(tmp_path: Path, name: str) -> None:
    make = Maker()
    kept_arrays(tmp_path / "table", make)
    path = tmp_path / "table" / name
    path.write_bytes(path.read_bytes()[:-2] + b"??")
    assert kept_arrays(tmp_path / "table", make)["a"].tolist() == list(range(1000))
    assert make.times == 2


def test_one_of_several_makes_them_and_the_others_wait(tmp_path: Path) -> None:
    make = Maker()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: kept_arrays(tmp_path / "table", make)["a"].sum(), range(6)))
    assert found == [499_500] * 6 and make.times == 1


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match="cannot be written"):
        kept_arrays(tmp_path / "file" / "table", Maker())


@pytest.mark.parametrize("make", ["file", "link", "list", "elsewhere", "others", "link inside", "object array"])
def test_what_another_mind_left_there_is_made_again(tmp_path: Path, make: str) -> None:
    table, maker = tmp_path / "table", Maker()
    kept_arrays(table, maker)
    digests = table / "digests.json"
    if make == "file":
        shutil.rmtree(table)
        table.write_text("in the way")
    elif make == "link":
        table.rename(tmp_path / "moved")
        table.symlink_to(tmp_path / "moved")
    elif make == "list":
        digests.write_text("[1]")
    elif make == "elsewhere":
        np.save(tmp_path / "x.npy", np.arange(3))
        digests.write_text(json.dumps({"../x.npy": sha256_of_file(tmp_path / "x.npy")}))
    elif make == "others":
        digests.write_text(json.dumps({"a.npy": sha256_of_file(table / "a.npy")}))
    elif make == "link inside":
        (table / "a.npy").rename(tmp_path / "a.npy")
        (table / "a.npy").symlink_to(tmp_path / "a.npy")
    else:
        np.save(table / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
        digests.write_text(json.dumps({name: sha256_of_file(table / name) for name in ("a.npy", "b.npy")}))
    found = kept_arrays(table, maker, ("a", "b"))
    assert sorted(found) == ["a", "b"] and found["a"].tolist() == list(range(1000))
    assert maker.times == 2 and table.is_dir() and not table.is_symlink()
