"""One data loader, measured in a process of its own: a JSON request on standard input, one JSON line as the answer.

Runs under the project's interpreter for ours, and under the peers' own environment for theirs (adapters: `peers.py`).
The answer: CPU-seconds and seconds for tokens read on the first pass, when the pages of a mapped file are met for the
first time, and on the next; seconds to the first batch, private memory over that of importing torch alone, time to
seek.
"""

# B rows  L tokens of a row  W = L + 1

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kha_train.bench.peers import Opened, Shape, load_loaders

CONFIG = "config.yaml"
"""File in the working directory from which our loader reads its configuration."""
WARM_UP = 30
BETWEEN_LOOKS = 16
"""Batches read between two looks at the clock, which take a microsecond."""
ROWS_TOGETHER = 32
"""Shuffled rows copied per call where nothing loads."""
MOST_BETWEEN = 3.0
"""CPU-seconds for the rest of the first pass: the slowest loaders do not reach its end."""


def _ours(config_file: Path, shape: Shape, *, everything: bool = False, composed: bool = False) -> Opened:
    # Not imported at the top: the peers' environment has none of our packages.
    from kha_train.config.compose import compose, load
    from kha_train.data.stream import open_stream

    if composed:
        # Hydra's memory, as in a process that trains.
        compose()
    stream = open_stream(load(config_file))

    def batches(step: int) -> Iterator[torch.Tensor]:
        """Batches from `step` on, endlessly."""
        stream.samples_seen = step * shape.B
        for batch in stream:
            if everything:
                _ = batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen
            yield batch.tokens_BT

    return Opened(batches(0), batches)


def _cast(directory: Path, shape: Shape) -> Opened:
    """Not a loader: reads in order and widens. An upper bound for this machine."""
    files = [np.memmap(path, dtype="<u2", mode="r") for path in sorted(directory.glob("*.tok"))]
    count = shape.B * shape.L

    def batches() -> Iterator[torch.Tensor]:
        """In order, endlessly."""
        while True:
            for file in files:
                for first in range(0, len(file) - count, count):
                    yield torch.from_numpy(file[first : first + count].astype(np.int64)).view(shape.B, shape.L)

    return Opened(batches(), None)


def _cast_shuffled(directory: Path, shape: Shape) -> Opened:
    """Not a loader: copies shuffled rows, each with the id that follows it, and widens them. An upper bound for a
    loader.
    """
    files = [np.memmap(path, dtype="<u2", mode="r").data for path in sorted(directory.glob("*.tok"))]
    places = [(file, first) for file in files for first in range(0, len(file) - shape.L, shape.L)]
    order = np.random.default_rng(0).permutation(len(places))
    together = max(shape.B, ROWS_TOGETHER // shape.B * shape.B)

    def batches() -> Iterator[torch.Tensor]:
        """In one shuffled order, endlessly."""
        while True:
            for first in range(0, len(order) - together + 1, together):
                some = [places[i] for i in order[first : first + together].tolist()]
                ids = bytearray().join([file[begin : begin + shape.L + 1] for file, begin in some])
                for rows_BW in np.frombuffer(ids, dtype="<u2").reshape(-1, shape.B, shape.L + 1):
                    yield torch.from_numpy(rows_BW[:, :-1].astype(np.int64))

    return Opened(batches(), None)


NO_LOADERS = {"cast": _cast, "cast, shuffled rows": _cast_shuffled}


def open_loader(name: str, root: Path, shape: Shape, options: dict[str, Any], adapters: Path | None) -> Opened:
    """The loader `name` over the tokens in `root`. A peer's comes from the folder `adapters`; writes its own format if
    it does not exist yet.
    """
    if name in NO_LOADERS:
        return NO_LOADERS[name](root / "ours", shape)
    if name == "ours":
        return _ours(Path(CONFIG), shape, **options)
    assert adapters is not None, "a peer has an adapter"
    peer, directory = load_loaders(adapters).PEERS[name], root / name
    ready = directory / "ready"
    if not ready.exists():
        directory.mkdir(exist_ok=True)
        peer.write(root / "ours", directory, shape)
        ready.touch()
    return peer.open(directory, shape)


def measure(request: dict[str, Any], started: float) -> dict[str, Any]:
    """Run the loader of `request` and return its figures."""
    torch_alone = _private_mb()
    shape = Shape(**request["shape"])
    adapters = Path(request["adapters"]) if request["adapters"] else None
    opened = open_loader(request["loader"], Path(request["root"]), shape, request["options"], adapters)
    begun, from_disk = time.perf_counter(), _from_disk()
    first = next(opened.batches)
    assert first.shape == (shape.B, shape.L) and first.dtype == torch.int64, (first.shape, first.dtype)
    seconds_to_first = time.time() - started
    if request["only_prepare"]:
        return {}
    at_start = first.numel() + sum(batch.numel() for batch in itertools.islice(opened.batches, WARM_UP))
    seconds_at_start, from_disk = time.perf_counter() - begun, _from_disk() - from_disk
    fresh = _speed(opened.batches, request["tokens"], request["cpu_seconds"])
    _speed(opened.batches, request["tokens"] - fresh.tokens, MOST_BETWEEN)
    warm = _speed(opened.batches, request["tokens"], request["cpu_seconds"])
    private = _private_mb() - torch_alone
    seek = []
    if opened.seek is not None:
        for target in request["seek"]:
            begin_seek = time.perf_counter()
            next(opened.seek(target))
            seek.append(1e3 * (time.perf_counter() - begin_seek))
    return {
        "million_tokens_per_cpu_second": warm.tokens / warm.cpu / 1e6,
        "million_tokens_per_cpu_second_first_pass": fresh.tokens / fresh.cpu / 1e6,
        "million_tokens_per_second": warm.tokens / warm.wall / 1e6,
        "million_tokens_per_second_at_start": at_start / seconds_at_start / 1e6,
        "disk_bytes_per_token_at_start": from_disk / at_start,
        "cpu_seconds_for_all_tokens": warm.cpu * request["tokens"] / warm.tokens,
        "seconds_to_first_batch": seconds_to_first,
        "private_mb": private,
        "seek_ms": seek,
    }


class _Read(NamedTuple):
    """Tokens read, with the CPU-seconds and wall seconds that took."""

    tokens: int
    cpu: float
    wall: float


def _speed(batches: Iterator[torch.Tensor], tokens: int, cpu_seconds: float) -> _Read:
    """Read `tokens`, or for `cpu_seconds` of this process if that ends sooner."""
    read, cpu, wall = 0, time.process_time(), time.perf_counter()
    while read < tokens and time.process_time() - cpu < cpu_seconds:
        read += sum(batch.numel() for batch in itertools.islice(batches, BETWEEN_LOOKS))
    return _Read(read, time.process_time() - cpu, time.perf_counter() - wall)


def _from_disk() -> int:
    """Bytes that this process has read from disks (Linux)."""
    return next(
        int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes")
    )


def _private_mb() -> float:
    """Memory of this process that is neither shared nor backed by a file (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return kilobytes["Anonymous"] / 1024


def main() -> None:
    """Read a request, print the result on standard output."""
    request = json.loads(sys.stdin.read())
    torch.set_num_threads(1)
    # As in any process that trains: only then does glibc keep freed memory. Otherwise every loader would return it
    # after each batch of a MiB and touch new pages in the next.
    np.empty((32 << 20) - 65_536, dtype=np.uint8)
    answer_to = os.dup(1)
    os.dup2(2, 1)  # peers print too; the result must stand alone
    answer = {"torch": torch.__version__, **measure(request, request["started"])}
    with os.fdopen(answer_to, "w") as file:
        file.write(json.dumps(answer))
    os._exit(0)  # some peers keep threads that never end


if __name__ == "__main__":
    main()
