"""The columns of a record and their cache agree with the lines, whatever happened to either file."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.errors import DataError, KhaError
from kha_train.record import columns_twin, read_metrics
from kha_train.record.columns import COLUMNS, Columns, columns_of
from kha_train.record.columns_twin import TWIN_FILE, load_twin, read_columns, save_twin
from kha_train.record.jsonl import parse, parse_all, to_line, whole_blocks, whole_until
from kha_train.record.reader import METRICS_FILE

FLOATS = st.floats(width=32) | st.integers(-5, 5)
LINES = st.lists(
    st.fixed_dictionaries(
        {"train/loss": FLOATS},
        optional={
            "attempt": st.integers(0, 3),
            "tokens": st.integers(0, 2**53),
            "samples_first": st.integers(0, 2**53),
            "train/grad_norm": FLOATS,
            "validation/loss": FLOATS,
            "moe/maxvio_by_layer": st.lists(st.floats(0, 9), max_size=3),
            "foreign": st.none() | st.text(max_size=5),
        },
    ),
    max_size=30,
).map(lambda lines: [{"step": step, **line} for step, line in enumerate(lines, 1)])


def line(step: int, loss: float = 2.5) -> dict[str, Any]:
    return {"step": step, "attempt": 1, "samples_first": 8 * step, "train/loss": loss, "train/lr": 1 / step}


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / METRICS_FILE).write_bytes(b"".join(map(to_line, lines)))
    return folder


def same(one: Columns, other: Columns) -> bool:
    return all(
        np.array_equal(left, right, equal_nan=left.dtype == np.float64)
        for left, right in zip(vars(one).values(), vars(other).values(), strict=True)
    )


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small blocks, and a twin for every record; the list grows by how many lines are parsed of each block."""
    counts: list[int] = []
    objects = columns_twin.objects
    monkeypatch.setattr(columns_twin, "BLOCK", 1000)
    monkeypatch.setattr(columns_twin, "WORTH", 0)

    def counted(path: Path, content: bytes, number: int) -> list[dict[str, Any]]:
        found = objects(path, content, number)
        counts.append(len(found))
        return found

    monkeypatch.setattr(columns_twin, "objects", counted)
    return counts


@settings(deadline=None)
@given(lines=LINES)
def test_columns_hold_what_the_lines_say_and_nothing_where_they_say_nothing(
    lines: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write(tmp_path_factory.mktemp("run"), lines)
    columns, read = read_columns(folder), read_metrics(folder)
    assert len(columns) == len(read) == len(lines)
    for name in COLUMNS:
        assert columns.has(name).tolist() == [name in one for one in read]
        expected = [float(one.get(name, math.nan)) for one in read]
        assert repr(columns[name].tolist()) == repr(expected)
    assert columns.whole("tokens", -7).tolist() == [one.get("tokens", -7) for one in read]
    assert repr(columns.lines(folder / METRICS_FILE, 3, 5)) == repr(read[2:5])


PARTS = [b'{"a": 1}', b"\n", b"\0", b"7", b'{"a', b"\n\n", b" "]


@settings(deadline=None)
@given(content=st.lists(st.sampled_from(PARTS), max_size=12).map(b"".join))
@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_blocks_of_a_growing_file_are_its_whole_lines(
    content: bytes, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "blocks"
    path.write_bytes(content)
    with path.open("rb") as file:
        blocks = list(whole_blocks(file, 0, size))
    assert b"".join(block for _, block in blocks) == content[: whole_until(content)]
    assert all(content[start : start + len(block)] == block for start, block in blocks)


PIECES = ['{"a": 1}', '{"a": [{}', "{}]}", "{}, {}", "{}", '{"a": "nan"}', '{"b": "\\\\nan"}', "[]", "7", ""]
PIECES += ['{"a": NaN}', "{" + '"a": {' * 70 + "}" * 71, '"},{"', "]", "[", "{}, 0, {}"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES).map(str.encode), min_size=1, max_size=6))
def test_lines_parsed_together_are_what_each_is_by_itself(lines: list[bytes]) -> None:
    assert repr(parse_all(lines)) == repr([parse(one) for one in lines])


def test_a_record_is_parsed_once_and_then_what_was_added(tmp_path: Path, parsed: list[int]) -> None:
    write(tmp_path, [line(step) for step in range(1, 201)])
    first = read_columns(tmp_path)
    assert sum(parsed) == len(first) == 200
    parsed.clear()
    assert same(read_columns(tmp_path), first) and parsed == []
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.writelines(to_line(line(step)) for step in range(201, 211))
        file.write(to_line(line(211))[:-9])
    grown = read_columns(tmp_path)
    # What stood in the last block, of less than 1,000 bytes, is parsed again.
    assert len(grown) == 210 and 10 <= sum(parsed) < 10 + 1000 // len(to_line(line(150)))
    (tmp_path / TWIN_FILE).unlink()
    assert same(read_columns(tmp_path), grown)


def test_a_rewound_record_keeps_what_still_stands(tmp_path: Path, parsed: list[int]) -> None:
    write(tmp_path, [line(step) for step in range(1, 201)])
    read_columns(tmp_path)
    parsed.clear()
    write(tmp_path, [*(line(step) for step in range(1, 151)), *(line(step, 1.5) for step in range(151, 181))])
    again = read_columns(tmp_path)
    assert again["train/loss"].tolist() == [2.5] * 150 + [1.5] * 30
    assert sum(parsed) < 60


def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path: Path, parsed: list[int]) -> None:
    file = write(tmp_path, [line(step) for step in range(1, 201)]) / METRICS_FILE
    read_columns(tmp_path)
    before = file.stat()
    content = file.read_bytes()
    place = content.index(b"2.5", len(content) // 2)
    with file.open("r+b") as record:
        record.seek(place)
        record.write(b"9.5")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sorted(set(read_columns(tmp_path)["train/loss"])) == [2.5, 9.5]


def test_a_copied_run_directory_brings_its_twin(tmp_path: Path, parsed: list[int]) -> None:
    write(tmp_path / "a", [line(step) for step in range(1, 201)])
    first = read_columns(tmp_path / "a")
    copied = write(tmp_path / "b", [])
    for name in (METRICS_FILE, TWIN_FILE):
        (copied / name).write_bytes((tmp_path / "a" / name).read_bytes())
    parsed.clear()
    assert same(read_columns(copied), first)
    assert sum(parsed) < 20


def damaged(path: Path, draw: Callable[[int], int]) -> None:
    content = bytearray(path.read_bytes())
    content[draw(len(content))] ^= 1 + draw(255)
    path.write_bytes(content[: len(content) - draw(2) * draw(len(content))])


@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_twin_is_no_twin(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write(tmp_path_factory.mktemp("run"), [line(step) for step in range(1, 40)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_twin, "WORTH", 0)
        patch.setattr(columns_twin, "BLOCK", 1000)
        expected = read_columns(folder)
        damaged(folder / TWIN_FILE, lambda bound: data.draw(st.integers(0, bound - 1)))
        assert same(read_columns(folder), expected)


HEADS = [
    {"format": 2}, {"format": "1"}, {"columns": ["step"]}, {"stamp": [1, 2]}, {"blocks": []}, {"body": "x"},
    {"blocks": [[-1, 5, "0" * 64]]}, {"blocks": [[2**60, 2**60, "0" * 64]]}, {"blocks": [[10**400, 1, "0" * 64]]},
    {"blocks": {"a": 1}},
]  # fmt: skip


@pytest.mark.parametrize("change", HEADS, ids=str)
def test_a_hostile_head_is_no_twin(tmp_path: Path, change: dict[str, Any], parsed: list[int]) -> None:
    write(tmp_path, [line(step) for step in range(1, 40)])
    expected = read_columns(tmp_path)
    head, _, body = (tmp_path / TWIN_FILE).read_bytes().partition(b"\n")
    (tmp_path / TWIN_FILE).write_bytes(json.dumps(json.loads(head) | change).encode() + b"\n" + body)
    assert load_twin(tmp_path / TWIN_FILE, 10**6) is None
    assert same(read_columns(tmp_path), expected)


def forge(folder: Path, change: Callable[[Columns], None]) -> None:
    """A twin that is whole, whose sums are right, and whose numbers are not those of the record."""
    twin = load_twin(folder / TWIN_FILE, 10**6)
    assert twin is not None
    columns = Columns(*(part.copy() for part in vars(twin.columns).values()))
    change(columns)
    save_twin(folder / TWIN_FILE, columns_twin.Twin(twin.stamp, twin.blocks, columns), like=folder / METRICS_FILE)


def test_a_forged_twin_does_not_mislead(tmp_path: Path, parsed: list[int]) -> None:
    write(tmp_path, [line(step) for step in range(1, 201)])
    expected = read_columns(tmp_path)

    def spike(columns: Columns) -> None:
        columns["train/loss"][77] = 1e6

    def flatter(columns: Columns) -> None:
        columns["train/loss"][:] -= 0.5

    def renumber(columns: Columns) -> None:
        columns["step"][:] = columns["step"][::-1].copy()

    def undefine(columns: Columns) -> None:
        columns["tokens"][:] = 5

    def elsewhere(columns: Columns) -> None:
        columns.offsets_N1[5:] += 1

    def endless(columns: Columns) -> None:
        columns["attempt"][:] = math.inf

    for change in (spike, flatter, renumber, undefine, elsewhere, endless):
        forge(tmp_path, change)
        assert same(read_columns(tmp_path), expected), change.__name__
    assert load_twin(tmp_path / TWIN_FILE, 10**6) is not None


@pytest.mark.parametrize("name", ["train/loss", "tokens", "step"])
@pytest.mark.parametrize("value", ["abc", {"a": 1}, [1.5], True, 10**400, 2**60], ids=lambda value: str(value)[:5])
def test_a_twin_does_not_vouch_for_a_record_that_holds_no_number(
    tmp_path: Path, name: str, value: object, parsed: list[int]
) -> None:
    sound = [{**line(step), "tokens": 9 * step} for step in range(1, 40)]
    file = write(tmp_path, sound) / METRICS_FILE
    read_columns(tmp_path)
    file.write_bytes(b"".join(map(to_line, [{**sound[0], name: value}, *sound[1:]])))
    with pytest.raises(DataError) as expected:
        read_metrics(tmp_path)

    def claim(columns: Columns) -> None:
        ends = np.cumsum([len(one) for one in file.read_bytes().splitlines(keepends=True)])
        columns.offsets_N1[1:] = ends
        columns[name][0] = 1 if name == "step" or not isinstance(value, int) or value > 2**900 else value

    with file.open("rb") as record:
        stamp = columns_twin._stamp(record)
    twin = load_twin(tmp_path / TWIN_FILE, 10**6)
    assert twin is not None
    columns = Columns(*(part.copy() for part in vars(twin.columns).values()))
    claim(columns)
    block = columns_twin.Block(int(columns.offsets_N1[-1]), len(columns), "0" * 64)
    save_twin(tmp_path / TWIN_FILE, columns_twin.Twin(stamp, [block], columns), like=file)
    with pytest.raises(DataError) as found:
        read_columns(tmp_path)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("obstacle", ["directory", "fifo", "dangling", "device"])
def test_what_stands_in_the_place_of_the_twin_changes_nothing(tmp_path: Path, obstacle: str, parsed: list[int]) -> None:
    write(tmp_path, [line(step) for step in range(1, 40)])
    make = {
        "directory": lambda path: (path / "inside").mkdir(parents=True),
        "fifo": os.mkfifo,
        "dangling": lambda path: path.symlink_to("nowhere"),
        "device": lambda path: path.symlink_to("/dev/zero"),
    }
    make[obstacle](tmp_path / TWIN_FILE)
    assert read_columns(tmp_path)["train/loss"].tolist() == [2.5] * 39
    assert sorted(path.name for path in tmp_path.iterdir()) == [TWIN_FILE, METRICS_FILE]


def test_a_directory_that_cannot_be_written_gets_no_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parsed: list[int]
) -> None:
    write(tmp_path, [line(step) for step in range(1, 40)])

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(columns_twin.os, "replace", refuse)
    assert len(read_columns(tmp_path)) == 39
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_what_an_ended_reader_left_beside_the_twin_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parsed: list[int]
) -> None:
    write(tmp_path, [line(step) for step in range(1, 40)])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(columns_twin.os, "replace", interrupt)
        read_columns(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]
    names = [f"{TWIN_FILE}.{'a' * 16}.new", f"{TWIN_FILE}.{'b' * 16}.new", f"{TWIN_FILE}.mine.new"]
    for name, age in zip(names, (4000, 60, 4000), strict=True):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    read_columns(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {METRICS_FILE, TWIN_FILE, *names[1:]}


def test_several_readers_at_once_each_get_the_whole_record(tmp_path: Path, parsed: list[int]) -> None:
    write(tmp_path, [line(step) for step in range(1, 400)])
    results: list[Columns] = []
    readers = [threading.Thread(target=lambda: results.append(read_columns(tmp_path))) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(results) == 4 and all(same(one, results[0]) and len(one) == 399 for one in results)
    assert sorted(path.name for path in tmp_path.iterdir()) == [TWIN_FILE, METRICS_FILE]


def test_a_short_record_gets_no_twin(tmp_path: Path) -> None:
    write(tmp_path, [line(step) for step in range(1, 40)])
    read_columns(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


FAULTS = [b"{not json}\n", b"[]\n", b"\n", b'{"train/loss": 1}\n', b'{"step": 3}\n', b'{"step": 9e3}\n']
FAULTS += [b'{"step": 151, "train/loss": null}\n', b'{"step": 151, "tokens": 1.5}\n', b"\xff\n"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kept", [False, True])
def test_a_damaged_record_is_refused_in_the_same_words_with_and_without_a_twin(
    tmp_path: Path, fault: bytes, kept: bool, parsed: list[int]
) -> None:
    write(tmp_path, [line(step) for step in range(1, 151)])
    if kept:
        read_columns(tmp_path)
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(fault)
        file.writelines(to_line(line(step)) for step in range(152, 160))
    with pytest.raises(DataError) as expected:
        read_metrics(tmp_path)
    with pytest.raises(KhaError) as found:
        read_columns(tmp_path)
    assert str(found.value) == str(expected.value)


def test_columns_of_no_lines_are_empty(tmp_path: Path) -> None:
    assert len(read_columns(tmp_path)) == len(columns_of([])) == 0
    assert read_columns(tmp_path)["train/loss"].tolist() == []
