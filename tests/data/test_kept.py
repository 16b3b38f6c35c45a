"""Arrays made once: mapped afterwards, made again when damaged, by one of several processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

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
