"""Token files of other trainers, taken over without copying.

An imported dataset is a directory of links to the foreign token files with our document ends, checksums and manifest
beside them; the ids themselves are read once, to check and sum them, and stay where they are.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kha_train.data.canonical import canonical_json
from kha_train.data.manifest import CRC_BLOCK_BYTES, FileEntry, Manifest, ShardEntry, TokenizerEntry
from kha_train.data.tokenizer import Tokenizer
from kha_train.data.writer import checksum_file, prepare, publish_dataset, write_file
from kha_train.errors import ConfigError, DataError

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {4: "<i4", 8: "<u2", 5: "<i8"}


class Foreign(NamedTuple):
    """A foreign token file: where its ids begin, their NumPy dtype, and the exclusive document ends (None: one)."""

    path: Path
    offset: int
    dtype: np.dtype
    ends: np.ndarray | None


def import_tokens(
    kind: str, paths: Sequence[Path], out: Path, tokenizer: TokenizerEntry, *, overwrite: bool
) -> Manifest:
    """Make `out` a dataset over foreign token files, one shard a file; `kind` is a key of `KINDS`.

    Raises ConfigError for another kind and for ids that are neither uint16 nor 32 bits wide, DataError for files that
    contradict themselves or hold ids outside the vocabulary.
    """
    if kind not in KINDS:
        raise ConfigError("no such format", field="kind", value=kind, allowed=", ".join(KINDS))
    prepare(out, overwrite=overwrite)
    foreign = [KINDS[kind](Path(path), tokenizer.vocab) for path in paths]
    widths = {one.dtype.itemsize for one in foreign}
    if widths not in ({2}, {4}):
        raise ConfigError("ids are uint16, or 32 bits wide, in all files alike", field="import", value=sorted(widths))
    dtype = "uint16" if widths == {2} else "uint32"
    shards = [_link_shard(out, index, one, tokenizer, np.dtype(dtype)) for index, one in enumerate(foreign)]
    origin = {"imported": kind, "files": [str(one.path) for one in foreign]}
    return publish_dataset(out, shards, tokenizer, dtype=dtype, corpus=origin)


def tokenizer_of(path: Path | None, vocab_size: int) -> TokenizerEntry:
    """Of ids made with the sentencepiece model at `path`, or with one that is not at hand. Raises ConfigError unless
    exactly one of the two is given, and as `Tokenizer`."""
    if (path is None) == (vocab_size == 0):
        raise ConfigError("one of --tokenizer and --vocab-size", field="import")
    return unknown_tokenizer(vocab_size) if path is None else replace(Tokenizer(path).entry(), file=None)


def unknown_tokenizer(vocab_size: int) -> TokenizerEntry:
    """For ids whose tokenizer is not at hand: bits per byte cannot be told then."""
    identity = canonical_json({"kind": "unknown", "vocab": vocab_size})
    return TokenizerEntry("unknown", vocab_size, hashlib.sha256(identity).hexdigest(), None, {}, (0,) * vocab_size)


def _link_shard(out: Path, index: int, foreign: Foreign, tokenizer: TokenizerEntry, dtype: np.dtype) -> ShardEntry:
    ids = np.memmap(foreign.path, dtype=dtype.newbyteorder("<"), mode="r", offset=foreign.offset)
    ends = np.asarray([len(ids)], dtype=np.int64) if foreign.ends is None else np.unique(foreign.ends.astype(np.int64))
    ends = ends[ends > 0]
    if not len(ids) or not len(ends) or int(ends[-1]) != len(ids):
        raise DataError(f"its documents do not end at its last token, {len(ids)}", field=str(foreign.path))
    low, high = int(ids.min()), int(ids.max())
    if high >= tokenizer.vocab:
        raise DataError(f"an id outside the vocabulary of {tokenizer.vocab}", field=str(foreign.path), value=high)
    text_bytes = int(np.bincount(ids, minlength=tokenizer.vocab) @ np.asarray(tokenizer.bytes_per_id))
    link = out / f"shard-{index:05d}.tok"
    link.symlink_to(os.path.abspath(foreign.path))
    data = ids.view(np.uint8)
    blocks = [zlib.crc32(data[start : start + CRC_BLOCK_BYTES]) for start in range(0, len(data), CRC_BLOCK_BYTES)]
    tok = FileEntry(link.name, len(data), hashlib.sha256(data).hexdigest())
    doc = write_file(link.with_suffix(".doc"), ends.astype("<i8").tobytes())
    crc = write_file(link.with_suffix(".crc"), checksum_file(np.asarray(blocks, dtype="<u4").tobytes(), ends))
    return ShardEntry(len(ids), len(ends), text_bytes, low, high, tok, doc, crc, foreign.offset)


def _megatron(path: Path, vocab: int) -> Foreign:
    """`path` is the .bin; the .idx beside it gives type, sequence lengths and document borders."""
    raw = path.with_suffix(".idx").read_bytes()
    version, code = int.from_bytes(raw[9:17], "little"), raw[17]
    if raw[:9] != _MEGATRON_MAGIC or version != 1 or code not in _MEGATRON_DTYPES:
        raise DataError("not a Megatron index of version 1 with ids", field=str(path.with_suffix(".idx")))
    sequences, documents = (int.from_bytes(raw[at : at + 8], "little") for at in (18, 26))
    lengths = np.frombuffer(raw, dtype="<i4", count=sequences, offset=34)
    borders = np.frombuffer(raw, dtype="<i8", count=documents, offset=34 + 12 * sequences)
    ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[borders]
    return Foreign(path, 0, np.dtype(_MEGATRON_DTYPES[code]), ends)


def _datatrove(path: Path, vocab: int) -> Foreign:
    """`path` is the .ds; the .ds.index beside it holds uint64 document ends."""
    width = 2 if vocab <= 65_536 else 4
    return Foreign(path, 0, np.dtype(f"<u{width}"), np.fromfile(f"{path}.index", dtype="<u8"))


def _numpy(path: Path, vocab: int) -> Foreign:
    """A flat array of ids: .npy, or without a header, then uint16 when the vocabulary fits."""
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic == b"\x93NUMPY":
        array = np.load(path, mmap_mode="r")
        if array.ndim != 1:
            raise DataError("not a flat array", field=str(path), value=array.shape)
        return Foreign(path, array.offset, array.dtype, None)
    return Foreign(path, 0, np.dtype("<u2" if vocab <= 65_536 else "<u4"), None)


KINDS: dict[str, Callable[[Path, int], Foreign]] = {"megatron": _megatron, "datatrove": _datatrove, "numpy": _numpy}
