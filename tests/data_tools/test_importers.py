"""Compressed text and foreign token files: the content is unchanged, and the tokens stay where they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus import build_corpus, read_split
from data_tools.importers import import_tokens, tokenizer_of, unknown_tokenizer
from kha_train.data.format.shards import ShardSet
from kha_train.data.inspect import decoder_of
from kha_train.data.sentencepiece_model import train
from kha_train.data.tokenizer_kinds import open_tokenizer
from kha_train.errors import ConfigError, DataError

DOCUMENTS = [[5, 6, 7], [8], list(range(9, 60)), [1, 2]]
IDS = np.concatenate([np.asarray(document) for document in DOCUMENTS])
ENDS = np.cumsum([len(document) for document in DOCUMENTS])


def megatron(directory: Path, dtype: str, code: int) -> Path:
    """The .bin and .idx of Megatron's indexed dataset, byte by byte, with an empty document in the middle."""
    IDS.astype(dtype).tofile(directory / "tokens.bin")
    lengths = np.asarray([3, 0, 1, 51, 2], dtype="<i4")
    pointers = np.concatenate(([0], np.cumsum(lengths)[:-1])).astype("<i8") * np.dtype(dtype).itemsize
    header = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([code])
    counts = (5).to_bytes(8, "little") + (6).to_bytes(8, "little")
    borders = np.arange(6, dtype="<i8")
    (directory / "tokens.idx").write_bytes(header + counts + lengths.tobytes() + pointers.tobytes() + borders.tobytes())
    return directory / "tokens.bin"


def datatrove(directory: Path) -> Path:
    IDS.astype("<u2").tofile(directory / "000.ds")
    ENDS.astype("<u8").tofile(directory / "000.ds.index")
    return directory / "000.ds"


@pytest.mark.parametrize("source", ["megatron uint16", "megatron int32", "datatrove"])
def test_foreign_tokens_are_read_where_they_lie_with_their_documents(tmp_path: Path, source: str) -> None:
    kind = source.split()[0]
    path = {
        "megatron uint16": lambda: megatron(tmp_path, "<u2", 8),
        "megatron int32": lambda: megatron(tmp_path, "<i4", 4),
        "datatrove": lambda: datatrove(tmp_path),
    }[source]()
    import_tokens(kind, [path], tmp_path / "out", unknown_tokenizer(100), overwrite=False)
    opened = ShardSet.open(tmp_path / "out")
    assert opened.read(0, 0, len(IDS)).tolist() == IDS.tolist()
    assert opened.document_ends(0, 0, len(IDS)).tolist() == ENDS.tolist()
    assert opened.token_counts().sum() == len(IDS)
    assert (tmp_path / "out" / "shard-00000.tok").resolve() == path
    damaged = bytearray(path.read_bytes())
    damaged[0] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="CRC-32"):
        ShardSet.open(tmp_path / "out").read(0, 0, 1)


@pytest.mark.parametrize("header", [True, False])
def test_a_flat_array_is_one_document_with_or_without_a_header(tmp_path: Path, header: bool) -> None:
    path = tmp_path / "tokens.npy"
    if header:
        np.save(path, IDS.astype("<u2"))
    else:
        IDS.astype("<u2").tofile(path)
    dtype = "" if header else "uint16"
    import_tokens("numpy", [path], tmp_path / "out", unknown_tokenizer(100), overwrite=False, dtype=dtype)
    opened = ShardSet.open(tmp_path / "out", reader="memory_map")
    assert opened.read(0, 0, len(IDS)).tolist() == IDS.tolist()
    assert opened.token_counts().sum() == len(IDS) and opened.manifest.documents == 1


def test_ids_outside_the_vocabulary_and_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="outside the vocabulary of 50"):
        import_tokens("datatrove", [datatrove(tmp_path)], tmp_path / "a", unknown_tokenizer(50), overwrite=False)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "ids", [IDS, IDS.astype(">u2"), IDS.astype("<f2"), IDS.astype("U1"), IDS.reshape(3, -1), (IDS - 9).astype("<i4")]
)
def test_arrays_that_are_no_ids_are_refused(tmp_path: Path, ids: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", ids)
    with pytest.raises(DataError, match=r"a\.npy"):
        import_tokens("numpy", [tmp_path / "a.npy"], tmp_path / "out", unknown_tokenizer(65_536), overwrite=False)


def test_an_array_without_a_header_needs_its_type_and_an_archive_is_none(tmp_path: Path) -> None:
    IDS.astype("<i4").tofile(tmp_path / "raw")
    with pytest.raises(ConfigError, match="no header.*uint16"):
        import_tokens("numpy", [tmp_path / "raw"], tmp_path / "out", unknown_tokenizer(100), overwrite=False)
    np.savez(tmp_path / "a.npz", IDS)
    with pytest.raises(DataError, match="archive"):
        import_tokens("numpy", [tmp_path / "a.npz"], tmp_path / "out", unknown_tokenizer(100), overwrite=False)
    import_tokens("numpy", [tmp_path / "raw"], tmp_path / "out", unknown_tokenizer(100), overwrite=False, dtype="int32")
    assert ShardSet.open(tmp_path / "out").read(0, 0, len(IDS)).tolist() == IDS.tolist()


def test_raw_ids_that_begin_like_an_archive_are_ids(tmp_path: Path) -> None:
    for number, magic in enumerate((b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd")):
        data = magic + IDS.astype("<u2").tobytes()
        (tmp_path / f"raw-{number}").write_bytes(data)
        out = tmp_path / f"out-{number}"
        import_tokens(
            "numpy", [tmp_path / f"raw-{number}"], out, unknown_tokenizer(65_536), overwrite=False, dtype="uint16"
        )
        assert ShardSet.open(out).read(0, 0, len(data) // 2).tolist() == np.frombuffer(data, "<u2").tolist()


def changed(path: Path, place: int, value: int, width: int) -> None:
    data = bytearray(path.read_bytes())
    data[place : place + width] = value.to_bytes(width, "little", signed=True)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: (root / "tokens.idx").write_bytes(b""),
        lambda root: (root / "tokens.idx").write_bytes((root / "tokens.idx").read_bytes()[:-5]),
        lambda root: changed(root / "tokens.idx", 18, 10**12, 8),
        lambda root: changed(root / "tokens.idx", 34 + 5 * 4, 4, 8),
        lambda root: changed(root / "tokens.idx", 34 + 5 * 12 + 8, 3, 8),
        lambda root: changed(root / "tokens.idx", 34 + 5 * 12 + 8, -1, 8),
        lambda root: changed(root / "tokens.idx", 34 + 5 * 12 + 40, 60, 8),
        lambda root: (root / "tokens.bin").write_bytes(b""),
        lambda root: (root / "tokens.bin").write_bytes(b"123"),
    ],
    ids=["empty", "cut", "count", "pointer", "not ascending", "negative", "beyond", "no ids", "odd"],
)
def test_a_megatron_index_that_contradicts_itself_or_its_tokens_is_refused(tmp_path: Path, damage) -> None:
    path = megatron(tmp_path, "<u2", 8)
    damage(tmp_path)
    with pytest.raises(DataError, match="tokens"):
        import_tokens("megatron", [path], tmp_path / "out", unknown_tokenizer(100), overwrite=False)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("ends", [ENDS[::-1], ENDS[:-1], [*ENDS, 10**6], []], ids=repr)
def test_datatrove_ends_that_do_not_fit_are_refused(tmp_path: Path, ends) -> None:
    path = datatrove(tmp_path)
    np.asarray(ends).astype("<u8").tofile(tmp_path / "000.ds.index")
    with pytest.raises(DataError, match=r"000\.ds"):
        import_tokens("datatrove", [path], tmp_path / "out", unknown_tokenizer(100), overwrite=False)


def test_an_import_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = datatrove(tmp_path)
    import_tokens("datatrove", [path], tmp_path / "out", unknown_tokenizer(100), overwrite=False)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="no such file"):
        import_tokens("datatrove", [tmp_path / "nowhere"], tmp_path / "out", unknown_tokenizer(100), overwrite=True)
    with pytest.raises(DataError, match="outside the vocabulary"):
        import_tokens("datatrove", [path], tmp_path / "out", unknown_tokenizer(50), overwrite=True)
    with pytest.raises(ConfigError, match="lies inside the output directory"):
        import_tokens(
            "numpy", [tmp_path / "out" / "shard-00000.tok"], tmp_path / "out", unknown_tokenizer(100), overwrite=True
        )
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000.ds", "000.ds.index", "out"]


def test_an_import_with_its_tokenizer_decodes_by_itself(text_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(text_tokenizer)
    (ids,) = tokenizer.encode(["Grüße, world"])
    np.save(tmp_path / "a.npy", ids.astype("<u2"))
    import_tokens(
        "numpy",
        [tmp_path / "a.npy"],
        tmp_path / "out",
        tokenizer_of(text_tokenizer, 0),
        overwrite=False,
        tokenizer_file=text_tokenizer,
    )
    opened = ShardSet.open(tmp_path / "out")
    assert decoder_of(opened)(opened.read(0, 0, len(ids))) == "Grüße, world"
    assert opened.manifest.text_bytes == len("Grüße, world".encode())


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train((f"some words {i} Grüße" for i in range(300)), path, vocab_size=300)
    return path


def test_packed_text_and_parquet_make_the_corpus_that_plain_text_makes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {i}: Grüße ▁\n" for i in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    for name in ("plain", "gz", "zst", "parquet"):
        (tmp_path / name / "in").mkdir(parents=True)
    (tmp_path / "plain/in/a.jsonl").write_bytes(lines)
    (tmp_path / "gz/in/a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "zst/in/a.jsonl.zst").write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "parquet/in/a.parquet", row_group_size=7)
    for name in ("plain", "gz", "zst", "parquet"):
        root = tmp_path / name
        build_corpus(root / "corpus", standard_library=False, extra_roots=[root / "in"])
        found = [document.text for split in ("train", "validation") for document in read_split(root / "corpus", split)]
        assert sorted(found) == sorted(texts)


def test_repetitions_go_unless_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "once"}\n{"text": "twice"}\n{"text": "twice"}\n' * 2)
    counts = {
        keep: build_corpus(
            tmp_path / str(keep), standard_library=False, extra_roots=[tmp_path / "a.jsonl"], keep_repeated=keep
        )
        for keep in (False, True)
    }
    assert (counts[False]["documents"], counts[False]["repeated"]) == (2, 4)
    assert (counts[True]["documents"], counts[True]["repeated"]) == (6, 4)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["truncated", "not packed", "changed"])
def test_damaged_packed_text_is_a_data_error_that_names_the_file(tmp_path: Path, suffix: str, damage: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    lines = b"".join(json.dumps({"text": f"text {i * i * 7919}"}).encode() + b"\n" for i in range(5000))
    packed = gzip.compress(lines) if suffix == "gz" else pyarrow.compress(lines, "zstd", asbytes=True)
    changed = packed[: len(packed) // 2] + bytes([packed[len(packed) // 2] ^ 255]) + packed[len(packed) // 2 + 1 :]
    data = {"truncated": packed[:-200], "not packed": lines, "changed": changed}[damage]
    path = tmp_path / "in" / f"a.jsonl.{suffix}"
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}"):
        build_corpus(tmp_path / "out", standard_library=False, extra_roots=[path.parent])
    assert not (tmp_path / "out" / "corpus.json").exists()
