"""Datasets at a URL: the same batches as from local files, through a cache that is checked, limited, shared and
prefetched.
"""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from kha_train.config.schema import SourceSection
from kha_train.data import stream
from kha_train.data.format import manifest as manifests
from kha_train.data.format.shards import ShardSet
from kha_train.data.remote import store as remote
from kha_train.data.remote.block_cache import Cache
from kha_train.errors import ConfigError, DataError, MachineError

fsspec = pytest.importorskip("fsspec")
BLOCK = 1 << 16
WORKER = Path(__file__).with_name("remote_worker.py")
present = Cache._present


@pytest.fixture(autouse=True)
def small_blocks_and_short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture
def in_memory(small_dataset: Path) -> str:
    """The dataset at memory://, train/ and validation/."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in small_dataset.rglob("*.*"):
        system.pipe_file(f"/set/{path.relative_to(small_dataset)}", path.read_bytes())
    return "memory://set"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two shards of five blocks each, as large as a test may be."""
    from kha_train.data.format.manifest import TokenizerEntry
    from kha_train.data.format.writer import prepare, publish_dataset, write_shard

    directory = tmp_path_factory.mktemp("large")
    generator = np.random.default_rng(0)
    prepare(directory)
    entries = []
    for index in range(2):
        documents = [(generator.integers(0, 90, 1000), 1000) for _ in range(160)]
        entries.append(write_shard(directory, index, documents, vocab_size=97, dtype="uint16"))
    tokenizer = TokenizerEntry("test", 97, "0" * 64, None, {}, (1,) * 97)
    publish_dataset(directory, entries, tokenizer, dtype="uint16", corpus={})
    return directory


class Flaky(fsspec.get_filesystem_class("file")):
    """The local file system behind a bad connection: `troubles` happen one by one, then reads succeed."""

    protocol = "flaky"
    cachable = False
    troubles: ClassVar[list] = []
    reads: ClassVar[list[tuple[str, str]]] = []

    def cat_file(self, path: str, start=None, end=None, **options) -> bytes:
        """A read, or the next trouble."""
        self.reads.append((path, threading.current_thread().name))
        if self.troubles:
            trouble = self.troubles.pop(0)
            if isinstance(trouble, BaseException):
                raise trouble
            return trouble(super().cat_file(path, start=start, end=end, **options))
        return super().cat_file(path, start=start, end=end, **options)


@pytest.fixture
def flaky() -> type[Flaky]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.troubles, Flaky.reads = [], []
    return Flaky


def take(config, count: int, **options) -> list[tuple]:
    batches = itertools.islice(stream.open_stream(config, **options), count)
    return [(b.samples_B.tolist(), b.tokens_BT.tolist(), b.cu_seqlens_S.tolist()) for b in batches]


def open_large(large: Path, cache: Path, protocol: str = "flaky", gib: float = 1.0) -> ShardSet:
    return ShardSet.open(f"{protocol}://{large}", cache=str(cache), cache_gib=gib)


@pytest.mark.parametrize(
    "options", [{}, {"packing": "best_fit"}, {"shuffle": "block"}, {"prefetch": 2}, {"isolate": False}]
)
def test_a_url_gives_the_batches_of_the_local_directory(
    small_dataset: Path, in_memory: str, tmp_path: Path, make_config, options: dict
) -> None:
    there = {"train": f"{in_memory}/train", "validation": f"{in_memory}/validation", "cache_dir": str(tmp_path)}
    assert take(make_config(small_dataset, **options, **there), 12) == take(make_config(small_dataset, **options), 12)
    first, second = (
        [batch.tokens_BT for batch in stream.validation_batches(make_config(small_dataset, **place))]
        for place in (there, {})
    )
    assert torch.equal(torch.cat(first), torch.cat(second))


def test_the_manifest_and_the_tokenizer_lie_in_the_cache_by_content(text_dataset: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(f"file://{text_dataset}/train", cache=str(tmp_path))
    assert shards.check_tokenizer().read_bytes() == (text_dataset / "train" / "tokenizer.model").read_bytes()
    assert manifests.load(shards.directory, field="x").content_id == shards.content_id
    assert shards.directory.parent == tmp_path / "datasets"


def test_passing_troubles_are_passed_over(large: Path, tmp_path: Path, flaky: type[Flaky]) -> None:
    shards = open_large(large, tmp_path)
    local = ShardSet.open(large)
    flaky.troubles = [
        ConnectionError("reset"),
        lambda data: data[:-1],
        TimeoutError("slow"),
        lambda data: bytes(len(data)),
    ]
    for shard in (0, 1):
        assert np.array_equal(shards.read(shard, 0, 150_000), local.read(shard, 0, 150_000))
    assert flaky.troubles == []


def test_a_store_that_never_answers_ends_in_an_error_with_its_url(
    large: Path, tmp_path: Path, flaky: type[Flaky]
) -> None:
    shards = open_large(large, tmp_path)
    flaky.troubles = [ConnectionError("no route")] * 50
    with pytest.raises(MachineError, match=r"flaky://.*shard-00000.*no route.*fix: check network"):
        shards.read(0, 0, 10)
    assert len(flaky.troubles) == 50 - remote.ATTEMPTS


def test_a_store_that_hangs_hangs_nobody(
    large: Path, tmp_path: Path, flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_large(large, tmp_path)
    monkeypatch.setattr(remote, "READ_SECONDS", 0.05)
    ended = threading.Event()
    flaky.troubles = [lambda data: ended.wait(30) and data] * 10
    with pytest.raises(MachineError, match="no answer in"):
        shards.read(0, 0, 10)
    ended.set()


def test_a_store_that_hangs_ends_in_its_own_error_before_the_watchdog(make_config, tmp_path: Path) -> None:
    pauses = sum(remote.FIRST_PAUSE_SECONDS * 2**number for number in range(remote.ATTEMPTS - 1))
    waiting_for_another, own = remote.READ_SECONDS, remote.ATTEMPTS * remote.READ_SECONDS + pauses
    assert waiting_for_another + own < 2 / 3 * make_config(tmp_path).engine.hang_timeout_seconds


def test_a_block_that_cannot_be_touched_is_read_all_the_same(
    large: Path, tmp_path: Path, flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_yours(path: Path, *rest: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", not_yours)
    assert np.array_equal(open_large(large, tmp_path).read(0, 0, 10), ShardSet.open(large).read(0, 0, 10))


@pytest.mark.parametrize("action", ["read_into", "remove"])
def test_a_cache_that_fails_is_told_by_its_setting(
    tmp_path: Path, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path, 100)
    (tmp_path / "block").write_bytes(b"x")

    def fails(*_: object, **__: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    monkeypatch.setattr(Path, "unlink", fails)
    arguments = (0, memoryview(bytearray(1))) if action == "read_into" else ()
    with pytest.raises(MachineError, match="data.cache_dir"):
        getattr(cache, action)("block", *arguments)


@pytest.mark.parametrize("name", ["block", "block.part", ".lock"])
@pytest.mark.parametrize("make", ["directory", "full directory", "link", "dangling link", "fifo"])
def test_what_is_no_block_is_replaced_by_the_block(tmp_path: Path, name: str, make: str) -> None:
    cache, path, other = Cache(tmp_path / "cache", 1000), tmp_path / "cache" / name, tmp_path / "other"
    other.write_bytes(b"other" * 20)
    if make == "fifo":
        os.mkfifo(path)
    elif "link" in make:
        path.symlink_to(other if make == "link" else tmp_path / "nowhere")
    else:
        (path / "inside" if make == "full directory" else path).mkdir(parents=True)
    out = bytearray(10)
    assert not cache.has("block") and not cache.read_into("block", 0, memoryview(out))
    assert cache.put("block", lambda: b"b" * 10)
    assert cache.has("block") and cache.read_into("block", 0, memoryview(out)) and out == b"b" * 10
    assert other.read_bytes() == b"other" * 20


def test_a_cache_whose_own_name_is_taken_is_a_mistake_and_no_failing_machine(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for directory in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(ConfigError, match=r"data\.cache_dir = .*file"):
            Cache(directory, 100)


def test_damage_at_the_store_is_a_data_error_with_url_offset_expected_and_found(
    large: Path, tmp_path: Path, flaky: type[Flaky]
) -> None:
    copy = shutil.copytree(large, tmp_path / "copy")
    tok = copy / "shard-00001.tok"
    data = bytearray(tok.read_bytes())
    data[3 * BLOCK + 5] ^= 1
    tok.write_bytes(data)
    shards = open_large(copy, tmp_path / "cache")
    shards.read(1, 0, BLOCK)
    with pytest.raises(DataError, match=rf"flaky://.*shard-00001.tok.*offset {3 * BLOCK}: expected CRC-32 .*, found"):
        shards.read(1, 0, 150_000)


@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_a_wrong_size_and_a_missing_file_are_found_at_the_opening(
    large: Path, tmp_path: Path, flaky: type[Flaky], change: str
) -> None:
    copy = shutil.copytree(large, tmp_path / "copy")
    tok = copy / "shard-00001.tok"
    tok.unlink() if change == "gone" else os.truncate(tok, 10)
    with pytest.raises(DataError, match=r"shard-00001.tok: expected 320000 bytes, (found 10|cannot be read)"):
        open_large(copy, tmp_path / "cache")


def test_a_damaged_block_of_the_cache_is_fetched_again(large: Path, tmp_path: Path, flaky: type[Flaky]) -> None:
    expected = open_large(large, tmp_path).read(0, 0, 150_000)
    blocks = [path for path in (tmp_path / "blocks").iterdir() if path.stat().st_size >= BLOCK]
    for path in blocks[::2]:
        path.write_bytes(bytes(path.stat().st_size))
    for path in blocks[1::2]:
        os.truncate(path, 7)
    assert np.array_equal(open_large(large, tmp_path).read(0, 0, 150_000), expected)


def test_a_filled_cache_needs_no_store(large: Path, tmp_path: Path, flaky: type[Flaky]) -> None:
    first = open_large(large, tmp_path).read(0, 0, 150_000)
    again = open_large(large, tmp_path)
    flaky.troubles = [ConnectionError("down")] * 50
    assert np.array_equal(again.read(0, 0, 150_000), first)


def test_the_cache_never_grows_beyond_its_bound_and_every_row_stays_right(
    large: Path, tmp_path: Path, flaky: type[Flaky]
) -> None:
    limit = 3 * BLOCK + 5000
    shards, local = open_large(large, tmp_path, gib=limit / 2**30), ShardSet.open(large)
    for place in np.random.default_rng(1).integers(0, 150_000, 60).tolist():
        shard = place % 2
        assert np.array_equal(shards.read(shard, place, 5000), local.read(shard, place, 5000))
        assert sum(p.stat().st_size for p in (tmp_path / "blocks").iterdir() if p.suffix != ".part") <= limit
    assert not list((tmp_path / "blocks").glob("*.part"))


def put(cache: Cache, name: str) -> set[str]:
    """Put a block of 100 bytes; returns what left for it."""
    before = {path.name for path in cache.directory.iterdir()}
    cache.put(name, lambda: bytes(100))
    return before - {path.name for path in cache.directory.iterdir()}


def age(cache: Cache, *names: str) -> None:
    """Touch blocks so that each is younger than the one before."""
    for seconds, name in enumerate(names):
        os.utime(cache.directory / name, (seconds, seconds))


def test_what_no_known_step_needs_leaves_first_the_longest_untouched_before_others(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 4 * 100 + 30)
    for name in ["sooner", "later", "young", "old"]:
        put(cache, name)
    age(cache, "later", "sooner", "old", "young")
    cache.expect((name, 100) for name in ["sooner", "later"])
    age(cache, "later", "sooner", "old", "young")
    assert [put(cache, name) for name in ["next", "after"]] == [{"old"}, {"young"}]


def test_a_block_is_kept_for_all_its_reads_to_come(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 4 * 100 + 30)
    for name in ["twice", "once", "other"]:
        put(cache, name)
    assert cache.expect((name, 100) for name in ["twice", "once", "twice"]) == ["twice", "once"]
    for name in ["twice", "once", "other"]:
        cache.used(name)
    assert cache.is_wanted("twice") and not cache.is_wanted("once")
    age(cache, "twice", "once", "other")
    assert [put(cache, name) for name in "ab"] == [set(), {"once"}]
    cache.used("twice")
    assert not cache.is_wanted("twice")


def test_looking_ahead_takes_half_of_the_cache_at_most(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 6 * 100 + 30)
    assert cache.expect((name, 100) for name in "aabcdeab") == ["a", "b", "c"]
    for name in "aab":
        cache.used(name)
    assert [name for name in "abcde" if cache.is_wanted(name)] == ["a", "b", "c"]


def test_readers_that_share_a_cache_look_half_of_it_ahead_all_together(
    large: Path, tmp_path: Path, flaky: type[Flaky], make_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sources on two ranks of a node: each of the four has an eighth of the cache."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    sources = tuple(SourceSection(name=name, path=f"flaky://{large}", weight=1.0) for name in ("a", "b"))
    room = 24 * BLOCK
    config = make_config(
        large.parent, train="", sources=sources, cache_dir=str(tmp_path), cache_gib=room / 2**30, isolate=False
    )
    opened = stream.open_stream(config)
    next(opened)
    for source in opened.samples.sources:
        ahead = source.rows.shards._files._cache._upcoming
        assert 1 <= len(ahead) <= 3, "three blocks of an eighth of 24; there are ten to read"


def test_only_a_full_cache_is_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, 40 * 100)
    put(cache, "first")
    looks = []
    monkeypatch.setattr(Cache, "_present", lambda *given: looks.append(1) or present(*given))
    for number in range(60):
        Cache(tmp_path, 40 * 100).put(str(number), lambda: bytes(100))
        assert len(list(tmp_path.iterdir())) <= 41
    assert 1 <= len(looks) <= 11


def test_the_blocks_of_coming_steps_are_there_before_they_are_asked_for(
    large: Path, tmp_path: Path, flaky: type[Flaky], make_config
) -> None:
    config = make_config(
        large.parent, train=f"flaky://{large}", cache_dir=str(tmp_path), batch=4, shuffle="block", isolate=False
    )
    opened = stream.open_stream(config)
    next(opened), next(opened)
    files = opened.samples.sources[0].rows.shards._files
    deadline = time.monotonic() + 20
    while any(not files._cache.has(name) for name in list(files._cache._upcoming)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    flaky.troubles = [ConnectionError("down")] * 10_000
    local = take(replace(config, data=replace(config.data, train=str(large))), 5)
    assert [next(opened).tokens_BT.tolist() for _ in range(3)] == [tokens for _, tokens, _ in local[2:]]


def test_checksums_and_document_ends_of_coming_rows_are_fetched_ahead_too(
    large: Path, tmp_path: Path, flaky: type[Flaky]
) -> None:
    shards = open_large(large, tmp_path)
    both, opening = threading.Barrier(2, timeout=10), len(flaky.reads)
    flaky.troubles = [lambda data: (both.wait(), data)[1]] * 2
    shards.expect([(np.array([0, 1]), np.array([0, 5]), np.array([10, 10]))], ends=True)
    first = [path for path, _ in flaky.reads[opening : opening + 2]]
    assert not both.broken and all(path.endswith(".crc") for path in first)
    files = [file for shard in shards.manifest.shards for file in (shard.doc, shard.tok)]
    deadline = time.monotonic() + 20
    while not all((tmp_path / "blocks" / f"{file.sha256}-000000").exists() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_reading_through_a_dataset_counts_each_read_once(large: Path, tmp_path: Path, flaky: type[Flaky]) -> None:
    shards = open_large(large, tmp_path)
    starts_N = np.array([0, 100, 200])
    shards.expect([(np.zeros(3, dtype=np.int64), starts_N, np.full(3, 50))], ends=False)
    name, wanted = f"{shards.manifest.shards[0].tok.sha256}-000000", []
    for start in starts_N:
        shards.gather(np.array([0]), np.array([start]), np.array([50]))
        wanted.append(shards._files._cache.is_wanted(name))
    assert wanted == [True, True, False]


@pytest.mark.slow
def test_processes_share_one_cache_and_fetch_each_block_once(large: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(WORKER), str(large), str(tmp_path / "cache"), str(tmp_path / "log")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    digests = {worker.communicate(timeout=120)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0] and len(digests) == 1
    fetched = (tmp_path / "log").read_text().splitlines()
    assert len(fetched) >= 10 and len(set(fetched)) == len(fetched)


def test_a_process_killed_while_it_fetches_leaves_nothing_in_the_way(
    large: Path, tmp_path: Path, flaky: type[Flaky]
) -> None:
    shards = open_large(large, tmp_path)
    entry = shards.manifest.shards[0].tok
    (tmp_path / "blocks" / f"{entry.sha256}-000000.part").write_bytes(b"")
    (tmp_path / "blocks" / f"{entry.sha256}-000000.99-1.part").write_bytes(b"half a block")
    assert np.array_equal(shards.read(0, 0, 10), ShardSet.open(large).read(0, 0, 10))


@pytest.mark.parametrize(
    "url, message",
    [
        ("memory://nowhere", "no such dataset directory"),
        ("nosuchprotocol://bucket/set", "cannot be opened"),
        ("memory://set", "not a finished dataset"),
    ],
)
def test_a_url_without_a_dataset_is_a_configuration_error(
    in_memory: str, tmp_path: Path, url: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ShardSet.open(url, cache=str(tmp_path), field="data.train")


@pytest.mark.parametrize(
    "url",
    [
        "memory://user:hunter2@host/set",
        "memory://user:hun/hunter2@host/set",
        "memory://set?sig=hunter2",
        "memory://set?X-Amz-Signature=hunter2",
    ],
)
def test_a_url_with_credentials_is_refused_without_repeating_them(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="password or a query") as refused:
        ShardSet.open(url, cache=str(tmp_path), field="data.train")
    assert "hunter2" not in refused.value.line()


@pytest.mark.parametrize("offset", [0, 1, 128])
@pytest.mark.parametrize("place", [0, 70_000, 199_999])
def test_every_checksum_of_a_fetched_block_is_compared(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, place: int
) -> None:
    """A block has 64 of them; and the ids of another trainer may begin after a header."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4 * BLOCK)
    store = Path(shutil.copytree(large, tmp_path / "store"))
    tok = store / "shard-00000.tok"
    tok.write_bytes(bytes(offset) + tok.read_bytes())
    raw = json.loads((store / "manifest.json").read_text())
    raw["shards"][0]["tok_offset"] = offset
    raw["content_id"] = manifests.content_id_of(raw)
    (store / "manifest.json").write_text(json.dumps(raw))
    opened = ShardSet.open(f"file://{store}", cache=str(tmp_path / "a"))
    assert np.array_equal(opened.read(0, 0, 150_000), ShardSet.open(large).read(0, 0, 150_000))
    data = bytearray(tok.read_bytes())
    data[offset + place] ^= 1
    tok.write_bytes(data)
    first = place // BLOCK * BLOCK
    with pytest.raises(DataError, match=rf"shard-00000.tok.*offset {first}: expected CRC-32"):
        ShardSet.open(f"file://{store}", cache=str(tmp_path / "b")).read(0, 0, 10)


def test_a_dropped_dataset_ends_its_fetchers(large: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    shards = ShardSet.open(f"file://{large}", cache=str(tmp_path))
    shards.expect([(np.array([0]), np.array([0]), np.array([10]))], ends=True)
    assert threading.active_count() > before
    del shards
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_plan_needs_comes_before_what_the_next_one_needs(large: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(f"file://{large}", cache=str(tmp_path))
    told: list[list[str]] = []
    shards._files.expect = lambda places: told.append([name for name, _, _ in places])
    plans = [(np.array([0]), np.array([0]), np.array([10])), (np.array([1]), np.array([0]), np.array([10]))]
    shards.expect(plans, ends=True)
    assert told[-1] == [f"shard-0000{shard}.{kind}" for shard in (0, 1) for kind in ("doc", "tok")]


def test_no_half_written_block_stays_behind(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)

    def fails() -> bytes:
        raise OSError(28, "No space left on device")

    with pytest.raises(MachineError):
        cache.put("a", fails)
    put(cache, "b")
    assert cache.put("b", lambda: bytes(100)) is False
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "b"]
