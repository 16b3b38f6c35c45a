"""Every mistake a user can make ends as one clear line and its exit code, without a traceback."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.corpus import build_corpus
from data_tools.encode import encode_corpus
from data_tools.train_tokenizer import train_tokenizer
from kha_train.cli.main import run
from kha_train.record import Record, read_metrics, read_run

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Train:
    """`train(*overrides)` as the command does it; returns the exit code and the content of standard error."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "KHA_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def call(*overrides: str) -> tuple[int, str]:
        settings = [*small, "model.layers=1", "run.steps=2", f"run.dir={tmp_path}/run", *overrides]
        with pytest.raises(SystemExit) as ended:
            run(["train", *settings])
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        return ended.value.code or 0, capfd.readouterr().err

    return call


@pytest.fixture
def own_dataset(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    shutil.copytree(dataset, tmp_path / "data")
    return tmp_path / "data"


CONFIGURATION = {
    "a missing shard directory": (["data.train=/nowhere"], ["data.train", "/nowhere"]),
    "a vocabulary that disagrees": (["model.vocab_size=512"], ["512", "256"]),
    "heads that do not divide": (["model.kv_heads=3"], ["model.kv_heads", "1, 2, 4"]),
    "a batch that does not divide": (
        ["engine.micro_batch_size=3"],
        ["data.global_batch_size=6", "data.global_batch_size=9"],
    ),
    "an unknown setting": (["model.kvheads=2"], ["model.kvheads", "did you mean model.kv_heads"]),
    "an unknown preset": (["attention=kha_mpl"], ["kha_mpl", "did you mean kha_mlp"]),
    "a wrong type": (["run.steps=many"], ["run.steps", "int"]),
    "an impossible combination": (
        ["engine.precision=fp32", "engine.grad_accum_dtype=bf16"],
        ["engine.grad_accum_dtype", "fp32"],
    ),
    "a setting left open": (["data=shards", "data.validation=???"], ["data.validation"]),
    "a GPU where there is none": (["engine.device=cuda"], ["engine.device"]),
}


@pytest.mark.parametrize("mistake", CONFIGURATION)
def test_a_configuration_mistake_ends_with_2_and_says_what_to_change(mistake: str, train: Train) -> None:
    overrides, words = CONFIGURATION[mistake]
    code, said = train(*overrides)
    assert code == 2, said
    assert said.startswith("configuration error: ")
    assert said.count("\n") == 1, said
    for word in words:
        assert word in said


@pytest.mark.slow
def test_a_tokenizer_file_that_is_not_the_shards_own_ends_with_4(tmp_path: Path, train: Train) -> None:
    (tmp_path / "text").mkdir()
    for number in range(400):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number} says {number * number} twice\n" * 20)
    build_corpus(tmp_path / "corpus", standard_library=False, extra_roots=[tmp_path / "text"])
    train_tokenizer(tmp_path / "corpus", tmp_path / "tokenizer.model", vocab_size=300)
    encode_corpus(tmp_path / "corpus", tmp_path / "tokenizer.model", tmp_path / "shards")
    settings = [f"data.{split}={tmp_path}/shards/{split}" for split in ("train", "validation")]
    assert train("model.vocab_size=300", *settings)[0] == 0

    beside = tmp_path / "shards" / "train" / "tokenizer.model"
    beside.write_bytes(beside.read_bytes() + b" ")
    code, said = train("model.vocab_size=300", "run.steps=3", f"run.dir={tmp_path}/second", *settings)
    assert code == 4, said
    assert "tokenizer" in said


@pytest.mark.slow
def test_an_id_beyond_the_manifests_maximum_ends_with_4(own_dataset: Path, train: Train) -> None:
    for shard in (own_dataset / "train").glob("*.tok"):
        damaged = bytearray(shard.read_bytes())
        damaged[1::2] = b"\xff" * len(damaged[1::2])
        shard.write_bytes(damaged)
    code, said = train(f"data.train={own_dataset}/train", "data.check_crc=false")
    assert code == 4, said
    assert said.startswith("data error: ")
    assert "shard-" in said


def test_a_damaged_shard_ends_with_4_and_is_named(own_dataset: Path, train: Train) -> None:
    for shard in (own_dataset / "train").glob("*.tok"):
        damaged = bytearray(shard.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        shard.write_bytes(damaged)
    code, said = train(f"data.train={own_dataset}/train", "run.steps=60")
    assert code == 4, said
    assert "shard-" in said


def test_a_checkpoint_of_another_model_ends_with_3_and_names_the_difference(train: Train) -> None:
    assert train()[0] == 0
    code, said = train("model.rope_theta=500.0")
    assert code == 3, said
    assert re.search(r"model\.rope_theta +10000\.0 -> 500\.0", said), said
    assert train("engine.micro_batch_size=2", "engine=zero3")[0] == 0, "how a step is executed may change"


@pytest.mark.slow
def test_a_run_whose_every_checkpoint_is_damaged_does_not_start_over(train: Train, tmp_path: Path) -> None:
    assert train()[0] == 0
    for weights in (tmp_path / "run" / "checkpoints").glob("step-*/model-*.safetensors"):
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(damaged)
    code, said = train()
    assert code == 4, said
    assert "does not start over" in said
    assert (tmp_path / "run" / "checkpoints" / "step-00000002.corrupt").is_dir()


@pytest.mark.slow
def test_a_record_that_cannot_be_written_ends_the_run_and_the_same_command_goes_on(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Record.step

    def full(record: Record, line: dict[str, object]) -> None:
        if line["step"] == 2:
            raise OSError(28, "No space left on device")
        append(record, line)

    with monkeypatch.context() as patched:
        patched.setattr(Record, "step", full)
        code, said = train("checkpoint.every_steps=1", "run.steps=4")
    assert code == 75, said
    assert "No space left on device" in said and "Traceback" not in said
    assert train("checkpoint.every_steps=1", "run.steps=4")[0] == 0
    assert read_metrics(tmp_path / "run")[-1]["step"] == 4


@pytest.mark.slow
def test_a_secret_is_in_nothing_that_a_run_prints(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launch logs keep what is printed: messages of a run whose name is the secret, a mistake, a bug with its
    traceback.
    """
    canary = "hunter2-canary-value"
    monkeypatch.setenv("SOME_API_KEY", canary)
    code, said = train(f"data.train=/nowhere/{canary}")
    assert code == 2 and "/nowhere/[redacted]" in said and canary not in said
    with pytest.raises(SystemExit):
        run(["train", *small, "model.layers=1", "run.steps=1", f"run.dir={tmp_path}/named", f"run.name={canary}"])
    printed = capfd.readouterr().out
    assert "[redacted]: new run of 1" in printed and canary not in printed

    def broken(names: object) -> None:
        raise ZeroDivisionError(f"a defect with {canary}")

    monkeypatch.setattr("kha_train.cli.main.build", broken)
    with pytest.raises(ZeroDivisionError) as defect:
        run(["train"])
    sys.excepthook(defect.type, defect.value, defect.tb)
    said = capfd.readouterr().err
    assert "Traceback" in said and "a defect with [redacted]" in said and canary not in said


def test_a_run_that_leaves_the_finite_numbers_ends_with_5(train: Train, tmp_path: Path) -> None:
    code, said = train("model.init_std=1e38", "run.steps=20", "stability.max_nonfinite_steps=3")
    assert code == 5, said
    assert "3 steps in a row" in said
    spikes = read_run(tmp_path / "run")["spikes"]
    assert (spikes["spikes"], spikes["diverged"], spikes["open_total"]) == (0, True, 1)


def test_a_run_directory_in_use_ends_with_6(train: Train, tmp_path: Path) -> None:
    holder = "import sys; from pathlib import Path; from kha_train.record import Record;"
    holder += f" record = Record.open(Path({str(tmp_path / 'run')!r})); print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "owner.json"}
        code, said = train()
        after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "owner.json"}
    finally:
        process.kill()
        process.wait()
    assert code == 6, said
    assert str(process.pid) in said
    assert after == before
