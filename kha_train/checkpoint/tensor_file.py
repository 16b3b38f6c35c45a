"""Writes a safetensors file straight from the tensors' memory, and hashes the bytes on their way to the disk.

The format (https://github.com/huggingface/safetensors): eight bytes of header length, a JSON header with every tensor's
dtype, shape and byte range, then the bytes. The library's own writer copies all tensors once more, and computing the
SHA-256 by reading the file again would accept what the disk had already damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

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


def write_tensors(
    path: Path, tensors: dict[str, Tensor], half_way: Callable[[], None], wrote: Callable[[], None]
) -> FileEntry:
    """Write `tensors` (CPU) to the new file `path` and fsync it.

    `half_way` is called once, in the middle of the bytes; `wrote` after every chunk.

    Returns the size and SHA-256 of the bytes handed to the operating system. Raises OSError (FileExistsError included).
    """
    assert sys.byteorder == "little", "safetensors are little-endian"
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header = _header(ordered)
    size = len(header) + sum(tensor.nbytes for _, tensor in ordered)
    digest = hashlib.sha256(header)
    with open(path, "xb") as file:
        file.write(header)
        half_done = False
        for _, tensor in ordered:
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
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def _header(ordered: list[tuple[str, Tensor]]) -> bytes:
    entries: dict[str, object] = {}
    end = 0
    for key, tensor in ordered:
        dtype = DTYPE_NAMES[tensor.dtype]
        assert tensor.device.type == "cpu" and tensor.element_size() == ELEMENT_BYTES[dtype], key
        start, end = end, end + tensor.nbytes
        entries[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
