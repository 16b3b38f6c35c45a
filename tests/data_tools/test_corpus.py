"""The corpus: the same text in, the same files out, and every document in its place."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path

import pytest

from data_tools.corpus import SPLITS, build_corpus, read_split, split_of
from kha_train.errors import ConfigError, DataError


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_standard_library_gives_the_same_corpus_twice_without_tests_and_strangers(tmp_path: Path) -> None:
    description = build_corpus(tmp_path / "a")
    assert build_corpus(tmp_path / "b") == description
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    documents = {split: list(read_split(tmp_path / "a", split)) for split in SPLITS}
    paths = [document.path for split in SPLITS for document in documents[split]]
    assert "json/decoder.py" in paths and len(set(paths)) == len(paths) == description["documents"]
    folders = {part for path in paths for part in path.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
    assert not [path for path in paths if path.split("/")[-1].startswith("_sysconfigdata")]
    for split in SPLITS:
        assert [d.path for d in documents[split]] == sorted(d.path for d in documents[split])
        assert {split_of(d.path) for d in documents[split]} == {split}
    decoder = Path(sysconfig.get_paths()["stdlib"], "json", "decoder.py").read_bytes().decode()
    assert decoder in [d.text for d in documents["train"] + documents["validation"] if d.path == "json/decoder.py"]


def test_the_split_is_the_hash_of_the_path_modulo_100() -> None:
    for path in ("a.py", "json/decoder.py", "notes/ü.txt"):
        expected = int.from_bytes(hashlib.sha256(path.encode()).digest(), "big") % 100 < 2
        assert (split_of(path) == "validation") is expected
    share = sum(split_of(f"{i}.txt") == "validation" for i in range(20_000)) / 20_000
    assert 0.016 < share < 0.024


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    root = tmp_path / "notes"
    (root / "tests").mkdir(parents=True)
    (root / "b.txt").write_bytes(b"zwei\r\n")
    (root / "a.md").write_text("eins")
    (root / "copy.txt").write_text("eins")
    (root / "empty.txt").write_text("")
    (root / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (root / "picture.png").write_bytes(b"text")
    (root / "tests" / "kept.txt").write_text("drei")
    (root / "rows.jsonl").write_text('{"text": "vier"}\n\n{"text": "fünf", "path": "named"}\n')
    return root


def test_own_text_is_taken_once_as_it_is_and_what_is_left_out_is_counted(notes: Path, tmp_path: Path) -> None:
    description = build_corpus(tmp_path / "c", standard_library=False, extra_roots=[notes])
    documents = [d for split in SPLITS for d in read_split(tmp_path / "c", split)]
    assert {d.path: d.text for d in documents} == {
        "notes/a.md": "eins",
        "notes/b.txt": "zwei\r\n",
        f"sha256:{hashlib.sha256(b'vier').hexdigest()}": "vier",
        "notes/rows.jsonl#named": "fünf",
        "notes/tests/kept.txt": "drei",
    }
    assert (description["repeated"], description["not_utf8"]) == (1, ["notes/latin.txt"])
    assert description["other_kinds"] == 1, "the picture"
    assert description["bytes"] == sum(len(d.text.encode()) for d in documents)
    assert json.loads((tmp_path / "c" / "corpus.json").read_text()) == description


def test_one_changed_letter_changes_the_hash_and_no_other_documents_split(notes: Path, tmp_path: Path) -> None:
    before = build_corpus(tmp_path / "a", standard_library=False, extra_roots=[notes])
    (notes / "b.txt").write_text("Zwei")
    after = build_corpus(tmp_path / "b", standard_library=False, extra_roots=[notes])
    assert before["sha256"] != after["sha256"]
    (notes / "more.txt").write_text("sechs")
    build_corpus(tmp_path / "d", standard_library=False, extra_roots=[notes])
    for split in SPLITS:
        assert {d.path for d in read_split(tmp_path / "b", split)} <= {
            d.path for d in read_split(tmp_path / "d", split)
        }


@pytest.mark.parametrize("line", ["{", "[]", '"text"', '{"txt": "a"}', '{"text": 3}', '{"text": "\\ud800"}', "null"])
def test_a_line_without_text_is_a_data_error_that_names_it(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match="rows.jsonl: line 2 "):
        build_corpus(tmp_path / "c", standard_library=False, extra_roots=[tmp_path / "rows.jsonl"])
    assert not (tmp_path / "c" / "corpus.json").exists()


def test_missing_equal_and_empty_roots_are_configuration_errors(notes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such"):
        build_corpus(tmp_path / "c", standard_library=False, extra_roots=[tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="the same name"):
        build_corpus(tmp_path / "c", standard_library=False, extra_roots=[notes, notes])
    with pytest.raises(ConfigError, match="no text"):
        build_corpus(tmp_path / "c", standard_library=False)
    with pytest.raises(ConfigError, match="kha data corpus"):
        list(read_split(tmp_path / "nowhere", "train"))


def test_a_line_put_before_others_moves_none_of_them(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(400)]
    splits = []
    for name, lines in (("a", texts), ("b", ["one more", *texts])):
        root = tmp_path / name / "rows.jsonl"
        root.parent.mkdir()
        root.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
        build_corpus(tmp_path / name / "c", standard_library=False, extra_roots=[root])
        splits.append({d.text: split for split in SPLITS for d in read_split(tmp_path / name / "c", split)})
    assert all(splits[1][text] == split for text, split in splits[0].items())
    assert set(splits[0].values()) == set(SPLITS)


def test_a_corpus_that_is_there_is_never_lost_by_a_mistake(notes: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "train.jsonl").write_text('{"text": "mine"}\n')
    before = contents(own)
    with pytest.raises(ConfigError, match="--overwrite"):
        build_corpus(own, standard_library=False, extra_roots=[notes])
    with pytest.raises(ConfigError, match="no such"):
        build_corpus(own, standard_library=False, extra_roots=[tmp_path / "nowhere"], overwrite=True)
    with pytest.raises(ConfigError, match="would be overwritten"):
        build_corpus(own, standard_library=False, extra_roots=[own], overwrite=True)
    (notes / "z.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="z.jsonl: line 1 is not JSON"):
        build_corpus(own, standard_library=False, extra_roots=[notes], overwrite=True)
    assert contents(own) == before, "a collecting that failed leaves what was there"


def test_a_file_of_another_kind_is_refused_when_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\na\n")
    with pytest.raises(ConfigError, match=r"not a supported kind.*\.jsonl"):
        build_corpus(tmp_path / "c", standard_library=False, extra_roots=[tmp_path / "rows.csv"])


def test_the_text_may_be_in_another_field(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"content": "here", "text": 3}\n{"content": null}\n')
    build_corpus(tmp_path / "c", standard_library=False, extra_roots=[tmp_path / "rows.jsonl"], field="content")
    assert [d.text for d in read_split(tmp_path / "c", "train") if d.text] == ["here"]
