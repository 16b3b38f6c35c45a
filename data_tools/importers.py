"""Uses token files of other trainers without copying them.

An imported dataset is a directory of links to the foreign token files, with our document ends, checksums and manifest
beside them. The ids are read once, to check and sum them, and stay where they are.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.staging import refuse_existing, replaced
from kha_train.data.format.canonical import canonical_json
from kha_train.data.format.manifest import FileEntry, Manifest, ShardEntry, TokenizerEntry
from kha_train.data.format.writer import BlockChecksums, checksum_file, prepare, publish_dataset, write_file
from kha_train.data.tokenizer_kinds import open_tokenizer
from kha_train.errors import ConfigError, DataError

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {4: "<i4", 8: "<u2"}
DTYPES = {"uint16": "<u2", "uint32": "<u4", "int32": "<i4"}
"""Dtype of ids in files without a header."""
_CHUNK = 1 << 20


class Foreign(NamedTuple):
    """A foreign token file: where its ids begin, their NumPy dtype, and the exclusive document ends (None: one
    document).
    """

    path: Path
    offset: int
    dtype: np.dtype
    ends: np.ndarray | None


def import_tokens(
    kind: str,
    paths: Sequence[Path],
    out: Path,
    tokenizer: TokenizerEntry,
    *,
    overwrite: bool,
    tokenizer_file: Path | None = None,
    dtype: str = "",
) -> Manifest:
    """Make `out` a dataset over foreign token files, one shard per file. `kind` is a key of `KINDS`. `dtype` (a key of
    `DTYPES`) is for files that do not state theirs. A given tokenizer file is copied into the dataset.

    Raises ConfigError for an unknown kind or dtype, for ids of different types and for files in `out` itself; DataError
    for files that contradict themselves or hold ids outside the vocabulary.
    """
    if kind not in KINDS:
        raise ConfigError("unknown format", field="kind", value=kind, allowed=", ".join(KINDS))
    if dtype and dtype not in DTYPES:
        raise ConfigError("unknown type", field="dtype", value=dtype, allowed=", ".join(DTYPES))
    refuse_existing(out, overwrite=overwrite)
    for path in paths:
        if out.resolve() in (Path(os.path.abspath(path)).parent.resolve(), path.resolve().parent):
            raise ConfigError("lies inside the output directory", field="import", value=str(path), fix="another --out")
    foreign = [_checked(KINDS[kind], path, dtype) for path in map(Path, paths)]
    widths = {one.dtype.itemsize for one in foreign}
    if len(widths) > 1:
        found = ", ".join(f"{one.path}: {one.dtype}" for one in foreign)
        raise ConfigError("all files need ids of one width", field="import", value=found, fix="import them separately")
    stored = "uint16" if widths == {2} else "uint32"
    if stored == "uint16" and tokenizer.vocab > 65_536:
        raise ConfigError(
            "16-bit ids are too small for it", field="vocab_size", value=tokenizer.vocab, allowed="..65536"
        )
    origin = {"imported": kind, "files": [one.path.name for one in foreign]}
    with replaced({"dataset": out}, "import", overwrite=overwrite, keep=False) as beside:
        directory = beside["dataset"]
        prepare(directory)
        shards = [_link_shard(directory, index, one, tokenizer, np.dtype(stored)) for index, one in enumerate(foreign)]
        return publish_dataset(directory, shards, tokenizer, dtype=stored, corpus=origin, tokenizer_file=tokenizer_file)


def tokenizer_of(path: Path | None, vocab_size: int) -> TokenizerEntry:
    """The entry for ids made with the tokenizer at `path`, or with an unavailable tokenizer of `vocab` ids.
    Raises ConfigError unless exactly one of the two is given, and as `open_tokenizer`.
    """
    if (path is None) == (vocab_size == 0):
        raise ConfigError("give exactly one of --tokenizer and --vocab-size", field="import")
    return unknown_tokenizer(vocab_size) if path is None else open_tokenizer(path).entry()


def unknown_tokenizer(vocab_size: int) -> TokenizerEntry:
    """The entry for ids whose tokenizer is not available: bits per byte are unknown then."""
    identity = canonical_json({"kind": "unknown", "vocab": vocab_size})
    return TokenizerEntry("unknown", vocab_size, hashlib.sha256(identity).hexdigest(), None, {}, (0,) * vocab_size)


def _checked(read: Callable[[Path, str], Foreign], path: Path, dtype: str) -> Foreign:
    """What `read` returns for a file, after checking its ids and document ends. Raises ConfigError when it is missing,
    DataError when it contradicts itself.
    """
    try:
        foreign = read(path, dtype)
        kind = foreign.dtype
        if kind.kind not in "ui" or kind.itemsize not in (2, 4) or kind.newbyteorder("<") != kind:
            problem = f"ids of type {kind}"
            raise DataError(problem, field=str(path), allowed="little-endian integers of 16 or 32 bits")
        count, rest = divmod(path.stat().st_size - foreign.offset, kind.itemsize)
        ends = np.asarray([count]) if foreign.ends is None else foreign.ends.astype(np.int64)
    except FileNotFoundError as error:
        raise ConfigError("no such file", field="import", value=str(error.filename)) from error
    except (ValueError, IndexError, EOFError) as error:
        raise DataError(f"cannot be parsed: {error}", field=str(path)) from error
    if rest or not count:
        raise DataError(f"{count} ids of {kind.itemsize} bytes, and {rest} bytes left over", field=str(path))
    if not len(ends) or ends[0] < 0 or (np.diff(ends) < 0).any() or int(ends[-1]) != count:
        problem = f"its document ends do not ascend to its number of tokens, {count}"
        raise DataError(problem, field=str(path), value=ends[-1:].tolist())
    # Empty documents are left out, so that document borders are unique.
    return foreign._replace(ends=np.unique(ends[ends > 0]))


def _link_shard(out: Path, index: int, foreign: Foreign, tokenizer: TokenizerEntry, dtype: np.dtype) -> ShardEntry:
    """Raises DataError for ids outside the vocabulary."""
    assert foreign.ends is not None, "`checked` filled them in"
    ids = np.memmap(foreign.path, dtype=foreign.dtype, mode="r", offset=foreign.offset)
    counts, digest, checksums = np.zeros(tokenizer.vocab, dtype=np.int64), hashlib.sha256(), BlockChecksums()
    low, high = tokenizer.vocab, -1
    for start in range(0, len(ids), _CHUNK):
        part = ids[start : start + _CHUNK]
        low, high = min(low, int(part.min())), max(high, int(part.max()))
        if low < 0 or high >= tokenizer.vocab:
            problem = f"an id outside the vocabulary of {tokenizer.vocab}"
            raise DataError(problem, field=str(foreign.path), value=low if low < 0 else high)
        counts += np.bincount(part, minlength=tokenizer.vocab)
        data = part.tobytes()
        digest.update(data)
        checksums.feed(data)
    link = out / f"shard-{index:05d}.tok"
    link.symlink_to(os.path.abspath(foreign.path))
    text_bytes = int(counts @ np.asarray(tokenizer.bytes_per_id))
    tok = FileEntry(link.name, ids.nbytes, digest.hexdigest())
    doc = write_file(link.with_suffix(".doc"), foreign.ends.astype("<i8").tobytes())
    crc = write_file(link.with_suffix(".crc"), checksum_file(checksums.finish(), foreign.ends))
    return ShardEntry(len(ids), len(foreign.ends), text_bytes, low, high, tok, doc, crc, foreign.offset)


def _megatron(path: Path, dtype: str) -> Foreign:
    """`path` is the .bin; the .idx beside it gives type, sequence lengths and document borders. Raises DataError for a
    malformed index.
    """
    index = path.with_suffix(".idx")
    raw = index.read_bytes()
    version, code = int.from_bytes(raw[9:17], "little"), raw[17] if len(raw) > 17 else 0
    if raw[:9] != _MEGATRON_MAGIC or version != 1 or code not in _MEGATRON_DTYPES:
        raise DataError("not a Megatron index of version 1 with token ids", field=str(index))
    sequences, documents = (int.from_bytes(raw[at : at + 8], "little") for at in (18, 26))
    lengths = np.frombuffer(raw, dtype="<i4", count=sequences, offset=34)
    pointers = np.frombuffer(raw, dtype="<i8", count=sequences, offset=34 + 4 * sequences)
    borders = np.frombuffer(raw, dtype="<i8", count=documents, offset=34 + 12 * sequences)
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    width = np.dtype(_MEGATRON_DTYPES[code]).itemsize
    if (lengths < 0).any() or not np.array_equal(pointers, starts[:-1] * width):
        raise DataError("its sequences are not contiguous", field=str(index))
    if (borders < 0).any() or (borders > sequences).any():
        raise DataError("its documents do not consist of whole sequences", field=str(index))
    return Foreign(path, 0, np.dtype(_MEGATRON_DTYPES[code]), starts[borders])


def _datatrove(path: Path, dtype: str) -> Foreign:
    """`path` is the .ds; the .ds.index beside it holds uint64 document ends. The last one gives the width of an id."""
    index = Path(f"{path}.index")
    raw, size = index.read_bytes(), path.stat().st_size
    ends = np.frombuffer(raw, dtype="<u8")
    if not len(ends) or int(ends[-1]) == 0 or size % int(ends[-1]) or size // int(ends[-1]) not in (2, 4):
        raise DataError(f"its last end does not fit a file of {size} bytes", field=str(index), value=ends[-1:].tolist())
    return Foreign(path, 0, np.dtype(f"<u{size // int(ends[-1])}"), ends)


def _numpy(path: Path, dtype: str) -> Foreign:
    """A flat array of ids: .npy, or without a header and then of `dtype`. Raises ConfigError when `dtype` is missing,
    DataError for an array that is not flat.
    """
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic == b"\x93NUMPY":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != 1:
            raise DataError("not a flat array", field=str(path), value=array.shape)
        return Foreign(path, array.offset, array.dtype, None)
    if _is_archive(path):
        raise DataError("an archive, not a flat array", field=str(path), fix="extract the arrays")
    if not dtype:
        raise ConfigError(
            "has no header, so the type of its ids is unknown",
            field="dtype",
            allowed=", ".join(DTYPES),
            value=str(path),
        )
    return Foreign(path, 0, np.dtype(DTYPES[dtype]), None)


def _is_archive(path: Path) -> bool:
    """Whether a file is an archive, as .npz is. Ids may begin with the same bytes as an archive, but list no files."""
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


KINDS: dict[str, Callable[[Path, str], Foreign]] = {"megatron": _megatron, "datatrove": _datatrove, "numpy": _numpy}
