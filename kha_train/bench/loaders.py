"""One data loader, measured in a process of its own: `python loaders.py NAME` with a JSON request on standard input.

Runs under the project's interpreter for ours and under the peers' own environment for theirs; peers are imported by
name, because they are no dependency of this project. Every loader yields batches of int64 ids, globally shuffled.
Answers with one JSON line: tokens a CPU-second and a second, seconds to the first batch, private memory, time to seek.
"""

# B rows  L tokens of a row  W = L + 1

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

WARM_UP = 30
SEED = 1


class Opened(NamedTuple):
    """A loader: `batches` from its beginning; `seek(step)` gives the batches from that step on, None where the loader
    cannot."""

    batches: Iterator[torch.Tensor]
    seek: Callable[[int], Iterator[torch.Tensor]] | None


def _map_style(dataset: Any, order: np.ndarray, B: int, row: Callable[[Any], Any]) -> Opened:
    """Batches of a dataset that is indexed by row number."""

    def batches(step: int) -> Iterator[torch.Tensor]:
        while True:
            for first in range(step * B % (len(order) - B), len(order) - B + 1, B):
                yield torch.stack([torch.as_tensor(row(dataset[int(i)])) for i in order[first : first + B]]).long()
            step = 0

    return Opened(batches(0), batches)


def _ours(root: Path, B: int, L: int, vocab: int, **options: Any) -> Opened:
    from dataclasses import replace

    from kha_train.config.compose import compose
    from kha_train.data.stream import open_stream

    base = compose()
    everything = options.pop("everything", False)
    data = replace(base.data, train=str(root / "ours"), global_batch_size=B, **options)
    config = replace(base, model=replace(base.model, vocab_size=vocab, seq_len=L), data=data)

    stream = open_stream(config)

    def batches(step: int) -> Iterator[torch.Tensor]:
        stream.samples_seen = step * B
        for batch in stream:
            if everything:
                _ = batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen
            yield batch.tokens_BT

    return Opened(batches(0), batches)


def _cast(root: Path, B: int, L: int, vocab: int) -> Opened:
    """No loader: reads in order and widens. The speed of light of this machine."""
    files = [np.memmap(path, dtype="<u2", mode="r") for path in sorted((root / "ours").glob("*.tok"))]

    def batches(step: int) -> Iterator[torch.Tensor]:
        while True:
            for file in files:
                for first in range(0, len(file) - B * L, B * L):
                    yield torch.from_numpy(file[first : first + B * L].astype(np.int64)).view(B, L)

    return Opened(batches(0), None)


def _datatrove(root: Path, B: int, L: int, vocab: int) -> Opened:
    module = import_module("datatrove.utils.dataset")
    dataset = module.DatatroveFolderDataset(str(root / "datatrove"), L, token_size=2, shuffle=True, seed=SEED)
    return _map_style(dataset, np.arange(len(dataset)), B, lambda item: item["input_ids"])


def _datatrove_loader(root: Path, B: int, L: int, vocab: int) -> Opened:
    """The same dataset as its users read it, through torch's DataLoader."""
    module = import_module("datatrove.utils.dataset")
    dataset = module.DatatroveFolderDataset(str(root / "datatrove"), L, token_size=2, shuffle=True, seed=SEED)

    def batches(step: int) -> Iterator[torch.Tensor]:
        while True:
            for batch in torch.utils.data.DataLoader(dataset, batch_size=B, drop_last=True):
                yield batch["input_ids"]

    return Opened(batches(0), None)


def _grain(root: Path, B: int, L: int, vocab: int) -> Opened:
    grain = import_module("grain")
    files = [np.memmap(path, dtype="<u2", mode="r") for path in sorted((root / "ours").glob("*.tok"))]
    rows = [(len(file) - 1) // L for file in files]
    ends = np.cumsum(rows)

    class Source:
        def __len__(self) -> int:
            return int(ends[-1])

        def __getitem__(self, index: int) -> np.ndarray:
            shard = int(np.searchsorted(ends, index, side="right"))
            start = (index - int(ends[shard]) + rows[shard]) * L
            return files[shard][start : start + L + 1].astype(np.int64)

    def batches(step: int) -> Iterator[torch.Tensor]:
        data = grain.MapDataset.source(Source()).seed(SEED).shuffle().repeat().batch(B)
        for number in range(step, len(data)):
            yield torch.from_numpy(data[number])

    return Opened(batches(0), batches)


LOADERS: dict[str, Callable[..., Opened]] = {
    "cast": _cast,
    "ours": _ours,
    "datatrove": _datatrove,
    "datatrove_loader": _datatrove_loader,
    "grain": _grain,
}


def measure(request: dict[str, Any], started: float) -> dict[str, Any]:
    """Run the loader of `request` and return its figures."""
    shape = {"B": request["batch"], "L": request["seq_len"], "vocab": request["vocab"]}
    opened = LOADERS[request["loader"]](Path(request["root"]), **shape, **request["options"])
    first = next(opened.batches)
    seconds_to_first = time.time() - started
    for _ in range(WARM_UP):
        next(opened.batches)
    steps, begin = 0, (time.process_time(), time.perf_counter())
    while steps * first.numel() < request["tokens"] and time.process_time() - begin[0] < request["cpu_seconds"]:
        next(opened.batches)
        steps += 1
    cpu, wall = time.process_time() - begin[0], time.perf_counter() - begin[1]
    tokens = steps * shape["B"] * shape["L"]
    seek = []
    for target in request["seek"] if opened.seek else []:
        begin_seek = time.perf_counter()
        next(opened.seek(target))
        seek.append(1e3 * (time.perf_counter() - begin_seek))
    return {
        "million_tokens_per_cpu_second": tokens / cpu / 1e6,
        "million_tokens_per_second": tokens / wall / 1e6,
        "tokens": tokens,
        "seconds_to_first_batch": seconds_to_first,
        "private_mb": _private_mb(),
        "seek_ms": seek,
    }


def _private_mb() -> float:
    """Memory of this process that no other shares and no file backs (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return kilobytes["Anonymous"] / 1024


def main() -> None:
    """Read a request, answer on standard output."""
    request = json.loads(sys.stdin.read())
    torch.set_num_threads(1)
    answer_to = os.dup(1)
    os.dup2(2, 1)  # peers print; the answer stands alone
    answer = {"torch": torch.__version__, **measure(request, request["started"])}
    with os.fdopen(answer_to, "w") as file:
        file.write(json.dumps(answer))
    os._exit(0)  # some peers keep threads that never end


if __name__ == "__main__":
    main()
