"""Encoding a user's files in place: every text once, in order, the same files for any number of processes."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools import encode, texts
from data_tools.corpus import build_corpus
from data_tools.encode import encode_corpus
from data_tools.encode_files import encode_files, plan_units
from data_tools.files import TextFile, find_files
from data_tools.texts import LeftOut, cut
from data_tools.train_tokenizer import train_tokenizer
from kha_train.data.format.shards import ShardSet
from kha_train.data.tokenizer_kinds import open_tokenizer
from kha_train.errors import ConfigError, DataError

pyarrow = pytest.importorskip("pyarrow")
SPLITS = ("train", "validation")


def text_of(kind: str, number: int) -> str:
    return f"{kind} {number}: Grüße ▁ \r\n" * (1 + number % 7)


def rows(kind: str, count: int) -> list[str]:
    return [text_of(kind, number) for number in range(count)]


def as_jsonl(every: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in every)


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every kind of file there is, and some that are left out."""
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("notes") / "notes"
    (root / "deep").mkdir(parents=True)
    (root / "a.jsonl").write_bytes(as_jsonl(rows("plain", 120)) + b"\n" + as_jsonl([""]))
    (root / "b.jsonl.gz").write_bytes(gzip.compress(as_jsonl(rows("gzip", 30))))
    packed = pyarrow.output_stream(str(root / "c.jsonl.zst"), compression="zstd")
    packed.write(as_jsonl(rows("zstd", 30)))
    packed.close()
    table = pyarrow.table({"text": [*rows("parquet", 40), None, ""], "other": [0] * 42})
    parquet.write_table(table, root / "d.parquet", row_group_size=10)
    (root / "deep" / "one.md").write_bytes(text_of("file", 1).encode())
    (root / "deep" / "two.txt.gz").write_bytes(gzip.compress(text_of("file", 2).encode()))
    (root / "deep" / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (root / "picture.png").write_bytes(b"text")
    return root


EXPECTED = [*rows("plain", 120), *rows("gzip", 30), *rows("zstd", 30), *rows("parquet", 40), text_of("file", 1)]
EXPECTED += [text_of("file", 2)]


@pytest.fixture(scope="module")
def model(notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build_corpus(directory / "corpus", standard_library=False, extra_roots=[notes])
    train_tokenizer(directory / "corpus", directory / "tokenizer.model", vocab_size=300)
    return directory / "tokenizer.model"


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def documents(directory: Path) -> list[str]:
    """The documents of a dataset, decoded."""
    opened = ShardSet.open(directory)
    tokenizer, found = open_tokenizer(opened.check_tokenizer()), []
    for index, shard in enumerate(opened.manifest.shards):
        start = 0
        for end in opened.document_ends(index, 0, shard.tokens).tolist():
            found.append(tokenizer.decode(opened.read(index, start, end - start)))
            start = end
    return found


def is_validation(text: str, percent: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < percent / 100 * 2**64


@pytest.mark.parametrize("shard_bytes", [1, 3000, 10**9])
def test_every_text_of_every_kind_of_file_is_there_once_and_in_order(
    notes: Path, model: Path, tmp_path: Path, shard_bytes: int
) -> None:
    said: list[str] = []
    made = encode_files([notes], model, tmp_path, validation_percent=20, shard_bytes=shard_bytes, say=said.append)
    train, validation = (documents(tmp_path / split) for split in SPLITS)
    assert validation == [text for text in EXPECTED if is_validation(text, 20)] and len(validation) > 5
    assert train == [text for text in EXPECTED if not is_validation(text, 20)]
    assert said == ["1 files of other kinds left out: 1 .png", "left out, not UTF-8: notes/deep/latin.txt"]
    assert made["train"].text_bytes == sum(len(text.encode()) for text in train)


def test_one_process_and_two_write_the_same_files(notes: Path, model: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        encode_files([notes], model, tmp_path / str(workers), shard_bytes=2000, workers=workers, drop_repeated=True)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert "train/shard-00003.tok" in files(tmp_path / "1")


@pytest.mark.parametrize("workers", [1, 2])
def test_only_the_first_of_equal_texts_stays_wherever_they_lie(model: Path, tmp_path: Path, workers: int) -> None:
    root = tmp_path / "text"
    root.mkdir()
    (root / "a.jsonl").write_bytes(as_jsonl(["one", "two", "one", "three"]))
    (root / "b.jsonl.gz").write_bytes(gzip.compress(as_jsonl(["two", "four", "four", "five"])))
    (root / "c.txt").write_text("three")
    said: list[str] = []
    how = {"validation_percent": 50, "shard_bytes": 20, "workers": workers}
    encode_files([root], model, tmp_path / "out", **how, drop_repeated=True, say=said.append)
    found = [documents(tmp_path / "out" / split) for split in SPLITS]
    assert sorted([*found[0], *found[1]]) == sorted(["one", "two", "three", "four", "five"])
    assert said == ["4 texts left out as duplicates of earlier ones"]
    encode_files([root], model, tmp_path / "all", **how)
    every = [documents(tmp_path / "all" / split) for split in SPLITS]
    assert len(every[0]) + len(every[1]) == 9 and not set(every[0]) & set(every[1])


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_encoding_goes_on_and_writes_the_same_files(
    notes: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    how = {"shard_bytes": 2000, "drop_repeated": True}
    encode_files([notes], model, tmp_path / "straight", **how)

    def write_or_die(unit, *rest, **more):
        if unit.number == 3:
            raise KeyboardInterrupt
        return original(unit, *rest, **more)

    original = encode.encode_unit
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(encode, "encode_unit", write_or_die)
        encode_files([notes], model, tmp_path / "stopped", **how)
    (beside,) = (tmp_path / "stopped").glob(".train-validation.writing-*/train")
    (beside / "shard-00001.tok").write_bytes(b"damaged meanwhile")
    kept = (beside / "shard-00000.tok").stat().st_ino
    said: list[str] = []
    encode_files([notes], model, tmp_path / "stopped", **how, workers=workers, say=said.append)
    assert files(tmp_path / "stopped") == files(tmp_path / "straight")
    assert (tmp_path / "stopped" / "train" / "shard-00000.tok").stat().st_ino == kept
    assert any("2 of " in text and "already finished" in text for text in said)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("drop_repeated", [False, True])
def test_progress_counts_every_byte_of_the_files(
    notes: Path, model: Path, tmp_path: Path, workers: int, drop_repeated: bool
) -> None:
    told: list[int] = []
    how = {"shard_bytes": 3000, "workers": workers, "drop_repeated": drop_repeated}
    encode_files([notes], model, tmp_path, **how, progress=told.append)
    size = sum(file.path.stat().st_size for file in find_files([notes], "text").files)
    assert sum(told) == size * (2 if drop_repeated else 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.text(max_size=20), min_size=1, max_size=30),
    size=st.integers(1, 300),
    ending=st.sampled_from([b"\n", b""]),
)
def test_lines_cut_anywhere_are_each_read_once(tmp_path: Path, lines: list[str], size: int, ending: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(as_jsonl(lines).removesuffix(b"\n") + ending)
    left_out = LeftOut()
    pieces = list(cut(TextFile("lines.jsonl", path), size))
    assert sum(piece.bytes for piece in pieces) == path.stat().st_size
    told: list[int] = []
    found = [text for piece in pieces for text in texts.texts(piece, left_out, told.append)]
    assert found == [text for text in lines if text] and left_out == LeftOut() and sum(told) == path.stat().st_size


def test_a_bad_line_is_named_by_its_number_in_the_file_wherever_it_was_cut(model: Path, tmp_path: Path) -> None:
    lines = as_jsonl(rows("plain", 20)) + b'{"text": 3}\n' + as_jsonl(rows("more", 5))
    for name, data in (("bad.jsonl", lines), ("bad.jsonl.gz", gzip.compress(lines))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}: line 21 is not an object with a text") as caught:
            encode_files([tmp_path / name], model, tmp_path / "out", shard_bytes=300)
        assert caught.value.exit_code == 4
        assert not list((tmp_path / "out").rglob("manifest.json"))


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.jsonl.zst", "cut.parquet"])
def test_a_file_that_is_cut_off_stops_with_its_name(notes: Path, model: Path, tmp_path: Path, name: str) -> None:
    whole = next(path for path in notes.iterdir() if path.name.endswith(name[3:]))
    (tmp_path / name).write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"{name}.*cannot be read"):
        encode_files([tmp_path / name], model, tmp_path / "out", validation_percent=50)


def test_a_column_without_text_is_refused(model: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match=r"n\.parquet = .int64.: its column .text. does not hold text"):
        encode_files([tmp_path / "n.parquet"], model, tmp_path / "out")


def test_a_file_that_changed_meanwhile_is_encoded_anew(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "text"
    root.mkdir()
    for name in "ab":
        (root / f"{name}.jsonl").write_bytes(as_jsonl(rows(name, 30)))
    units = plan_units(find_files([root], "text").files, 500)
    os.utime(root / "b.jsonl", ns=(0, 0))
    again = plan_units(find_files([root], "text").files, 500)
    same = [a.identity == b.identity for a, b in zip(units, again, strict=True)]
    assert all(equal == (unit.pieces[-1].file.name == "text/a.jsonl") for equal, unit in zip(same, units, strict=True))


def test_a_corpus_and_its_files_give_the_same_ids(notes: Path, model: Path, tmp_path: Path) -> None:
    """One way makes a copy of the text first and splits by paths; what is encoded is the same."""
    build_corpus(tmp_path / "corpus", standard_library=False, extra_roots=[notes])
    encode_corpus(tmp_path / "corpus", model, tmp_path / "a")
    encode_files([notes], model, tmp_path / "b")
    first, second = ([text for split in SPLITS for text in documents(tmp_path / way / split)] for way in "ab")
    assert sorted(first) == sorted(second) == sorted(EXPECTED)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"validation_percent": 0}, "validation_percent = 0"),
        ({"validation_percent": 1e-9}, "no text for validation"),
        ({"encoder": "other"}, "no such encoder"),
    ],
)
def test_what_cannot_be_done_is_told(notes: Path, model: Path, tmp_path: Path, how: dict, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        encode_files([notes], model, tmp_path, **how)
    assert not list(tmp_path.rglob("manifest.json"))


def test_files_that_are_not_there_and_directories_without_text_are_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or directory"):
        encode_files([tmp_path / "nowhere"], model, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no text found"):
        encode_files([tmp_path / "empty"], model, tmp_path / "out")
