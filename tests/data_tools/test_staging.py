"""A dataset is replaced completely or not at all, and by one process at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.encode_files import encode_files
from data_tools.staging import refuse_existing, replaced
from kha_train.data.format.shards import ShardSet
from kha_train.data.sentencepiece_model import train
from kha_train.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train(("".join(chr(97 + i * j % 26) for j in range(40)) + f" word {i}" for i in range(300)), path, vocab_size=300)
    return path


def text(directory: Path, count: int, word: str = "word") -> Path:
    directory.mkdir()
    lines = [json.dumps({"text": f"{word} {i} " * (1 + i % 20)}) for i in range(count)]
    (directory / "a.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_old_dataset_stays_whole_until_the_new_one_is(model: Path, tmp_path: Path) -> None:
    how = {"validation_percent": 20, "shard_bytes": 1000}
    encode_files([text(tmp_path / "old", 100)], model, tmp_path / "out", **how)
    before = contents(tmp_path / "out")
    bad = text(tmp_path / "new", 100, "new")
    (bad / "b.jsonl").write_text("{\n")
    with pytest.raises(ConfigError, match="--overwrite"):
        encode_files([bad], model, tmp_path / "out", **how)
    with pytest.raises(DataError, match=r"b\.jsonl"):
        encode_files([bad], model, tmp_path / "out", **how, overwrite=True)
    assert {name: data for name, data in contents(tmp_path / "out").items() if ".writing-" not in name} == before
    (bad / "b.jsonl").unlink()
    (tmp_path / "out" / "train" / "notes.txt").write_text("the user's own")
    encode_files([bad], model, tmp_path / "out", **how, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "validation"]
    assert (tmp_path / "out" / "train" / "notes.txt").read_text() == "the user's own"
    ShardSet.open(tmp_path / "out" / "train").token_counts()


def test_two_cannot_write_in_one_place(tmp_path: Path) -> None:
    other = "import sys\nfrom pathlib import Path\nfrom data_tools.staging import replaced\n"
    other += "with replaced({'a': Path(sys.argv[1]) / 'a'}, 'x', overwrite=False, keep=False): pass\n"

    def start() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", other, tmp_path], capture_output=True, text=True, check=False)

    with replaced({"a": tmp_path / "a"}, "y", overwrite=False, keep=False) as beside:
        assert "another process is writing there" in start().stderr
        beside["a"].mkdir(parents=True)
    assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize("meanwhile", ["deleted", "replaced"])
def test_a_lock_that_its_owner_deleted_before_it_was_taken_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    def take(*_: int) -> None:
        (tmp_path / ".a.lock").unlink()
        if meanwhile == "replaced":
            (tmp_path / ".a.lock").touch()

    monkeypatch.setattr("data_tools.staging.fcntl.lockf", take)
    with (
        pytest.raises(ConfigError, match="another process is writing there"),
        replaced({"a": tmp_path / "a"}, "x", overwrite=False, keep=False),
    ):
        pass


def test_a_dataset_that_was_finished_before_the_lock_was_taken_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finished_meanwhile(*_: int) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "manifest.json").write_text("{}")

    monkeypatch.setattr("data_tools.staging.fcntl.lockf", finished_meanwhile)
    with (
        pytest.raises(ConfigError, match="already holds a dataset"),
        replaced({"a": tmp_path / "a"}, "x", overwrite=False, keep=False),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_shards_whose_manifest_is_lost_are_not_written_over_unasked(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "shard-00000.tok").write_bytes(b"12")
    with pytest.raises(ConfigError, match="shards, though no manifest"):
        refuse_existing(tmp_path / "a", overwrite=False)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="not a directory"):
        refuse_existing(tmp_path / "file", overwrite=True)


def children(parent: int) -> list[int]:
    """The processes whose parent, or parent's parent, is `parent` (Linux)."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
            parents[int(entry.parent.name)] = int(fields[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    first = [one for one, its in parents.items() if its == parent]
    return first + [one for one, its in parents.items() if its in first]


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_the_processes_of_a_killed_encoding_end_too_and_the_next_one_writes_the_same(
    model: Path, tmp_path: Path
) -> None:
    source = text(tmp_path / "text", 60_000)
    how = ["data", "tokenize", "--text", source, "--tokenizer", model, "--shard-bytes", "400000", "--workers", "2"]
    program = "from kha_train.cli.main import run; run()"
    command = [sys.executable, "-c", program, *how, "--out"]
    started = subprocess.Popen([*command, tmp_path / "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("killed/.train-validation.writing-*/train/*.done")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    family = children(started.pid)
    assert len(family) >= 3, "two workers, and who passes their progress on"
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    while any(map(lives, family)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run([*command, tmp_path / "killed"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, tmp_path / "straight"], check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told_and_what_is_finished_is_kept(model: Path, tmp_path: Path) -> None:
    source = text(tmp_path / "text", 60_000)
    how = ["data", "tokenize", "--text", source, "--tokenizer", model, "--shard-bytes", "400000", "--workers", "2"]
    command = [sys.executable, "-c", "from kha_train.cli.main import run; run()", *how, "--out", tmp_path / "out"]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (notes := list(tmp_path.glob("out/.train-validation.writing-*/train/*.part"))):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int(notes[0].name.split(".")[-2]), signal.SIGKILL)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 75 and "machine error: workers = 2: a process was killed" in said
    assert "Traceback" not in said
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "validation"]
