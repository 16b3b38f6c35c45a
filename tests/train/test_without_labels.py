"""There is always something to predict: a step or a validation without labels ends the run on all ranks alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kha_train import compose
from kha_train.cli.main import run
from kha_train.data.format.manifest import TokenizerEntry
from kha_train.data.format.writer import prepare, publish_dataset, write_shard
from kha_train.data.stream import open_stream
from kha_train.distributed import World
from kha_train.errors import DataError
from kha_train.operate.rehearse import Layout, rehearse
from kha_train.record import read_metrics
from kha_train.train.step import next_batch

VOCAB = 256


def write_documents(directory: Path, documents: list[list[int]], bytes_per_id: tuple[int, ...]) -> Path:
    """A dataset of one shard with these documents."""
    prepare(directory)
    sizes = np.asarray(bytes_per_id)
    contents = ((np.asarray(ids), int(sizes[ids].sum())) for ids in documents)
    shard = write_shard(directory, 0, contents, vocab_size=VOCAB, dtype="uint16")
    tokenizer = TokenizerEntry(
        kind="synthetic",
        vocab=VOCAB,
        sha256=hashlib.sha256(bytes(bytes_per_id)).hexdigest(),
        file=None,
        special_ids={"eos": 0},
        bytes_per_id=bytes_per_id,
    )
    publish_dataset(directory, [shard], tokenizer, dtype="uint16", corpus={"source": "test"})
    return directory


BYTES = (0, *[1] * (VOCAB - 1))
ONE_TOKEN = [[1 + number % 200] for number in range(1200)]
LONG = [[1 + (number + place) % 200 for place in range(65)] for number in range(24)]


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., list[str]]:
    """`data(train, validation, bytes_per_id)`: the overrides for datasets of those documents."""

    def write(train: list[list[int]], validation: list[list[int]], sizes: tuple[int, ...] = BYTES) -> list[str]:
        parts = {"train": train, "validation": validation}
        return [f"data.{name}={write_documents(tmp_path / name, part, sizes)}" for name, part in parts.items()]

    return write


@pytest.fixture
def settings(small: list[str], tmp_path: Path) -> list[str]:
    return [*small, "model.layers=1", "run.steps=2", f"run.dir={tmp_path}/run", "data.global_batch_size=4"]


def _end_of(settings: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        run(["train", *settings])
    return ended.value.code or 0, capfd.readouterr().err


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_documents_of_one_token_end_the_run_with_4_and_the_reason(
    packing: str, data: Callable[..., list[str]], settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = _end_of([*settings, *data(ONE_TOKEN, LONG), f"data.packing={packing}"], capfd)
    assert code == 4
    assert "samples 0 to 3" in said and "data.isolate_documents=false" in said
    assert (tmp_path / "run" / "FATAL").exists() and not list(read_metrics(tmp_path / "run"))


@pytest.mark.slow
def test_the_fix_that_the_error_names_makes_the_run_train(
    data: Callable[..., list[str]], settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = _end_of([*settings, *data(ONE_TOKEN, ONE_TOKEN), "data.isolate_documents=false"], capfd)
    assert code == 0, said
    lines = list(read_metrics(tmp_path / "run"))
    assert all(line["train/loss"] > 0 for line in lines) and lines[-1]["validation/bits_per_byte"] > 0


def test_a_validation_set_without_labels_ends_the_run_before_its_first_step(
    data: Callable[..., list[str]], settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = _end_of([*settings, *data(LONG, ONE_TOKEN)], capfd)
    assert code == 4 and "data.validation" in said and "label" in said
    assert not list(read_metrics(tmp_path / "run"))


@pytest.mark.slow
def test_only_the_rows_that_are_scored_count_as_the_validation_set(
    data: Callable[..., list[str]], settings: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = [*settings, *data(LONG, [*ONE_TOKEN, *LONG])]
    assert _end_of([*overrides, "validation.rows=2"], capfd)[0] == 4
    assert _end_of([*overrides, "validation.rows=0"], capfd)[0] == 0


def test_validation_text_of_control_ids_alone_is_refused_before_the_first_step(
    data: Callable[..., list[str]], settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = _end_of([*settings, *data(LONG, [[0] * 65 for _ in range(80)]), "validation.rows=0"], capfd)
    assert code == 4 and "stand for no text" in said
    assert not list(read_metrics(tmp_path / "run"))


@pytest.mark.slow
def test_one_label_that_stands_for_text_is_enough_wherever_it_is(
    data: Callable[..., list[str]], settings: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    control = [[0] * 65 for _ in range(30)]
    mostly_control = [*control, [*[0] * 60, 7, *[0] * 4], *control]
    assert _end_of([*settings, *data(LONG, mostly_control), "validation.rows=0"], capfd)[0] == 0


@pytest.mark.slow
def test_ids_without_a_table_of_bytes_have_a_loss_and_no_bits_per_byte(
    data: Callable[..., list[str]], settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = _end_of([*settings, *data(LONG, LONG, (0,) * VOCAB)], capfd)
    assert code == 0, said
    last = list(read_metrics(tmp_path / "run"))[-1]
    assert last["validation/loss"] > 0 and "validation/bits_per_byte" not in last


@dataclass(frozen=True)
class BesideOthers(World):
    """A rank whose other ranks hold `others` labels together."""

    others: int = 0

    def sum_ints(self, *values: int) -> tuple[int, ...]:
        return values[0] + self.others, *values[1:]


@pytest.mark.slow
def test_a_rank_may_have_no_label_while_the_global_batch_has_some(
    data: Callable[..., list[str]], settings: list[str]
) -> None:
    stream = open_stream(compose([*settings, *data(ONE_TOKEN, LONG)]))
    batch, labels = next_batch(stream, BesideOthers(others=7))
    assert batch.label_count == 0 and labels == 7
    with pytest.raises(DataError) as raised:
        next_batch(stream, BesideOthers())
    assert raised.value.agreed, "all ranks have summed the same, so one of them tells it"


@pytest.mark.slow
@pytest.mark.parametrize("empty", ["train", "validation"])
def test_all_ranks_hear_that_there_is_no_label(
    empty: str, data: Callable[..., list[str]], settings: list[str], run_ranks: Callable[..., list[Any]]
) -> None:
    overrides = [*settings, *(data(ONE_TOKEN, LONG) if empty == "train" else data(LONG, ONE_TOKEN))]
    overrides.append("engine.micro_batch_size=2")
    told = run_ranks(Path(__file__).with_name("validation_worker.py"), 2, overrides=overrides)
    assert all("has a label" in words for words in told)


def test_a_rehearsal_refuses_what_the_job_would(data: Callable[..., list[str]], settings: list[str]) -> None:
    with pytest.raises(DataError, match="label"):
        rehearse(compose([*settings, *data(ONE_TOKEN, LONG)]), [], Layout(1, 1))
    with pytest.raises(DataError, match="label"):
        rehearse(compose([*settings, *data(LONG, ONE_TOKEN)]), [], Layout(1, 1))
