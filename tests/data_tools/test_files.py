"""The user's files as they are on disk: which are read, which are skipped and reported, and their names."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.corpus import SPLITS, build_corpus, read_split
from data_tools.encode import encode_corpus
from data_tools.encode_files import encode_files
from data_tools.files import TextFile, find_files
from data_tools.texts import LeftOut, cut, texts
from data_tools.train_tokenizer import train_tokenizer
from kha_train.errors import ConfigError, DataError

LINE = b'{"text": "one"}\n'
SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".ndjson")


def names(root: Path) -> list[str]:
    return [file.name for file in find_files([root], "text").files]


def read_all(root: Path, field: str = "text", skip_bad_lines: bool = False) -> tuple[list[str], LeftOut]:
    left_out = LeftOut(skip_bad_lines)
    files = find_files([root], "text", field).files
    pieces = [piece for file in files for piece in cut(file, 1 << 20)]
    return [text for piece in pieces for text in texts(piece, left_out, lambda amount: None)], left_out


def test_hidden_files_and_folders_are_passed_over_counted_and_named(tmp_path: Path) -> None:
    root = tmp_path / "docs"
    hidden = [".git/HEAD.txt", ".ipynb_checkpoints/a.md", ".venv/lib/x.py", "__MACOSX/._a.txt", "deep/._a.jsonl"]
    for name in (*hidden, ".secrets.txt", "a.txt", "deep/b.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(LINE)
    found = find_files([root], "text")
    assert [file.name for file in found.files] == ["docs/a.txt", "docs/deep/b.jsonl"]
    assert sorted(found.hidden) == [
        "docs/.git", "docs/.ipynb_checkpoints", "docs/.secrets.txt", "docs/.venv", "docs/__MACOSX",
        "docs/deep/._a.jsonl",
    ]  # fmt: skip
    (line,) = found.passed_over()
    assert line.startswith("6 hidden files and directories left out: docs/.") and line.endswith(", ...")
    description = build_corpus(tmp_path / "corpus", standard_library=False, extra_roots=[root])
    assert description["hidden"] == {"count": 6, "first": found.hidden} and description["documents"] == 2


def test_a_hidden_root_that_is_named_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".notes").mkdir()
    (tmp_path / ".notes" / "a.txt").write_text("one")
    (tmp_path / ".b.txt").write_text("two")
    found = find_files([tmp_path / ".notes", tmp_path / ".b.txt"], "text")
    assert [file.name for file in found.files] == [".notes/a.txt", ".b.txt"] and not found.hidden


def test_a_link_counts_by_its_own_name_as_in_a_cache_of_downloads(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "0a1b2c").write_bytes(LINE)
    (blobs / "3d4e5f").write_bytes(gzip.compress(LINE))
    (snapshot / "train.jsonl").symlink_to(blobs / "0a1b2c")
    (snapshot / "more.jsonl.gz").symlink_to(blobs / "3d4e5f")
    (tmp_path / "data").symlink_to(snapshot)
    assert names(snapshot / "train.jsonl") == ["train.jsonl"]
    assert names(tmp_path / "data") == ["data/more.jsonl.gz", "data/train.jsonl"]
    assert read_all(tmp_path / "data")[0] == ["one", "one"]


def test_no_text_says_what_was_seen_and_what_is_read(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", "c.tar.gz", "README", ".hidden.txt"):
        (tmp_path / name).write_bytes(b"a,b\n")
    with pytest.raises(ConfigError) as caught:
        find_files([tmp_path], "text")
    told = str(caught.value)
    assert "4 files of other kinds left out: 2 .csv" in told and "1 .tar.gz" in told and "1 without a suffix" in told
    assert ".hidden.txt" in told
    assert all(suffix in told for suffix in (*SUFFIXES, ".parquet", ".json", ".gz", ".zst"))


def test_json_is_read_when_it_holds_lines_and_left_alone_when_it_is_one_value(tmp_path: Path) -> None:
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(LINE * 2))
    (tmp_path / "plain.JSON").write_bytes(LINE.rstrip())
    (tmp_path / "package.json").write_text(json.dumps({"name": "x"}, indent=1))
    (tmp_path / "array.json").write_text(json.dumps([{"text": "one"}]))
    found = find_files([tmp_path], "text")
    assert [file.path.name for file in found.files] == ["c4.json.gz", "plain.JSON"] and found.others == {".json": 2}
    assert read_all(tmp_path)[0] == ["one"] * 3


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stem=st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8),
    suffix=st.sampled_from(SUFFIXES),
    packed=st.booleans(),
    cases=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_the_case_of_a_suffix_does_not_matter(
    tmp_path: Path, stem: str, suffix: str, packed: bool, cases: list[bool]
) -> None:
    whole = suffix + (".gz" if packed else "")
    spelled = "".join(letter.upper() if up else letter for letter, up in zip(whole, cases, strict=False))
    spelled += whole[len(spelled) :]
    path = tmp_path / f"x{stem}{spelled}"
    path.write_bytes(gzip.compress(LINE) if packed else LINE)
    try:
        assert names(path) == [path.name]
        expected = "one" if suffix in (".jsonl", ".ndjson") else LINE.decode()
        assert read_all(path)[0] == [expected]
    finally:
        path.unlink()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    (directory / "words.jsonl").write_text("".join(f'{{"text": "word {n} of many"}}\n' for n in range(300)))
    build_corpus(directory / "corpus", standard_library=False, extra_roots=[directory / "words.jsonl"])
    train_tokenizer(directory / "corpus", directory / "t.model", vocab_size=290)
    return directory / "t.model"


def test_names_and_fields_that_utf8_cannot_express_pass_every_command(model: Path, tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"caf\xe9")
    root.mkdir()
    (root / os.fsdecode(b"na\xefve.txt")).write_text("one")
    lines = [{"text": f"text {n}", "path": "\ud800", "other": "\udfff"} for n in range(200)]
    (root / "a.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    build_corpus(tmp_path / "corpus", standard_library=False, extra_roots=[root])
    paths = {document.path for split in SPLITS for document in read_split(tmp_path / "corpus", split)}
    # Escaped, with the very bytes (Latin-1 of é and ï, UTF-16 of the surrogate) to be seen.
    assert "caf\\xe9/na\\xefve.txt" in paths and "caf\\xe9/a.jsonl#\\ud800" in paths
    made = encode_files([root], model, tmp_path / "files", validation_percent=20)
    assert made["train"].documents + made["validation"].documents == 201
    assert made["train"].corpus["roots"] == ["caf\\xe9"]


def test_a_corpus_with_an_odd_name_is_tokenised(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "notes"
    root.mkdir()
    for number in range(120):
        (root / os.fsdecode(b"caf\xe9 %d.txt" % number)).write_text(f"number {number}")
    build_corpus(tmp_path / "corpus", standard_library=False, extra_roots=[root])
    made = encode_corpus(tmp_path / "corpus", model, tmp_path / "out")
    assert made["train"].documents + made["validation"].documents == 120


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\xef\xbb\xbf")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + LINE)
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf"))
    assert read_all(tmp_path)[0] == ["one\ufeff", "one"], "only the first one is a mark"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_the_last_line_needs_no_newline(tmp_path: Path, name: str) -> None:
    data = LINE + b'{"text": "two"}'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_all(tmp_path / name)[0] == ["one", "two"]


BAD = [b"{\n", b"[1]\n", b'"text"\n', b'{"other": 1}\n', b'{"text": 3}\n', b'{"text": "\\ud800"}\n', b"\xff\n"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.sampled_from([LINE, b"\n", *BAD]), min_size=1, max_size=30), size=st.integers(1, 200))
def test_bad_lines_are_passed_over_when_asked_counted_and_listed_by_their_number(
    tmp_path: Path, lines: list[bytes], size: int
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    bad = [number for number, line in enumerate(lines, start=1) if line in BAD]
    left_out = LeftOut(skip_bad_lines=True)
    pieces = list(cut(TextFile("a.jsonl", path), size))
    found = [text for piece in pieces for text in texts(piece, left_out, lambda amount: None)]
    assert found == ["one"] * lines.count(LINE)
    assert left_out.bad_lines == len(bad)
    assert [int(line.split("line ")[1].split()[0]) for line in left_out.listed] == bad[:20]
    if bad:
        with pytest.raises(DataError, match=f"line {bad[0]} .*--skip-bad-lines"):
            [text for piece in pieces for text in texts(piece, LeftOut(), lambda amount: None)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_encoding_says_which_lines_it_left_out(model: Path, tmp_path: Path, workers: int) -> None:
    good = [f'{{"text": "text {n}"}}\n'.encode() for n in range(60)]
    (tmp_path / "a.jsonl").write_bytes(b"".join([*good[:30], b"{\n", *good[30:], b'{"text": 3}\n']))
    said: list[str] = []
    how = {"validation_percent": 20, "shard_bytes": 300, "workers": workers, "drop_repeated": True}
    made = encode_files([tmp_path / "a.jsonl"], model, tmp_path / "out", **how, skip_bad_lines=True, say=said.append)
    assert made["train"].documents + made["validation"].documents == 60
    assert "2 bad lines left out" in said and any("a.jsonl: line 31 is not JSON" in line for line in said)
    assert any("a.jsonl: line 62 is not an object with a text" in line for line in said)
    description = build_corpus(
        tmp_path / "corpus", standard_library=False, extra_roots=[tmp_path / "a.jsonl"], skip_bad_lines=True
    )
    assert description["bad_lines"]["count"] == 2 and len(description["bad_lines"]["first"]) == 2


def test_a_field_inside_a_field_is_named_with_dots_and_a_name_with_a_dot_wins(tmp_path: Path) -> None:
    lines = [
        {"meta": {"text": "in"}},
        {"meta.text": "out", "meta": {"text": "no"}},
        {"meta": None},
        {"meta": {"text": None}},
    ]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert read_all(tmp_path, "meta.text")[0] == ["in", "out"]
    (tmp_path / "a.jsonl").write_text('{"meta": {"other": 1}}\n')
    with pytest.raises(DataError, match=r"line 1 is not an object with a text in the field 'meta\.text'"):
        read_all(tmp_path, "meta.text")


@pytest.mark.parametrize(("window_log", "read"), [(27, True), (28, False), (31, False)])
def test_a_zstd_frame_packed_with_a_long_window_gets_advice_that_works(
    tmp_path: Path, window_log: int, read: bool
) -> None:
    pytest.importorskip("pyarrow")
    # RFC 8878: magic, frame header without flags, window descriptor, header of one raw last block, its bytes.
    window = bytes([(window_log - 10) << 3])
    frame = b"\x28\xb5\x2f\xfd\x00" + window + (1 | len(LINE) << 3).to_bytes(3, "little") + LINE
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    if read:
        assert read_all(tmp_path)[0] == ["one"]
    else:
        with pytest.raises(DataError, match=r"window is above 128 MiB.*zstd -d --long=31"):
            read_all(tmp_path)
