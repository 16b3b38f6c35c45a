"""Texts in Parquet files, whatever type their column has, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.files import TextFile
from data_tools.parquet import read_parquet
from kha_train.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
TEXTS = ["one", None, "", "zwei ü", "one"]


def write(path: Path, column: object, name: str = "text", **how: object) -> TextFile:
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({name: column}), path, **how)
    return TextFile(path.name, path, name)


def all_texts(file: TextFile) -> list[str | None]:
    return [text for _, some in read_parquet(file) for text in some]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_a_column_of_any_type_of_text_is_read(tmp_path: Path, kind: object) -> None:
    file = write(tmp_path / "a.parquet", pyarrow.array(TEXTS, pyarrow.string()).cast(kind), row_group_size=2)
    assert all_texts(file) == TEXTS
    assert [group for group, _ in read_parquet(file)] == [0, 1, 2]
    assert [text for _, some in read_parquet(file, range(1, 2)) for text in some] == TEXTS[2:4]


@pytest.mark.parametrize(
    "column",
    [pyarrow.array([1]), pyarrow.array([b"a"]), pyarrow.array([1]).dictionary_encode()],
    ids=["number", "bytes", "dictionary of numbers"],
)
def test_a_column_of_anything_else_is_refused_with_its_type(tmp_path: Path, column: object) -> None:
    file = write(tmp_path / "a.parquet", column)
    with pytest.raises(DataError, match="does not hold text"):
        all_texts(file)


def test_a_field_inside_a_structure_is_read(tmp_path: Path) -> None:
    rows = [{"text": "in", "n": 1}, None, {"text": None, "n": 2}, {"text": "two", "n": 3}]
    write(tmp_path / "a.parquet", rows, "meta")
    assert all_texts(TextFile("a.parquet", tmp_path / "a.parquet", "meta.text")) == ["in", None, None, "two"]
    for field in ("meta.other", "other.text", "meta.text.more", "meta"):
        with pytest.raises(DataError, match=r"does not have exactly one column|does not hold text"):
            all_texts(TextFile("a.parquet", tmp_path / "a.parquet", field))


MEMORY = """
import resource, sys
from pathlib import Path
import pyarrow
from pyarrow import parquet
from data_tools.files import TextFile
from data_tools.parquet import read_parquet
list(read_parquet(TextFile("small", Path(sys.argv[2]))))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
size = sum(len(text) for _, some in read_parquet(TextFile("large", Path(sys.argv[1]))) for text in some)
print(size, peak() - before)
"""


@pytest.mark.slow
def test_a_large_row_group_is_never_held_whole(tmp_path: Path) -> None:
    import numpy as np

    letters = np.random.default_rng(0).integers(97, 123, (120, 1 << 20), dtype=np.uint8)
    write(tmp_path / "large.parquet", [row.tobytes().decode() for row in letters], row_group_size=120)
    write(tmp_path / "small.parquet", ["one"])
    where = [str(tmp_path / "large.parquet"), str(tmp_path / "small.parquet")]
    answer = subprocess.run([sys.executable, "-c", MEMORY, *where], capture_output=True, text=True, check=True)
    size, megabytes = map(int, answer.stdout.split())
    assert size == 120 << 20 and megabytes < 80, "120 MB of text in one row group"
