"""Answers are scored by their definition, counted here document by document in plain Python."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from data_tools.tasks import Order, write_task
from kha_train import compose
from kha_train.data.rows.batch import Batch
from kha_train.distributed import World
from kha_train.errors import ConfigError, DataError
from kha_train.evaluate.answers import Answers
from kha_train.evaluate.opening import declared, measured_facts, open_tasks
from kha_train.evaluate.scoring import evaluate
from kha_train.record import read_metrics
from kha_train.train.run import train

BEGIN, MARK, ENDS, SYMBOL = 32, 1, {16: 2, 17: 3, 18: 6}, 48
"""Of the dataset below, by the table of docs/tasks.md."""


class Scores(NamedTuple):
    nats: Tensor
    hits: Tensor


class Output(NamedTuple):
    tokens: Scores


class Engine:
    """What a task needs of one: its `guesses(labels)` are made of labels, and a label v costs v nats."""

    world = World.single()

    def __init__(self, guesses: Any) -> None:
        self.guesses = guesses

    def evaluate(self, batch: Batch, by_token: bool = False) -> Output:
        assert by_token
        labels_BT = batch.labels_BT
        return Output(Scores(labels_BT.double(), self.guesses(labels_BT) == labels_BT))


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("copies")
    write_task(Order("copy", 40, 60, (2, 3, 6), 5).complete(), directory)
    return directory


def settings(small: list[str], copies: Path, *more: str) -> list[str]:
    data = [f"data.{split}={copies / split}" for split in ("train", "validation")]
    batch = ["engine.micro_batch_size=3", "data.global_batch_size=6", "validation.rows=0"]
    tasks = ["evaluation.tasks=[answers]", f"data.cache_dir={copies / 'cache'}"]
    return [*small, *data, *batch, *tasks, "model.seq_len=32", "data.packing=best_fit", *more]


def scored(overrides: list[str], guesses: Any) -> tuple[Answers, dict[str, float]]:
    task = open_tasks(compose(overrides))[-1]
    assert isinstance(task, Answers)
    found = evaluate(Engine(guesses), [task])  # type: ignore[arg-type]
    return task, {name.removeprefix("evaluation/answers/"): value for name, value in found.items()}


def by_hand(task: Answers, guess: int) -> dict[str, float]:
    """The figures of a model that always says `guess`, from the rows of ids: one document after another."""
    answers: list[tuple[int, list[int]]] = []
    for batch in task.rows.batches(0, 1):
        for row in batch.rows_BW.tolist():
            for start in [place for place, number in enumerate(row) if number == BEGIN]:
                rest = row[start + 1 :]
                ends = [place for place, number in enumerate(rest) if number in ENDS]
                if ends:
                    document = rest[: ends[0]]
                    answers.append((ENDS[rest[ends[0]]], document[document.index(MARK) + 1 :]))
    figures = {}
    for suffix, low, high in [("", 0, 99), *((f"_from_{n}", n, {2: 3, 3: 4, 6: 8}[n]) for n in (2, 3, 6))]:
        chosen = [labels for level, labels in answers if low <= level < high]
        if chosen:
            labels = [*chain(*chosen)]
            figures[f"loss{suffix}"] = sum(labels) / len(labels)
            figures[f"token_accuracy{suffix}"] = labels.count(guess) / len(labels)
            figures[f"answer_accuracy{suffix}"] = sum(set(one) == {guess} for one in chosen) / len(chosen)
    return figures


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_figures_are_those_counted_document_by_document(small: list[str], copies: Path, packing: str) -> None:
    task, found = scored(settings(small, copies, f"data.packing={packing}"), lambda labels: SYMBOL + 2)
    assert found == pytest.approx(by_hand(task, SYMBOL + 2), rel=1e-12)
    assert len(found) == 12 and 0 < found["answer_accuracy_from_2"] < found["token_accuracy"] < 0.4


def test_best_fit_keeps_every_answer(small: list[str], copies: Path) -> None:
    task = open_tasks(compose(settings(small, copies, "validation.rows=1000")))[-1]
    sums = [task.score(Engine(lambda labels: labels), batch)["answers"] for batch in task.batches(0, 1)]  # type: ignore[arg-type]
    assert sum(int(one.sum()) for one in sums) == 60  # type: ignore[union-attr]


def test_a_model_that_is_always_right_has_accuracy_1_and_an_infinite_loss_stays_in_its_level(
    small: list[str], copies: Path
) -> None:
    _, found = scored(settings(small, copies), lambda labels: labels)
    assert {value for name, value in found.items() if "accuracy" in name} == {1.0}
    task = open_tasks(compose(settings(small, copies)))[-1]
    engine = Engine(lambda labels: labels)
    original = engine.evaluate

    def diverged(batch: Batch, by_token: bool = False) -> Output:
        nats, hits = original(batch, by_token).tokens
        ids_BT = torch.from_numpy(batch.rows_BW[:, :-1].astype(np.int64))
        # Documents of the level 2 have five ids between BEGIN and END.
        short_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for row, place in (ids_BT == BEGIN).nonzero().tolist():
            short_BT[row, place : place + 6] = int(batch.rows_BW[row, place + 6]) == 16 if place + 6 < 33 else False
        return Output(Scores(torch.where(short_BT, math.inf, nats), hits))

    engine.evaluate = diverged  # type: ignore[method-assign]
    found = evaluate(engine, [task])  # type: ignore[arg-type]
    assert found["evaluation/answers/loss_from_2"] == math.inf
    assert math.isfinite(found["evaluation/answers/loss_from_3"])


def test_every_figure_is_declared_and_the_record_says_what_it_is_of(small: list[str], copies: Path) -> None:
    config = compose(settings(small, copies))
    names = [metric.name for metric in declared(config) if metric.name.startswith("evaluation/answers/")]
    borders = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert names == [
        f"evaluation/answers/{name}{suffix}"
        for suffix in ("", *(f"_from_{border}" for border in borders))
        for name in ("loss", "token_accuracy", "answer_accuracy")
    ]
    facts = measured_facts(open_tasks(config))["evaluations"]["evaluation/answers"]
    assert (facts["question"], facts["level"]) == ("copy", "symbols to copy")


def test_sets_without_answers_and_rows_without_whole_documents_are_refused_before_the_first_step(
    small: list[str], copies: Path
) -> None:
    with pytest.raises(ConfigError, match="no dataset of a synthetic task") as refused:
        open_tasks(compose([*small, "evaluation.tasks=[answers]"]))
    assert refused.value.field == "data.validation"
    with pytest.raises(DataError, match="no answer in a whole document") as cut:
        open_tasks(compose(settings(small, copies, "model.seq_len=4")))
    assert str(cut.value.fix) == "data.packing=best_fit model.seq_len=15"


@pytest.mark.slow
def test_a_small_model_learns_to_copy(tmp_path: Path) -> None:
    write_task(Order("copy", 16_000, 300, (8,), 32).complete(), tmp_path)
    shape = ["model.layers=2", "model.hidden_size=64", "model.head_dim=16", "model.query_heads=4", "model.kv_heads=4"]
    dense = ["moe.experts=0", "moe.top_k=0", "moe.dense_layers=2", "moe.dense_width=128", "moe.expert_width=0"]
    data = ["data=shards", *(f"data.{split}={tmp_path / split}" for split in ("train", "validation"))]
    rows = ["data.packing=best_fit", "data.global_batch_size=64", f"data.cache_dir={tmp_path}", "validation.rows=0"]
    engine = ["engine.name=plain", "engine.device=cpu", "engine.micro_batch_size=64", "optim.lr=5e-3", "run.steps=500"]
    quiet = ["telemetry.wandb.mode=disabled", "telemetry.console=quiet", "telemetry.peak_tflops=0.1"]
    model = ["model.vocab_size=256", "model.seq_len=19", "evaluation.tasks=[answers]", f"run.dir={tmp_path / 'run'}"]
    train(compose([*shape, *dense, *data, *rows, *engine, *quiet, *model]))
    last = read_metrics(tmp_path / "run")[-1]
    assert last["evaluation/answers/answer_accuracy"] > 0.99
    assert last["evaluation/answers/token_accuracy_from_8"] > 0.998
