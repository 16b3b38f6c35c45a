"""Encoding: every document whole and unchanged, the same files for any number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools import encode
from data_tools.corpus import build_corpus, read_split
from data_tools.encode import encode_corpus
from data_tools.files import TextFile
from data_tools.texts import cut
from data_tools.train_tokenizer import train_tokenizer
from kha_train.data import tokenizer as tokenizers
from kha_train.data.format.shards import ShardSet
from kha_train.data.tokenizer_kinds import open_tokenizer
from kha_train.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus written by hand, with a tokenizer.model beside it."""
    directory = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 60), ("validation", 9)):
        texts = [f"{split} {i}: Grüße ▁ \n" * (i % 13) for i in range(count)]
        lines = [json.dumps({"text": text, "path": str(i)}) + "\n" for i, text in enumerate(texts)]
        (directory / f"{split}.jsonl").write_text("".join(lines))
    train_tokenizer(directory, directory / "tokenizer.model", vocab_size=300)
    return directory


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_one_process_and_two_write_the_same_files(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        encode_corpus(corpus, corpus / "tokenizer.model", tmp_path / str(workers), shard_bytes=2000, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert "train/shard-00003.tok" in files(tmp_path / "1")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_encoding_goes_on_and_writes_the_same_files(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    encode_corpus(corpus, corpus / "tokenizer.model", tmp_path / "straight", shard_bytes=500)

    def write_or_die(unit, *rest, **more):
        if unit.number == 3:
            raise KeyboardInterrupt
        return original(unit, *rest, **more)

    original = encode.encode_unit
    with monkeypatch.context() as patched:
        patched.setattr(encode, "encode_unit", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            encode_corpus(corpus, corpus / "tokenizer.model", tmp_path / "stopped", shard_bytes=500)
    assert not (tmp_path / "stopped" / "train").exists()
    (beside,) = (tmp_path / "stopped").glob(".train-validation.writing-*/train")
    (beside / "shard-00001.tok").write_bytes(b"damaged meanwhile")
    (beside / "shard-00002.done").write_text("[]")
    kept = (beside / "shard-00000.tok").stat().st_ino
    encode_corpus(corpus, corpus / "tokenizer.model", tmp_path / "stopped", shard_bytes=500, workers=workers)
    assert files(tmp_path / "stopped") == files(tmp_path / "straight")
    assert (tmp_path / "stopped" / "train" / "shard-00000.tok").stat().st_ino == kept


@pytest.mark.parametrize("shard_bytes", [1, 2000, 10**9])
def test_every_document_decodes_to_its_text_and_ends_with_eos(corpus: Path, tmp_path: Path, shard_bytes: int) -> None:
    encode_corpus(corpus, corpus / "tokenizer.model", tmp_path, shard_bytes=shard_bytes)
    for split in ("train", "validation"):
        opened = ShardSet.open(tmp_path / split)
        tokenizer = open_tokenizer(opened.check_tokenizer())
        texts = []
        for index, shard in enumerate(opened.manifest.shards):
            start = 0
            for end in opened.document_ends(index, 0, shard.tokens).tolist():
                ids = opened.read(index, start, end - start)
                assert ids[-1] == tokenizer.special_ids["eos"]
                texts.append(tokenizer.decode(ids))
                start = end
        expected = [document.text for document in read_split(corpus, split) if document.text]
        assert texts == expected
        assert opened.manifest.text_bytes == sum(len(text.encode()) for text in expected)
        assert opened.token_counts().sum() == opened.manifest.tokens


@pytest.mark.parametrize("shard_bytes", [1, 100, 1000, 10**9])
def test_a_plan_covers_the_file_in_whole_lines(corpus: Path, shard_bytes: int) -> None:
    path = corpus / "train.jsonl"
    data = path.read_bytes()
    pieces = list(cut(TextFile("train.jsonl", path), shard_bytes))
    assert [piece.first for piece in pieces] == [0, *(piece.last for piece in pieces[:-1])]
    assert pieces[-1].last == len(data)
    for piece in pieces:
        # Closed at the first line end at or after that size.
        wanted = min(piece.first + shard_bytes, len(data)) - 1
        assert piece.last == data.index(b"\n", wanted) + 1


def test_progress_counts_every_byte_of_the_corpus(corpus: Path, tmp_path: Path) -> None:
    amounts: list[int] = []
    encode_corpus(corpus, corpus / "tokenizer.model", tmp_path, shard_bytes=2000, progress=amounts.append)
    assert sum(amounts) == sum((corpus / f"{s}.jsonl").stat().st_size for s in ("train", "validation"))


def test_a_dataset_is_not_written_over_unless_asked(corpus: Path, tmp_path: Path) -> None:
    encode_corpus(corpus, corpus / "tokenizer.model", tmp_path)
    with pytest.raises(ConfigError, match="--overwrite"):
        encode_corpus(corpus, corpus / "tokenizer.model", tmp_path)
    encode_corpus(corpus, corpus / "tokenizer.model", tmp_path, overwrite=True)


def test_a_bad_line_stops_with_its_number_and_leaves_no_dataset(corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "train.jsonl").write_text('{"text": "a"}\n\n{"text": 3}\n')
    (bad / "validation.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="train.jsonl: line 3 "):
        encode_corpus(bad, corpus / "tokenizer.model", tmp_path / "out")
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


def test_a_split_without_documents_is_refused_before_anything_is_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "validation.jsonl").write_text("")
    with pytest.raises(ConfigError, match="validation.jsonl.*no document"):
        encode_corpus(tmp_path, corpus / "tokenizer.model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_manifest_tells_where_the_text_came_from(text_dataset_description: tuple[dict, dict]) -> None:
    manifest, description = text_dataset_description
    assert manifest["corpus"]["corpus"] == description
    assert manifest["corpus"]["split"] == "train"


@pytest.fixture
def text_dataset_description(tmp_path: Path) -> tuple[dict, dict]:
    """The manifest of a dataset and the corpus.json of the corpus it was made of."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(100):
        (source / f"{i}.txt").write_text(f"text {i}\n" * 3)
    description = build_corpus(tmp_path / "corpus", standard_library=False, extra_roots=[source])
    train_tokenizer(tmp_path / "corpus", tmp_path / "t.model", vocab_size=275)
    encode_corpus(tmp_path / "corpus", tmp_path / "t.model", tmp_path / "out")
    return json.loads((tmp_path / "out" / "train" / "manifest.json").read_text()), description


def test_an_encoder_that_fails_its_proof_is_not_used_and_that_is_said(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OtherIds:
        version = "0"

        def __init__(self, *, sentencepiece: bytes) -> None:
            pass

        def encode(self, texts: list[str]) -> list[np.ndarray]:
            return [np.zeros(1, dtype=np.int32) for _ in texts]

    monkeypatch.setattr(tokenizers, "FastEncoder", OtherIds)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "train 1"}\n' * 3)
    said: list[str] = []
    model = corpus / "tokenizer.model"
    made = encode_corpus(tmp_path, model, tmp_path / "a", encoder="gigatoken", say=said.append)
    assert said == ["sentencepiece, because gigatoken 0 gave other ids for the first documents"]
    plain = encode_corpus(tmp_path, model, tmp_path / "b")
    assert {split: one.content_id for split, one in made.items()} == {s: one.content_id for s, one in plain.items()}


def test_the_repair_of_a_failed_encoding_keeps_no_shard_of_the_suspected_encoder(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OtherIdsLater:
        version = "0"

        def __init__(self, *, sentencepiece: bytes) -> None:
            self.plain = open_tokenizer(corpus / "tokenizer.model")

        def encode(self, texts: list[str]) -> list[np.ndarray]:
            calls.append(len(texts))
            if len(calls) == 4:
                raise DataError("other ids", field="encoder")
            ids = self.plain.encode(texts)
            return ids if len(calls) == 1 else [one[::-1] for one in ids]

    calls: list[int] = []

    model, out = corpus / "tokenizer.model", tmp_path / "out"
    monkeypatch.setattr(tokenizers, "FastEncoder", OtherIdsLater)
    monkeypatch.setattr(tokenizers, "_COMPARED_BATCHES", 10**9)
    with pytest.raises(DataError, match="other ids"):
        encode_corpus(corpus, model, out, encoder="gigatoken", shard_bytes=500)
    assert list(out.glob(".train-validation.writing-*/train/*.done"))
    repaired = encode_corpus(corpus, model, out, shard_bytes=500, overwrite=True)
    straight = encode_corpus(corpus, model, tmp_path / "straight", shard_bytes=500)
    assert repaired["train"].content_id == straight["train"].content_id
    assert repaired["train"].tool.endswith(", sentencepiece")


def test_the_fast_encoder_writes_the_same_datasets(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    said: list[str] = []
    fast = encode_corpus(corpus, corpus / "tokenizer.model", tmp_path / "a", encoder="gigatoken", say=said.append)
    plain = encode_corpus(corpus, corpus / "tokenizer.model", tmp_path / "b")
    assert "the same ids as sentencepiece" in said[0]
    assert {split: one.content_id for split, one in fast.items()} == {s: one.content_id for s, one in plain.items()}


def test_an_encoder_that_is_not_there_is_a_configuration_error(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such encoder"):
        encode_corpus(corpus, corpus / "tokenizer.model", tmp_path, encoder="other")
