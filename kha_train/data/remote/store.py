"""Datasets at a URL, through fsspec (the only user): blocks of 4 MiB in a checked, limited cache on local disk.

A block is named after the SHA-256 of its file in the manifest, so the cache is keyed by content, not by location. A
block is compared with the dataset's checksums before it gets its name by an atomic rename, so nobody sees part of a
block, and any number of processes can share one directory. One of them fetches a block, the others wait for it.

The order of samples is known, so the blocks of coming steps are fetched in advance. When the cache is full, blocks that
no known step needs are removed, least recently used first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from kha_train.config.urls import refuse_credentials
from kha_train.data.format.canonical import parse_json
from kha_train.data.format.files import RESTORE, Files
from kha_train.data.format.manifest import CRC_BLOCK_BYTES, MANIFEST_NAME, FileEntry, Manifest, parse
from kha_train.data.format.shard import BlockBits
from kha_train.data.remote.block_cache import READ_SECONDS, Cache
from kha_train.distributed import Caught
from kha_train.errors import ConfigError, DataError, KhaError, MachineError

BLOCK_BYTES = 4 << 20
ATTEMPTS = 5
DELIVERIES = 3
FIRST_PAUSE_SECONDS = 0.5
_FETCHERS = 4
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class Store:
    """A directory at a URL. Reads are tried `ATTEMPTS` times with growing pauses, and each has a time limit.

    Raises ConfigError for a URL that holds credentials.
    """

    def __init__(self, url: str, *, field: str) -> None:
        refuse_credentials(url, field)
        self.url, self._field = url.rstrip("/"), field
        self._system, self._path = self._patiently(self._connect, self.url)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file, or all of them. Raises DataError when it is missing, MachineError when the
        store does not answer.
        """
        path, where = f"{self._path}/{name}", f"{self.url}/{name}"
        try:
            data: bytes = self._patiently(lambda: self._system.cat_file(path, start=start, end=stop), where)
            return data
        except _ABSENT:
            raise DataError("cannot be read: no such file", field=where, fix=RESTORE) from None

    def sizes(self) -> dict[str, int]:
        """The size of each file by name. Raises ConfigError when there is no such directory, MachineError when the
        store does not answer."""
        try:
            listing = self._patiently(lambda: self._system.ls(self._path, detail=True, refresh=True), self.url)
        except _ABSENT:
            raise ConfigError("no such dataset directory", field=self._field, value=self.url) from None
        return {str(entry["name"]).rpartition("/")[2]: int(entry["size"] or 0) for entry in listing}

    def _connect(self) -> tuple[Any, str]:
        """Raises ConfigError for a store that cannot be read here."""
        fix = "pip install 'kha_train[remote]', and the store's own package: s3fs, gcsfs, adlfs, ..."
        try:
            from fsspec.core import url_to_fs

            system, path = url_to_fs(self.url)
            return system, path
        except (ImportError, ValueError) as error:
            raise ConfigError(f"cannot be opened: {error}", field=self._field, value=self.url, fix=fix) from error

    def _patiently(self, call: Callable[[], Any], where: str) -> Any:
        """The result of `call`. A missing file is reported at once; anything else may be a passing network problem.
        Raises MachineError after the last attempt.
        """
        error: BaseException | None = None
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            one = _Attempt(call)
            error = one.wait(READ_SECONDS)
            if error is None:
                return one.answer
            if isinstance(error, (*_ABSENT, KhaError)):
                raise error
        raise MachineError(
            f"the store did not answer in {ATTEMPTS} attempts: {type(error).__name__}: {error}",
            field=where,
            fix="check network and credentials and start again: the run resumes; or copy the dataset to local disk",
        ) from error


class _Attempt(threading.Thread):
    """One call in its own thread, so that a hanging store blocks nobody else."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(name="data-remote", daemon=True)
        self.answer: Any = None
        self._call, self._caught = call, Caught()
        self.start()

    def run(self) -> None:
        """Make the call."""
        with self._caught:
            self.answer = self._call()

    def wait(self, seconds: float) -> BaseException | None:
        """The exception of the call, if any; TimeoutError when it has not ended in time."""
        self.join(seconds)
        return TimeoutError(f"no answer in {seconds:.0f} s") if self.is_alive() else self._caught.error


class _Block(NamedTuple):
    """Block `number` of a file: bytes [start, start + size) of its content."""

    entry: FileEntry
    number: int
    start: int
    size: int

    @property
    def name(self) -> str:
        """Its name in the cache."""
        return f"{self.entry.sha256}-{self.number:06d}"


class RemoteFiles(Files):
    """`Files` of a dataset at a URL, read through `cache`."""

    looks_ahead = True

    def __init__(self, store: Store, manifest: Manifest, directory: Path, cache: Cache) -> None:
        super().__init__(directory)
        self._store, self._cache = store, cache
        entries = [(entry, 0) for shard in manifest.shards for entry in (shard.doc, shard.crc)]
        entries += [(shard.tok, shard.tok_offset) for shard in manifest.shards]
        self._entries = {entry.file: (entry, offset) for entry, offset in entries}
        # Offset of each file's checksums in the checksum file of its shard.
        self._checksums = {shard.tok.file: (shard.crc, 0) for shard in manifest.shards}
        for shard in manifest.shards:
            self._checksums[shard.doc.file] = (shard.crc, 4 * -(-shard.tok.bytes // CRC_BLOCK_BYTES))
        self._first_blocks = _numbered(entry for entry, _ in entries)
        self._seen = BlockBits(self._first_blocks.pop(""))
        self._expected: SimpleQueue[_Block | None] = SimpleQueue()
        self._fetching = False

    def read(self, name: str, offset: int, count: int) -> bytes:
        """As `Files.read`; raises MachineError when the store does not answer."""
        out = bytearray(count)
        self.read_into(name, offset, memoryview(out))
        return bytes(out)

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` (bytes) from a file, starting at `offset`. Raises as `read`."""
        entry, begin = self._entries[name]
        first = offset - begin
        if first < 0 or first + len(out) > entry.bytes:
            raise self._truncated(name, offset, len(out), max(0, entry.bytes - first))
        for block in _blocks(entry, first, len(out)):
            low, high = max(first, block.start), min(first + len(out), block.start + block.size)
            part = out[low - first : high - first]
            while not self._cache.read_into(block.name, low - block.start, part) or not self._is_good(block):
                self._fetch(block)
            self._cache.used(block.name)

    def path(self, name: str) -> str:
        """The URL of a file, for messages."""
        return f"{self._store.url}/{name}"

    def expect(self, places: Iterable[tuple[str, int, int]]) -> None:
        """Prefetch what reads of (name, offset, bytes) will need, in that order, in the background.

        `places` are all known upcoming reads, including those announced before.
        """
        reads: list[_Block] = []
        for name, offset, count in places:
            entry, begin = self._entries[name]
            reads += _blocks(entry, offset - begin, count)
        blocks = {block.name: block for block in reads}
        for name in self._cache.expect((block.name, block.size) for block in reads):
            self._expected.put(blocks[name])
        if not self._fetching:
            self._fetching = True
            for _ in range(_FETCHERS):
                threading.Thread(target=_fetch_ahead, args=(weakref.ref(self), self._expected), daemon=True).start()
                # The threads end with this object.
                weakref.finalize(self, self._expected.put, None)

    def _fetch_if_wanted(self, block: _Block) -> None:
        if self._cache.is_wanted(block.name) and not self._cache.has(block.name):
            self._fetch(block)

    def _is_good(self, block: _Block) -> bool:
        """Whether a cached block is unchanged since it was stored; each process checks it once."""
        number = self._first_blocks[block.entry.file] + block.number
        if number not in self._seen:
            data = bytearray(block.size)
            if not self._cache.read_into(block.name, 0, memoryview(data)) or self._fault(block, data) is not None:
                self._cache.remove(block.name)
                return False
            self._seen.add(number)
        return True

    def _fetch(self, block: _Block) -> None:
        """Raises DataError when the delivered bytes repeatedly differ from the manifest."""

        def get() -> bytes:
            """The block from the store, checked."""
            begin = self._entries[block.entry.file][1] + block.start
            for _ in range(DELIVERIES):
                data = self._store.read(block.entry.file, begin, begin + block.size)
                fault = self._fault(block, data)
                if fault is None:
                    return data
            assert fault is not None
            raise fault

        if self._cache.put(block.name, get):
            self._seen.add(self._first_blocks[block.entry.file] + block.number)

    def _fault(self, block: _Block, data: bytes | bytearray) -> DataError | None:
        """The fault in the bytes of a block, if any."""
        name = block.entry.file
        if len(data) != block.size:
            return self._truncated(name, block.start, block.size, len(data))
        if name not in self._checksums:
            return self._mismatch(name, block.start, "SHA-256", block.entry.sha256, hashlib.sha256(data).hexdigest())
        crc, begin = self._checksums[name]
        for start in range(0, block.size, CRC_BLOCK_BYTES):
            place = begin + 4 * ((block.start + start) // CRC_BLOCK_BYTES)
            expected = int.from_bytes(self.read(crc.file, place, 4), "little")
            found = zlib.crc32(memoryview(data)[start : start + CRC_BLOCK_BYTES])
            fault = self._mismatch(name, block.start + start, "CRC-32", f"{expected:08x}", f"{found:08x}")
            if fault is not None:
                return fault
        return None

    def _mismatch(self, name: str, offset: int, what: str, expected: str, found: str) -> DataError | None:
        if expected == found:
            return None
        problem = f"offset {offset}: expected {what} {expected}, found {found}: this block was changed"
        return DataError(problem, field=self.path(name), fix=RESTORE)


def _fetch_ahead(files: weakref.ref[RemoteFiles], expected: SimpleQueue[_Block | None]) -> None:
    while (block := expected.get()) is not None:
        alive = files()
        if alive is None:
            return
        # The read that needs the block will meet and report the same error.
        with Caught():
            alive._fetch_if_wanted(block)
        del alive


def open_remote(url: str, cache: Path, cache_bytes: int, *, readers: int, field: str) -> tuple[RemoteFiles, Manifest]:
    """The files of the dataset at `url` and its manifest, both checked. Manifest and tokenizer are copied into `cache`,
    which `readers` datasets of all processes of this node share.

    Raises ConfigError when there is no dataset, or no library for such a URL; DataError when the manifest or the size
    of a file is wrong; MachineError when the store does not answer or the cache cannot be written.
    """
    store = Store(url, field=field)
    sizes = store.sizes()
    if MANIFEST_NAME not in sizes:
        raise ConfigError(f"not a finished dataset: it has no {MANIFEST_NAME}", field=field, value=url)
    text = store.read(MANIFEST_NAME)
    place = f"{store.url}/{MANIFEST_NAME}"
    try:
        manifest = parse(parse_json(text), place)
    except ValueError as error:
        raise DataError(f"is not JSON: {error}", field=place, fix="write the dataset again") from error
    for shard in manifest.shards:
        for entry, offset in ((shard.tok, shard.tok_offset), (shard.doc, 0), (shard.crc, 0)):
            if sizes.get(entry.file) != offset + entry.bytes:
                found = f"found {sizes[entry.file]}" if entry.file in sizes else "cannot be read: no such file"
                problem = f"expected {offset + entry.bytes} bytes, {found}"
                raise DataError(problem, field=f"{store.url}/{entry.file}", fix=RESTORE)
    blocks = Cache(cache / "blocks", cache_bytes, readers)
    files = RemoteFiles(store, manifest, cache / "datasets" / hashlib.sha256(text).hexdigest(), blocks)
    _keep(files.directory, MANIFEST_NAME, text)
    if manifest.tokenizer.file is not None:
        _keep(files.directory, manifest.tokenizer.file, store.read(manifest.tokenizer.file))
    return files, manifest


def _keep(directory: Path, name: str, data: bytes) -> None:
    """Raises MachineError when the file cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f".{name}.{os.getpid()}-{threading.get_ident()}"
        temporary.write_bytes(data)
        if (directory / name).is_dir():
            shutil.rmtree(directory / name)
        os.replace(temporary, directory / name)
    except OSError as error:
        raise MachineError(
            f"the cache of remote data cannot be used: {error.strerror}", field=str(directory), fix="data.cache_dir"
        ) from error


def _size(entry: FileEntry) -> int:
    """Size in bytes of a block of a file. A checksum file is one block."""
    return entry.bytes if entry.file.endswith(".crc") else BLOCK_BYTES


def _numbered(entries: Iterable[FileEntry]) -> dict[str, int]:
    """The number of each file's first block when all blocks are numbered; the key "" holds the total."""
    first, count = {}, 0
    for entry in entries:
        first[entry.file] = count
        count += -(-entry.bytes // _size(entry))
    return {**first, "": count}


def _blocks(entry: FileEntry, first: int, count: int) -> Iterable[_Block]:
    """The blocks that hold bytes [first, first + count) of a file's content."""
    size = _size(entry)
    for number in range(first // size, -(-(first + count) // size)):
        yield _Block(entry, number, number * size, min(size, entry.bytes - number * size))
