"""Datasets on disk: what was written is read back, and damage stops the reader with its location."""

from __future__ import annotations

import errno
import gc
import hashlib
import itertools
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kha_train.data.format import files, shard
from kha_train.data.format import manifest as manifests
from kha_train.data.format import shards as shards_module
from kha_train.data.format.manifest import TokenizerEntry, dtype_for
from kha_train.data.format.shards import ShardSet
from kha_train.data.format.writer import prepare, publish_dataset, write_shard
from kha_train.errors import ConfigError, DataError, MachineError


def write(directory: Path, shards: list[list[list[int]]], vocab: int = 100) -> ShardSet:
    """Write shards of documents of ids, one byte of text an id, and open them."""
    prepare(directory)
    dtype = dtype_for(vocab)
    entries = []
    for index, documents in enumerate(shards):
        contents = ((np.asarray(ids, dtype=np.int64), len(ids)) for ids in documents)
        entries.append(write_shard(directory, index, contents, vocab_size=vocab, dtype=dtype))
    tokenizer = TokenizerEntry("test", vocab, "0" * 64, None, {}, (1,) * vocab)
    publish_dataset(directory, entries, tokenizer, dtype=dtype, corpus={"source": "test"})
    return ShardSet.open(directory)


def rewrite(directory: Path, change) -> None:
    """Apply `change` to the manifest's JSON object and give it a matching content id, as a forger would."""
    path = directory / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    raw["content_id"] = manifests.content_id_of(raw)
    path.write_text(json.dumps(raw))


@pytest.fixture(scope="module")
def big_shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 100,000 tokens (four blocks of 64 KiB each) in documents of 1000; do not change it."""
    directory = tmp_path_factory.mktemp("big")
    ids = [[(7 * i + d) % 90 for i in range(1000)] for d in range(100)]
    write(directory, [ids, ids[::-1]])
    return directory


@pytest.fixture
def big(big_shared: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(big_shared, tmp_path / "big"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.lists(st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=9), min_size=1, max_size=4),
    vocab=st.sampled_from([100, 65_536, 65_537, 157_184]),
)
def test_what_is_written_is_read_back_for_both_widths(tmp_path: Path, shards, vocab: int) -> None:
    kept = [[ids for ids in documents if ids] for documents in shards]
    kept = [documents for documents in kept if documents]
    if not kept:
        with pytest.raises(DataError):
            write(tmp_path / "d", shards, vocab)
        return
    opened = write(tmp_path / "d", shards, vocab)
    assert opened.manifest.dtype == ("uint16" if vocab <= 65_536 else "uint32")
    assert opened.manifest.documents == sum(map(len, kept))
    for index, documents in enumerate(kept):
        total = sum(map(len, documents))
        assert opened.read(index, 0, total).tolist() == [i for ids in documents for i in ids]
        ends = np.cumsum([len(ids) for ids in documents])
        assert opened.document_ends(index, 0, total).tolist() == ends.tolist()
    assert opened.token_counts().sum() == opened.manifest.tokens


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_document_ends_of_any_range_equal_brute_force(many_documents: tuple[ShardSet, np.ndarray], data) -> None:
    opened, ends = many_documents
    total = int(ends[-1])
    near = st.sampled_from(ends.tolist()).flatmap(lambda e: st.integers(max(0, e - 2), min(total, e + 2)))
    start, stop = sorted((data.draw(near), data.draw(near)))
    assert opened.document_ends(0, start, stop).tolist() == ends[(ends > start) & (ends <= stop)].tolist()


@pytest.fixture(scope="module", params=[1, 8191, 8192, 8193, 16_384, 20_000])
def many_documents(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, np.ndarray]:
    """A shard with so many documents that its index of ends has several blocks, or exactly full ones."""
    lengths = 1 + np.arange(request.param) % 5
    documents = [[1] * int(length) for length in lengths]
    return write(tmp_path_factory.mktemp("many"), [documents]), np.cumsum(lengths)


def test_the_checksum_file_is_zlib_crc_of_each_block(big: Path) -> None:
    data = (big / "shard-00000.tok").read_bytes()
    blocks = [zlib.crc32(data[i : i + 65_536]) for i in range(0, len(data), 65_536)]
    ends = (big / "shard-00000.doc").read_bytes()
    expected = np.asarray([*blocks, zlib.crc32(ends)], dtype="<u4").tobytes() + (100_000).to_bytes(8, "little")
    assert (big / "shard-00000.crc").read_bytes() == expected and len(blocks) == 4


def test_a_changed_byte_is_found_at_the_first_touch_of_its_block_and_not_before(big: Path) -> None:
    path = big / "shard-00001.tok"
    data = bytearray(path.read_bytes())
    data[70_000] ^= 1
    path.write_bytes(data)
    opened = ShardSet.open(big)
    opened.read(1, 0, 32_768)
    opened.read(0, 0, 100_000)
    with pytest.raises(DataError, match=r"shard-00001.tok: offset 65536: expected CRC-32 \w{8}, found \w{8}"):
        opened.read(1, 32_768, 1)
    with pytest.raises(DataError):
        opened.read(1, 32_767, 2)
    with pytest.raises(DataError):
        ShardSet.open(big).token_counts()


def test_checks_can_be_left_out(big: Path) -> None:
    path = big / "shard-00000.tok"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    assert ShardSet.open(big, check_crc=False).read(0, 0, 1).tolist() == [data[0]]
    with pytest.raises(DataError):
        ShardSet.open(big).read(0, 0, 1)


def test_a_block_of_random_bytes_stops_the_reader(big: Path) -> None:
    with open(big / "shard-00000.tok", "r+b") as file:
        file.seek(65_536)
        file.write(np.random.default_rng(0).bytes(65_536))
    with pytest.raises(DataError, match="offset 65536"):
        ShardSet.open(big).read(0, 0, 100_000)
    with pytest.raises(DataError, match="expected an id of at most 89"):
        ShardSet.open(big, check_crc=False).read(0, 0, 100_000)


def test_an_id_beyond_the_manifests_maximum_stops_the_reader_even_with_right_checksums(big: Path) -> None:
    ids = np.fromfile(big / "shard-00000.tok", dtype="<u2")
    ids[12_345] = 90
    ids.tofile(big / "shard-00000.tok")
    data = ids.tobytes()
    checksums = np.asarray([zlib.crc32(data[i : i + 65_536]) for i in range(0, len(data), 65_536)], dtype="<u4")
    rest = (big / "shard-00000.crc").read_bytes()[checksums.nbytes :]
    (big / "shard-00000.crc").write_bytes(checksums.tobytes() + rest)

    def forge(raw: dict) -> None:
        for kind in ("tok", "crc"):
            raw["shards"][0][kind]["sha256"] = hashlib.sha256((big / f"shard-00000.{kind}").read_bytes()).hexdigest()

    rewrite(big, forge)
    opened = ShardSet.open(big)
    opened.read(0, 0, 12_345)
    with pytest.raises(DataError, match="token 12345: expected an id of at most 89, found 90") as caught:
        opened.read(0, 12_000, 1000)
    assert caught.value.exit_code == 4 and "shard-00000.tok" in str(caught.value)


def test_each_piece_is_held_against_the_largest_id_of_its_own_shard(tmp_path: Path) -> None:
    write(tmp_path, [[[1, 2, 3, 4]], [[7, 8, 9, 90]]])
    path = tmp_path / "shard-00000.tok"
    ids = np.fromfile(path, dtype="<u2")
    ids[3] = 50  # less than the other shard holds
    ids.tofile(path)
    opened = ShardSet.open(tmp_path, check_crc=False)
    pieces = (np.array([1, 0, 1]), np.array([2, 0, 0]), np.array([2, 3, 1]))
    assert opened.gather(*pieces).tolist() == [9, 90, 1, 2, 3, 7]
    with pytest.raises(DataError, match="shard-00000.tok.*token 3: expected an id of at most 4, found 50"):
        opened.gather(np.array([1, 0]), np.array([2, 1]), np.array([2, 3]))


@pytest.mark.parametrize("reader", ["pread", "memory_map"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 90_000), st.integers(1, 10_000)), max_size=8))
def test_pieces_of_any_shards_and_lengths_are_read_as_each_alone(big_shared: Path, reader: str, pieces) -> None:
    opened = ShardSet.open(big_shared, reader=reader)
    columns = [np.array(column, dtype=np.int64) for column in (zip(*pieces, strict=True) if pieces else ([], [], []))]
    files = [np.fromfile(big_shared / f"shard-0000{shard}.tok", dtype="<u2") for shard in (0, 1)]
    expected = [files[shard][start : start + length] for shard, start, length in pieces]
    assert opened.gather(*columns).tolist() == [number for piece in expected for number in piece.tolist()]


@pytest.mark.parametrize("suffix", ["tok", "doc", "crc"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "longer", "missing", "a directory"])
def test_a_file_of_the_wrong_size_is_found_at_open(big: Path, suffix: str, damage: str) -> None:
    path = big / f"shard-00001.{suffix}"
    size = path.stat().st_size
    if damage in ("truncated", "emptied", "longer"):
        os.truncate(path, {"truncated": size - 1, "emptied": 0, "longer": size + 2}[damage])
    else:
        path.unlink()
        if damage == "a directory":
            path.mkdir()
    with pytest.raises(DataError, match=f"shard-00001.{suffix}"):
        ShardSet.open(big)


@pytest.mark.parametrize("suffix", ["doc", "crc"])
def test_changed_document_ends_and_checksums_are_found_at_the_first_touch(big: Path, suffix: str) -> None:
    path = big / f"shard-00000.{suffix}"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    opened = ShardSet.open(big)
    opened.read(1, 0, 10)
    with pytest.raises(DataError, match=f"shard-00000.{suffix}"):
        opened.document_ends(0, 0, 1)


def test_a_shard_swapped_with_one_of_equal_size_is_found(big: Path) -> None:
    os.rename(big / "shard-00000.tok", big / "aside")
    os.rename(big / "shard-00001.tok", big / "shard-00000.tok")
    os.rename(big / "aside", big / "shard-00001.tok")
    with pytest.raises(DataError, match="CRC-32"):
        ShardSet.open(big).read(0, 0, 10)


@pytest.mark.parametrize("suffix", ["tok", "doc"])
def test_truncation_while_running_is_an_error_and_not_the_death_of_the_process(big: Path, suffix: str) -> None:
    opened = ShardSet.open(big)
    opened.read(0, 0, 100_000)
    os.truncate(big / f"shard-00000.{suffix}", 10)
    with pytest.raises(DataError, match="the file was truncated"):
        opened.read(0, 50_000, 10)
        opened.document_ends(0, 50_000, 50_010)


@pytest.mark.parametrize("reader", ["pread", "memory_map"])
def test_many_shards_are_read_with_few_open_files_which_are_closed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    def open_files() -> int:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith(f"{tmp_path}/") for link in links if os.path.islink(link))

    monkeypatch.setattr(files, "_most_open", lambda: 20)
    write(tmp_path, [[[index % 100, 5]] for index in range(150)])
    opened = ShardSet.open(tmp_path, reader=reader)
    for _ in range(2):
        assert [opened.read(index, 0, 1)[0] for index in range(150)] == [index % 100 for index in range(150)]
        assert [opened.document_ends(index, 0, 2).tolist() for index in range(0, 150, 7)] == [[2]] * 22
    assert 0 < open_files() <= 20 * (1 if reader == "pread" else 2) + 22
    del opened
    gc.collect()
    assert open_files() == 0


def test_no_more_open_files_is_the_machines_trouble_and_not_damage(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    for reader in ("pread", "memory_map"):
        opened = ShardSet.open(big, reader=reader, check_crc=False)
        with monkeypatch.context() as patch, pytest.raises(MachineError, match="ulimit -n") as caught:
            patch.setattr(files.os, "open", refused)
            opened.read(0, 0, 10)
        assert caught.value.exit_code == 75


def test_a_file_cut_off_before_it_is_mapped_is_a_data_error(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = ShardSet.open(big, reader="memory_map", check_crc=False)
    os.truncate(big / "shard-00001.tok", 100_000)
    assert len(opened.read(1, 0, 50_000)) == 50_000
    with pytest.raises(DataError, match=r"shard-00001.tok.*expected 2000 bytes, found 1000: the file was truncated"):
        opened.gather(np.array([0, 1]), np.array([0, 49_500]), np.array([1000, 1000]))
    # Pages that come from a disk are requested in advance, except those that do not exist.
    monkeypatch.setattr(files, "_major_faults", itertools.count().__next__)
    opened.read(0, 0, 1)
    for _ in range(2):
        with pytest.raises(DataError, match="expected 2000 bytes, found 0: the file was truncated"):
            opened.gather(np.array([1]), np.array([90_000]), np.array([1000]))


def test_a_verification_takes_what_it_reads_twice_from_the_disk_once(
    big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard may be larger than memory: checksums and digest go through it side by side, and all blocks are compared
    also where some were before."""
    monkeypatch.setattr(shards_module, "_CHUNK_BYTES", 2 * 65_536)
    opened = ShardSet.open(big)
    opened.read(1, 0, 60_000)
    read, places = files.Files.read, []

    def recorded(self: files.Files, name: str, offset: int, count: int) -> bytes:
        if name == "shard-00001.tok":
            places.append((offset, count))
        return read(self, name, offset, count)

    monkeypatch.setattr(files.Files, "read", recorded)
    opened.verify(1)
    assert places == [
        *((0, 65_536), (65_536, 65_536), (0, 131_072)),
        *((131_072, 65_536), (196_608, 3392), (131_072, 68_928)),
    ]


@pytest.mark.parametrize("reader", ["pread", "memory_map"])
def test_the_parts_before_damage_are_given(big: Path, reader: str) -> None:
    ids = np.fromfile(big / "shard-00001.tok", dtype="<u2")
    ids[70_000] = 96
    ids.tofile(big / "shard-00001.tok")
    pieces = (np.array([0, 1, 0, 1]), np.array([10, 20, 40_000, 69_000]), np.array([5, 6, 7, 2000]))
    for check_crc, message in ((True, "CRC-32"), (False, "token 70000: expected an id of at most 89, found 96")):
        parts = ShardSet.open(big, reader=reader, check_crc=check_crc).gather_in_parts(*pieces, (0, 2, 2, 3, 4))
        assert [len(next(parts)) for _ in range(3)] == [11, 0, 7]
        with pytest.raises(DataError, match=message):
            next(parts)


def test_a_block_that_was_checked_is_not_read_whole_again(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = ShardSet.open(big)
    opened.read(0, 40_000, 10)
    opened.document_ends(0, 0, 10)
    sums = []
    monkeypatch.setattr(shard.zlib, "crc32", lambda data: sums.append(len(data)) or 0)
    opened.read(0, 33_000, 20_000)
    opened.document_ends(0, 50_000, 60_000)
    assert sums == []
    with pytest.raises(DataError, match="CRC-32"):
        opened.read(0, 0, 10)


def test_the_checksum_of_wide_ids_is_that_of_their_bytes(tmp_path: Path) -> None:
    opened = write(tmp_path, [[[i % 70_000 for i in range(50_000)]]], vocab=70_000)
    assert opened.dtype == np.dtype("<u4")
    path = tmp_path / "shard-00000.tok"
    data = bytearray(path.read_bytes())
    data[4 * 40_000] ^= 1
    path.write_bytes(data)
    opened = ShardSet.open(tmp_path)
    assert len(opened.read(0, 0, 32_768)) == 32_768, "two blocks of 64 KiB before it"
    with pytest.raises(DataError, match="offset 131072: expected CRC-32"):
        opened.read(0, 32_768, 1)


@pytest.mark.parametrize(("place", "value"), [(0, 2000), (5, 5000), (99, 99_999)])
def test_document_ends_out_of_order_are_found_though_their_checksums_are_right(
    big: Path, place: int, value: int
) -> None:
    """Again as a forger would: only the order shows it."""
    ends = np.fromfile(big / "shard-00000.doc", dtype="<i8")
    ends[place] = value
    ends.tofile(big / "shard-00000.doc")
    crc = bytearray((big / "shard-00000.crc").read_bytes())
    crc[16:20] = zlib.crc32(ends.tobytes()).to_bytes(4, "little")
    if place == 99:
        crc[20:28] = int(value).to_bytes(8, "little")
    (big / "shard-00000.crc").write_bytes(crc)

    def forge(raw: dict) -> None:
        for kind in ("doc", "crc"):
            raw["shards"][0][kind]["sha256"] = hashlib.sha256((big / f"shard-00000.{kind}").read_bytes()).hexdigest()

    rewrite(big, forge)
    with pytest.raises(DataError, match="out of order|the last document ends at token 99999"):
        ShardSet.open(big).document_ends(0, 0, 10)


@pytest.mark.parametrize("name", ["../escape.tok", "/etc/passwd", "a/b.tok", "..", ".hidden", "", "a\x00b", "a\nb"])
def test_security_a_file_name_that_leaves_the_directory_is_refused(big: Path, name: str) -> None:
    rewrite(big, lambda raw: raw["shards"][0]["tok"].update(file=name))
    with pytest.raises(DataError, match="bare file name"):
        ShardSet.open(big)


EDITS = {
    "another format": lambda raw: raw.update(format="other"),
    "a newer version": lambda raw: raw.update(version=2),
    "no version": lambda raw: raw.pop("version"),
    "a true version": lambda raw: raw.update(version=True),
    "an unknown type": lambda raw: raw.update(dtype="int8"),
    "a type of another width": lambda raw: raw.update(dtype="uint32"),
    "big-endian": lambda raw: raw.update(byte_order="big"),
    "other blocks": lambda raw: raw.update(crc_block_bytes=4096),
    "a wrong total": lambda raw: raw.update(tokens=raw["tokens"] + 1),
    "no shards": lambda raw: raw.update(shards=[], tokens=0, documents=0, text_bytes=0),
    "shards that are no list": lambda raw: raw.update(shards={}),
    "a shard that is no object": lambda raw: raw["shards"].append(3),
    "one file twice": lambda raw: raw["shards"][1].update(tok=raw["shards"][0]["tok"]),
    "a negative count": lambda raw: raw["shards"][0].update(text_bytes=-1),
    "a count as a string": lambda raw: raw["shards"][0].update(tokens="100000"),
    "a shard without tokens": lambda raw: raw["shards"][0].update(tokens=0),
    "an id outside the vocabulary": lambda raw: raw["shards"][0].update(max_id=100),
    "a hash that is none": lambda raw: raw["shards"][0]["tok"].update(sha256="x"),
    "a table of another length": lambda raw: raw["tokenizer"]["bytes_per_id"].pop(),
    "a table of fractions": lambda raw: raw["tokenizer"].update(bytes_per_id=[1.5] * 100),
    "a special id outside": lambda raw: raw["tokenizer"].update(special_ids={"eos": 100}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_security_a_manifest_that_contradicts_itself_is_refused(big: Path, edit: str) -> None:
    rewrite(big, EDITS[edit])
    with pytest.raises(DataError, match="manifest.json"):
        ShardSet.open(big)


def test_an_edited_manifest_is_noticed_by_its_content_id(big: Path) -> None:
    path = big / "manifest.json"
    raw = json.loads(path.read_text())
    raw["corpus"]["source"] = "another"
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="content_id"):
        ShardSet.open(big)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": NaN}'])
def test_a_half_written_manifest_is_a_data_error(big: Path, text: bytes) -> None:
    (big / "manifest.json").write_bytes(text)
    with pytest.raises(DataError, match="manifest.json"):
        ShardSet.open(big)


def test_without_a_manifest_there_is_no_dataset(big: Path) -> None:
    (big / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="manifest.json"):
        ShardSet.open(big)


def test_the_content_id_names_the_data_and_not_the_tool(big: Path) -> None:
    first = ShardSet.open(big).content_id
    rewrite(big, lambda raw: raw.update(tool="another version"))
    assert ShardSet.open(big).content_id == first
    rewrite(big, lambda raw: raw.update(corpus={"source": "another"}))
    assert ShardSet.open(big).content_id != first


def test_verification_finds_figures_that_do_not_fit_the_tokens(big: Path) -> None:
    def forge(raw: dict) -> None:
        raw["shards"][0]["text_bytes"] += 1
        raw["text_bytes"] += 1

    rewrite(big, forge)
    with pytest.raises(DataError, match="text bytes"):
        ShardSet.open(big).token_counts()


def test_writing_anew_leaves_nothing_of_the_old_dataset(tmp_path: Path) -> None:
    write(tmp_path, [[[1]], [[2]], [[3]]])
    (tmp_path / "shard-00007.tok.123.part").write_bytes(b"of a process that was killed")
    write(tmp_path, [[[4]]])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        "shard-00000.crc",
        "shard-00000.doc",
        "shard-00000.tok",
    ]


@pytest.mark.parametrize("ids", [[-1], [100], [5, 65_536]])
def test_an_id_outside_the_vocabulary_cannot_be_written(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(DataError, match="outside the vocabulary"):
        write(tmp_path, [[ids]])


def test_the_tokenizer_beside_the_manifest_must_be_the_one_that_made_it(text_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(text_dataset / "train", tmp_path / "train")
    path = tmp_path / "train" / "tokenizer.model"
    assert ShardSet.open(tmp_path / "train").check_tokenizer() == path
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match="not the tokenizer.*expected SHA-256 .*found") as caught:
        ShardSet.open(tmp_path / "train").check_tokenizer()
    assert caught.value.exit_code == 4
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        ShardSet.open(tmp_path / "train").check_tokenizer()
