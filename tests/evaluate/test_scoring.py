"""Figures of tasks against their definitions, and how batches and sums of ranks meet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kha_train import build_decoder, compose
from kha_train.config.schema import RunConfig
from kha_train.data.rows.batch import Batch
from kha_train.data.stream import bytes_per_id, validation_batches
from kha_train.distributed import World
from kha_train.errors import DataError
from kha_train.evaluate.contract import Sums, Task
from kha_train.evaluate.opening import content_ids, due, measured_facts, open_tasks
from kha_train.evaluate.scoring import evaluate
from kha_train.metric import Metric
from kha_train.model.host import inputs_of
from kha_train.variants.task import TaskOptions


class PlainEngine:
    """What a task needs of an engine, around a decoder in plain PyTorch."""

    def __init__(self, config: RunConfig, world: World | None = None) -> None:
        self.decoder, self.world = build_decoder(config), world or World.single()

    def evaluate(self, batch: Batch, by_token: bool = False) -> Any:
        """Forward with labels."""
        with torch.no_grad():
            return self.decoder(*inputs_of(batch, self.world.device), by_token=by_token)

    def logits(self, batch: Batch) -> Tensor:
        """Of every place, [B, T, V] in float64."""
        inputs = inputs_of(batch, self.world.device)._replace(labels_BT=None)
        with torch.no_grad():
            return self.decoder(*inputs).logits_BTV.double()


class Counting(Task[TaskOptions]):
    """A task without data: its batches are numbers, and so are its scores."""

    metrics = (Metric("total", "1", "sum"), Metric("each", "1", "sum"))
    content_id = "numbers"

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(None, TaskOptions(name="counting"))  # type: ignore[arg-type]
        self.numbers = numbers

    def batches(self, rank: int, world_size: int) -> Iterator[Any]:
        return iter(self.numbers)

    def score(self, engine: Any, batch: Any) -> Mapping[str, Tensor | float]:
        if batch < 0:
            raise AssertionError("never scored")
        return {"whole": batch, "vector": torch.tensor([float(batch), 0.5])}

    def figures(self, sums: Sums) -> dict[str, float]:
        if not sums["whole"]:
            raise DataError("nothing to count")
        assert sums["vector"].shape == (2,) and sums["vector"].dtype == np.float64
        return {"total": float(sums["whole"]), "each": float(sums["vector"].sum())}


@dataclass(frozen=True)
class Beside(World):
    """A rank beside another that brings a batch where this one does not, and none where it does."""

    def max_ints(self, *values: int) -> tuple[int, ...]:
        return values[0], 1, 1


@dataclass(frozen=True)
class Counted(World):
    """A rank that notes what it asks the others."""

    asked: list[tuple[int, ...]] = field(default_factory=list)

    def max_ints(self, *values: int) -> tuple[int, ...]:
        self.asked.append(values)
        return values


class Own(Counting):
    """A task with data of its own, which happen to be those of a validation set."""

    def __init__(self, content_id: str) -> None:
        super().__init__([])
        self.content_id = content_id  # type: ignore[misc]


def test_loss_and_bits_per_byte_are_what_they_say(small: list[str]) -> None:
    config = compose([*small, "model.layers=1", "engine.micro_batch_size=3"])
    engine = PlainEngine(config)
    found = evaluate(engine, open_tasks(config))
    sizes_V = bytes_per_id(config)
    nats, labels, text_bytes = 0.0, 0, 0
    for batch in validation_batches(config):
        kept = batch.labels_BT >= 0
        nats += functional.cross_entropy(engine.logits(batch)[kept], batch.labels_BT[kept], reduction="sum").item()
        labels += int(kept.sum())
        text_bytes += int(sizes_V[batch.labels_BT[kept]].sum())
    assert labels > 300 and list(found) == ["validation/loss", "validation/bits_per_byte"]
    assert found["validation/loss"] == pytest.approx(nats / labels, rel=1e-6)
    assert found["validation/bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)


def test_context_splits_the_loss_of_validation_by_the_tokens_that_precede(small: list[str]) -> None:
    # With a head of its own, and this seed, an untrained model is right now and then.
    model = ["model.layers=1", "model.tie_embeddings=false", "run.seed=2"]
    config = compose([*small, *model, "evaluation.tasks=[context]", "engine.micro_batch_size=3"])
    engine = PlainEngine(config)
    found = evaluate(engine, open_tasks(config))

    context, nats, hits = [], [], []
    for batch in validation_batches(config):
        logits_NV, labels_N = engine.logits(batch).flatten(0, 1), batch.labels_BT.flatten()
        # Documents end where attention does: one more token of context at each place after a border.
        lengths = batch.cu_seqlens_S.diff().tolist()
        seen_N = torch.tensor([place + 1 for length in lengths for place in range(length)])
        kept_N = labels_N >= 0
        context.append(seen_N[kept_N])
        nats.append(functional.cross_entropy(logits_NV[kept_N], labels_N[kept_N], reduction="none"))
        hits.append((logits_NV[kept_N].argmax(1) == labels_N[kept_N]).double())
    context_N, nats_N, hits_N = torch.cat(context), torch.cat(nats), torch.cat(hits)
    expected = {}
    for low, high in ((1, 4), (4, 16), (16, 64), (64, 256)):
        inside_N = (context_N >= low) & (context_N < high)
        if inside_N.any():
            expected[f"evaluation/context/loss_from_{low}"] = nats_N[inside_N].mean().item()
            expected[f"evaluation/context/accuracy_from_{low}"] = hits_N[inside_N].mean().item()
    assert len(expected) >= 6 and hits_N.any() and not hits_N.all()
    assert {key: value for key, value in found.items() if "context" in key} == pytest.approx(expected, rel=1e-6)
    assert nats_N.mean().item() == pytest.approx(found["validation/loss"], rel=1e-6)


def test_an_infinite_loss_in_one_bucket_is_none_in_the_others(small: list[str]) -> None:
    config = compose([*small, "model.layers=1", "evaluation.tasks=[{name: context, borders: [1, 8]}]"])
    engine = PlainEngine(config)
    (task,) = [one for one in open_tasks(config) if one.options.name == "context"]
    before = evaluate(engine, [task])
    original = engine.evaluate

    def diverged(batch: Batch, by_token: bool = False) -> Any:
        output = original(batch, by_token)
        output.tokens.nats[batch.positions_BT < 7] = math.inf
        return output

    engine.evaluate = diverged  # type: ignore[method-assign]
    found = evaluate(engine, [task])
    assert found["evaluation/context/loss_from_1"] == math.inf
    assert found["evaluation/context/loss_from_8"] == before["evaluation/context/loss_from_8"]


def test_named_sets_and_tasks_have_entries_of_their_own_and_the_first_set_keeps_its_figures(
    small: list[str], dataset: Path
) -> None:
    alone = compose(small)
    further = [
        f"validation.sets=[{{name: code, path: {dataset}/train}}, {{name: again, path: {dataset}/validation}}]",
        "evaluation.tasks=[{name: bits_per_byte, set: code, rows: 3, label: few}, {name: context, every_steps: 3}]",
    ]
    config = compose([*small, *further])
    engine, tasks = PlainEngine(config), open_tasks(config)
    before, found = evaluate(engine, open_tasks(alone)), evaluate(engine, tasks)
    assert list(found)[:6] == [
        f"validation/{name}{key}" for name in ("", "code/", "again/") for key in names_of(before)
    ]
    for key in names_of(before):
        assert found[f"validation/{key}"] == found[f"validation/again/{key}"] == before[f"validation/{key}"]
        assert found[f"validation/code/{key}"] != found[f"validation/{key}"]

    places = {"code": f"{dataset}/train", "few": f"{dataset}/train"}
    rows = {"code": 8, "few": 3}
    for name, keys in {"code": "validation/code", "few": "evaluation/few"}.items():
        own = compose([*small, f"data.validation={places[name]}", f"validation.rows={rows[name]}"])
        assert found[f"{keys}/loss"] == evaluate(engine, open_tasks(own))["validation/loss"]
    assert [one.options.entries for one in due(tasks, 3, 10)] == ["evaluation/context"]
    assert len(due(tasks, 100, 1000)) == 3 and due(tasks, 10, 10) == list(tasks)
    ids = content_ids(tasks)
    first, code, _ = ids.values()
    assert list(ids) == ["validation_content_id", "validation_content_id.code", "validation_content_id.again"]
    facts = measured_facts(tasks)["evaluations"]
    assert facts["evaluation/few"] == {"task": "bits_per_byte", "content_id": code, "rows": 3}
    assert facts["evaluation/context"]["borders"] == []
    assert measured_facts(open_tasks(alone)) == {"validation_content_id": first, "validation_rows": 8}


def names_of(found: Mapping[str, float]) -> list[str]:
    """The names of the figures of the only validation."""
    return [key.removeprefix("validation/") for key in found]


def test_sums_keep_their_shape_and_an_error_in_them_is_every_ranks() -> None:
    class Engine:
        world = World.single()

    assert evaluate(Engine(), [Counting([2, 3])]) == {"evaluation/counting/total": 5.0, "evaluation/counting/each": 6.0}
    with pytest.raises(DataError, match="nothing to count") as raised:
        evaluate(Engine(), [Counting([0])])
    assert raised.value.agreed
    assert evaluate(Engine(), []) == {}


def test_another_number_of_batches_on_another_rank_is_found_before_a_rank_waits_for_ever() -> None:
    class Engine:
        world = Beside()

    with pytest.raises(AssertionError, match="another number of batches"):
        evaluate(Engine(), [Counting([-1])])


def test_ranks_agree_once_a_batch() -> None:
    class Engine:
        world = Counted()

    evaluate(Engine(), [Counting([2, 3])])
    assert Engine.world.asked == [(0, 1, 0), (0, 1, 0), (0, 0, 1)]


def test_a_task_with_data_of_its_own_has_an_id_whatever_else_is_scored(small: list[str]) -> None:
    tasks = open_tasks(compose([*small, "evaluation.tasks=[context]"]))
    ids = content_ids(tasks)
    assert list(ids) == ["validation_content_id"]
    (same,) = ids.values()
    assert content_ids([*tasks, Own(same)]) == {**ids, "evaluation_content_id.counting": same}
