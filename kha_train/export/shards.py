"""Writes the weights of an export: safetensors files of a limited size, and the index that says what is where.

What goes where is planned from shapes alone. Then every tensor is read, laid out as the host wants it, cast and written
before the next one is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kha_train.checkpoint.tensor_file import Entry, write_bytes, write_streamed
from kha_train.export.links import Link, Part

INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}
"""Says that the tensors are torch's, which transformers asks for."""
Read = Callable[[Part], Tensor]


def write_shards(
    directory: Path, links: Sequence[Link], shapes: Mapping[str, tuple[int, ...]], read: Read, dtype: torch.dtype,
    shard_bytes: int, wrote: Callable[[int], None],
) -> int:  # fmt: skip
    """Write the host's tensors of all `links` into `directory`, in `dtype` unless they are exact, in files of at most
    `shard_bytes` (or one link). `wrote` takes the bytes of each tensor. Returns the bytes of all.

    Raises OSError, and as `read` and the layouts.
    """
    shards = _planned(links, shapes, dtype, shard_bytes)
    places, total = dict[str, str](), 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries = [entry for link in shard for entry in _entries(link, shapes, dtype)]
        write_streamed(directory / name, entries, _tensors(shard, read, dtype, wrote), lambda: None, metadata=METADATA)
        places |= {entry.key: name for entry in entries}
        total += sum(entry.nbytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_bytes(directory / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return total


def bytes_of(links: Sequence[Link], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """The bytes of all tensors."""
    return sum(entry.nbytes for link in links for entry in _entries(link, shapes, dtype))


def _planned(
    links: Sequence[Link], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int
) -> list[list[Link]]:
    """The links of each file, in their order, but exact ones first: a file begins with its wide types."""
    shards: list[list[Link]] = []
    room = 0
    for link in links:
        size = sum(entry.nbytes for entry in _entries(link, shapes, dtype))
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(link)
        room -= size
    return [sorted(shard, key=lambda link: not link.exact) for shard in shards]


def _entries(link: Link, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> list[Entry]:
    kind = torch.float32 if link.exact else dtype
    return [Entry(name, kind, shape) for name, shape in link.host_shapes(shapes).items()]


def _tensors(links: Sequence[Link], read: Read, dtype: torch.dtype, wrote: Callable[[int], None]) -> Iterator[Tensor]:
    for link in links:
        for tensor in link.layout.to_host(tuple(read(part) for part in link.ours)):
            cast = tensor.to(torch.float32 if link.exact else dtype)
            yield cast
            wrote(cast.nbytes)
