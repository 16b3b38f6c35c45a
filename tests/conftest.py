"""Shared by tests of several rooms: a small dataset, overrides for a smaller `tiny`, ranks as real processes, the
offline files of W&B. Decides which tests are slow, and reports the processor time of tests.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from data_tools.synthetic import write_dataset
from kha_train.data.format.manifest import TokenizerEntry
from kha_train.data.format.writer import prepare, publish_dataset, write_shard
from kha_train.record import read_metrics, read_run, timing_keys

VOCAB_SIZE = 256
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ROOT = Path(__file__).resolve().parents[1]
HEADER, BLOCK, CHUNK_HEADER = 7, 32768, 7
"""Bytes of a `.wandb` file's own header, of a block in LevelDB's log format, and of a chunk header."""
WHOLE, LAST = 1, 4
DEAR, MANY = 3.0, 500
"""Processor seconds of a test that `make test` names at its end, in runs of at least so many tests."""
FEW = 50
"""Modules that a test may import without a pause to collect garbage."""
TREE = (".gitignore", "CONTRIBUTING.md", "README.md", "Makefile", "configs", "constraints.txt", "data_tools", "docs",
         "kha_train", "launch", "pyproject.toml", "tests", "tools")  # fmt: skip
"""What a clone has of the checkout. What `.gitignore` names is not."""
Kha = Callable[..., tuple[int, str, str]]
BEGAN = pytest.StashKey[float]()
COLLECTED = pytest.StashKey[dict[str, set[str]]]()
FORKED: list[float] = []
"""Processor seconds of the ranks of each request to the fork server."""
FORK_SERVER = Path(__file__).parent / "faults" / "fork_server.py"

# No test asserts a time: a busy machine must not fail one.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")


def git(tree: Path, *arguments: str) -> str:
    """What git prints at `tree`, whatever the user's own settings are."""
    alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    name = ("-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "core.quotePath=false")
    return subprocess.run(
        ["git", *name, *arguments], cwd=tree, env=kept | alone, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one commit with the tree as it stands, to be cloned."""
    tree = tmp_path_factory.mktemp("checkout") / "tree"
    tree.mkdir()
    git(tree, "init", "--quiet")
    git(tree, f"--work-tree={ROOT}", "add", "--all", "--", *TREE)
    git(tree, "commit", "--quiet", "--message", "the tree")
    return tree


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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks a test slow whose fixtures start ranks or copy the tree, and puts tests of minutes first, so that no worker
    waits long for the last file."""
    for item in items:
        if {"serve", "follow"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.slow)
        name, target = item.nodeid.partition("[")[0], "make test-slow" if is_slow(item) else "make test"
        if item.get_closest_marker("soak"):
            target = "make soak"
        config.stash.setdefault(COLLECTED, {}).setdefault(name, set()).add(target)
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


def is_slow(item: pytest.Item) -> bool:
    """Whether `make test-slow` runs the test, and not `make test`."""
    return bool(item.get_closest_marker("slow") and not item.get_closest_marker("quick"))


@pytest.fixture(scope="session")
def collected(request: pytest.FixtureRequest) -> Mapping[str, set[str]]:
    """`make` targets that run each test this session collected, by its name without parameters."""
    return request.config.stash[COLLECTED]


def pytest_collection_finish() -> None:
    """What is imported by now stays."""
    keep_out_of_collections()


def keep_out_of_collections() -> None:
    """Every run that is trained here ends with `gc.collect()`, which would walk through all that was ever imported, for
    longer than the run took."""
    gc.collect()
    gc.freeze()


def processor_seconds() -> float:
    """What this process, the children that it has waited for and the ranks of the fork server have computed."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent) + sum(FORKED)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Remembers when the test began. Afterwards, what it imported stays too: an engine and a compiler are imported by
    the first test that needs them."""
    item.stash[BEGAN] = processor_seconds()
    loaded = len(sys.modules)
    result = yield
    if len(sys.modules) > loaded + FEW or nextitem is None or nextitem.path != item.path:
        keep_out_of_collections()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Adds to the last report of a test what it cost, fixtures included that were made for it."""
    if call.when == "teardown":
        item.user_properties.append(("processor", (processor_seconds() - item.stash[BEGAN], is_slow(item))))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what tests have `told`, a property. Names the files that cost most, and each test of `make test` that
    costs much. No test asserts a time: this is for whoever marks tests as slow."""
    for report in terminalreporter.stats.get("passed", []):
        for line in dict(report.user_properties).get("told", []):
            terminalreporter.line(line)
    costs = {
        report.nodeid: dict(report.user_properties)["processor"]
        for report in terminalreporter.stats.get("", [])
        if "processor" in dict(report.user_properties)
    }
    if len(costs) < MANY:
        return
    files: Counter[str] = Counter()
    for name, (seconds, _) in costs.items():
        files[name.partition("::")[0]] += seconds
    terminalreporter.section("processor time")
    terminalreporter.line(f"{files.total():7.1f} s  {len(costs)} tests")
    for file, seconds in files.most_common(15):
        terminalreporter.line(f"{seconds:7.1f} s  {file}")
    dear = [(seconds, name) for name, (seconds, slow) in costs.items() if seconds > DEAR and not slow]
    for seconds, name in sorted(dear, reverse=True):
        terminalreporter.line(f"{seconds:7.1f} s  {name}: slow, unless it paid for a fixture that others use too")


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
def serve(tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """`serve(request)` runs ranks in the fork server and returns its answer."""
    complaints = (tmp_path_factory.mktemp("server") / "stderr").open("w+")
    server = subprocess.Popen(
        [sys.executable, str(FORK_SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        env=clean_environment,
        text=True,
    )

    numbers = itertools.count()

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        number, answer = next(numbers), {"number": -1}
        server.stdin.write(json.dumps({**request, "number": number}) + "\n")
        server.stdin.flush()
        # A test that was interrupted left its answer behind.
        while answer["number"] != number:
            line = server.stdout.readline()
            assert line, Path(complaints.name).read_text()
            answer = json.loads(line)
            FORKED.append(answer["processor"])
        return answer

    try:
        yield ask
        server.stdin.close()
        server.wait(60)
    finally:
        server.kill()


@pytest.fixture(scope="session")
def run_ranks(
    tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str], serve: Callable[..., Any]
) -> Callable[..., list[Any]]:
    """`run_ranks(script, world_size, **arguments)` runs `script` as that many ranks; returns the result of each rank.

    A script reads its arguments as JSON from argv[1] and writes its result as JSON to the file argv[2]. Ranks are
    forked from a process that has imported torch and DeepSpeed. With `fresh=True` each is an interpreter of its own,
    which takes seconds: for scripts that measure memory or threads, or patch torch before DeepSpeed is imported.
    """

    def start(script: Path, arguments: list[list[str]], logs: list[str]) -> list[int | None]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {**clean_environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = []
        for rank, words in enumerate(arguments):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(arguments))}
            with open(logs[rank], "w") as log:
                processes.append(subprocess.Popen([sys.executable, str(script), *words], env=own, stderr=log))
        deadline = time.monotonic() + 300
        try:
            return [process.wait(timeout=max(0.0, deadline - time.monotonic())) for process in processes]
        finally:
            for process in processes:
                process.kill()

    def run(script: Path, world_size: int, fresh: bool = False, **arguments: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp(script.stem)
        answers = [folder / f"{rank}.json" for rank in range(world_size)]
        words = [[json.dumps(arguments), str(answer)] for answer in answers]
        logs = [str(folder / f"{rank}.log") for rank in range(world_size)]
        if fresh:
            codes = start(script, words, logs)
        else:
            request = {"cwd": os.getcwd(), "script": str(script), "arguments": words, "ranks": world_size, "logs": logs}
            codes = serve(request)["codes"]
        failed = [f"rank {rank}:\n{Path(logs[rank]).read_text()}" for rank, code in enumerate(codes) if code != 0]
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


@pytest.fixture
def kha(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kha:
    """`kha(*arguments)`, in an empty directory: exit code, standard output and standard error, of this process and
    those it starts."""
    from kha_train.cli.main import run

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(arguments)
        said = capfd.readouterr()
        return ended.value.code or 0, said.out, said.err

    return call
