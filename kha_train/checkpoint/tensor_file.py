"""Writes a safetensors file straight from the tensors' memory, and hashes the bytes on their way to the disk.

The format (https://github.com/huggingface/safetensors): eight bytes of header length, a JSON header with every tensor's
dtype, shape and byte range, then the bytes. The library's own writer copies all tensors once more, and computing the
SHA-256 by reading the file again would accept what the disk had already damaged.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kha_train.checkpoint.manifest import ELEMENT_BYTES, FileEntry

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 16 * 2**20


class Entry(NamedTuple):
    """What the header of a file says of one tensor, besides its place."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of its values."""
        return math.prod(self.shape) * ELEMENT_BYTES[DTYPE_NAMES[self.dtype]]


def write_tensors(
    path: Path, tensors: dict[str, Tensor], half_way: Callable[[], None], wrote: Callable[[], None]
) -> FileEntry:
    """Write `tensors` (CPU) to the new file `path` and fsync it.

    `half_way` is called once, in the middle of the bytes; `wrote` after every chunk.

    Returns the size and SHA-256 of the bytes handed to the operating system. Raises OSError (FileExistsError included).
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    entries = [Entry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in ordered]
    return write_streamed(path, entries, (tensor for _, tensor in ordered), wrote, half_way)


def write_streamed(
    path: Path,
    entries: Sequence[Entry],
    tensors: Iterable[Tensor],
    wrote: Callable[[], None],
    half_way: Callable[[], None] = lambda: None,
    metadata: Mapping[str, str] | None = None,
) -> FileEntry:
    """`write_tensors` for tensors that are made one by one: `tensors` yields those that `entries` announce, in that
    order, wide types first. `metadata` goes into the header.
    """
    assert sys.byteorder == "little", "safetensors are little-endian"
    header = _header(entries, metadata)
    size = len(header) + sum(entry.nbytes for entry in entries)
    digest = hashlib.sha256(header)
    with open(path, "xb") as file:
        file.write(header)
        half_done = False
        for entry, tensor in zip(entries, tensors, strict=True):
            assert entry[1:] == (tensor.dtype, tuple(tensor.shape)) and tensor.device.type == "cpu", entry.key
            memory = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(memory), _CHUNK_BYTES):
                chunk = memory[start : start + _CHUNK_BYTES]
                file.write(chunk)
                digest.update(chunk)
                wrote()
                if not half_done and file.tell() * 2 >= size:
                    half_done = True
                    file.flush()
                    half_way()
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size, digest.hexdigest())


def write_bytes(path: Path, content: bytes) -> FileEntry:
    """Write the new file `path` and fsync it. Raises OSError (FileExistsError included)."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return entry_of(content)


def entry_of(content: bytes) -> FileEntry:
    """The entry of a file with this content."""
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def _header(entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> bytes:
    described: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        described[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
