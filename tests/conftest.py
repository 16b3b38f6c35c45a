"""Shared by tests of several rooms: a small dataset, overrides for a smaller `tiny`, ranks as real processes, the
offline files of W&B.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.synthetic import write_dataset
from kha_train.data.format.manifest import TokenizerEntry
from kha_train.data.format.writer import prepare, publish_dataset, write_shard
from kha_train.record import read_metrics, read_run, timing_keys

VOCAB_SIZE = 256
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
HEADER, BLOCK, CHUNK_HEADER = 7, 32768, 7
"""Bytes of a `.wandb` file's own header, of a block in LevelDB's log format, and of a chunk header."""
WHOLE, LAST = 1, 4


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of synthetic documents of very unequal length (1 to 2048 tokens), 256 ids."""
    directory = tmp_path_factory.mktemp("dataset")
    write_dataset(directory, vocab_size=VOCAB_SIZE, documents=300, seed=0)
    return directory


@pytest.fixture(scope="session")
def small(dataset: Path) -> list[str]:
    """Overrides for a decoder and data small enough for a step in about 20 ms: 2 layers, width 64, rows of 64
    tokens.
    """
    return [
        f"model.vocab_size={VOCAB_SIZE}",
        "model.seq_len=64",
        "model.layers=2",
        "model.hidden_size=64",
        "moe.expert_width=64",
        "model.loss_chunk_tokens=100",
        f"data.train={dataset}/train",
        f"data.validation={dataset}/validation",
        "validation.rows=8",
        "telemetry.wandb.mode=disabled",
        "telemetry.peak_tflops=0.1",
        "telemetry.console=quiet",
    ]


@pytest.fixture(scope="session")
def padded(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> list[str]:
    """`small` on documents of 40, 60, 33 and 64 tokens, of which `best_fit` puts one into a row of 64."""
    directory = tmp_path_factory.mktemp("padded")
    for split, count in (("train", 64), ("validation", 16)):
        folder = directory / split
        prepare(folder)
        drawn = np.random.default_rng(count)
        lengths = [(40, 60, 33, 64)[number % 4] for number in range(count)]
        documents = [(np.append(drawn.integers(1, VOCAB_SIZE, length - 1), 0), length - 1) for length in lengths]
        shard = write_shard(folder, 0, documents, vocab_size=VOCAB_SIZE, dtype="uint16")
        tokenizer = TokenizerEntry("padded", VOCAB_SIZE, "0" * 64, None, {"eos": 0}, (0, *[1] * (VOCAB_SIZE - 1)))
        publish_dataset(folder, [shard], tokenizer, dtype="uint16", corpus={})
    cache = f"data.cache_dir={directory / 'cache'}"
    data = [f"data.train={directory}/train", f"data.validation={directory}/validation", cache]
    return [*small, *data, "data.packing=best_fit"]


@pytest.fixture(autouse=True)
def no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """No terminal width either, which pytest-xdist sets for its workers."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher variables in this process: neither from outside, nor from a test that trained inside it."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    yield
    for name in LAUNCHER:
        os.environ.pop(name, None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` need one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def clean_environment() -> dict[str, str]:
    """The environment of a process that no launcher started, one thread."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return {**kept, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]) -> Callable[..., list[Any]]:
    """`run_ranks(script, world_size, **arguments)` runs `script` as that many ranks; returns the result of each rank.

    A script reads its arguments as JSON from argv[1] and writes its result as JSON to the file argv[2].
    """

    def run(script: Path, world_size: int, **arguments: Any) -> list[Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {**clean_environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        folder = tmp_path_factory.mktemp(script.stem)
        answers = [folder / f"{rank}.json" for rank in range(world_size)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), json.dumps(arguments), str(answers[rank])],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            errors = [process.communicate(timeout=300)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        failed = [f"rank {rank}:\n{error}" for rank, error in enumerate(errors) if processes[rank].returncode]
        assert not failed, "\n".join(failed)
        return [json.loads(answer.read_text()) for answer in answers]

    return run


@pytest.fixture(scope="session")
def curve() -> Callable[[Path], list[dict[str, Any]]]:
    """`curve(run_dir)`: the surviving lines of the record, without what depends on the clock or the process."""

    def read(run_dir: Path) -> list[dict[str, Any]]:
        timings = timing_keys(read_run(run_dir))
        return [{key: value for key, value in line.items() if key not in timings} for line in read_metrics(run_dir)]

    return read


@pytest.fixture(scope="session")
def wandb_records() -> Callable[[Path], list[Any]]:
    """`wandb_records(path)`: the records of a `.wandb` file, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    def read(path: Path) -> list[Any]:
        data, at, part, records = path.read_bytes(), HEADER, b"", []
        while at + CHUNK_HEADER <= len(data):
            left = BLOCK - at % BLOCK
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            if left < CHUNK_HEADER or kind == 0:
                at += left
                continue
            part += data[at + CHUNK_HEADER : at + CHUNK_HEADER + length]
            at += CHUNK_HEADER + length
            if kind in (WHOLE, LAST):
                records.append(Record.FromString(part))
                part = b""
        return records

    return read


@pytest.fixture(scope="session")
def wandb_rows(wandb_records: Callable[[Path], list[Any]]) -> Callable[[Path], list[dict[str, Any]]]:
    """`wandb_rows(path)`: the rows of the history in a `.wandb` file, key to value."""

    def read(path: Path) -> list[dict[str, Any]]:
        return [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in wandb_records(path)
            if record.WhichOneof("record_type") == "history"
        ]

    return read
