"""How values of micro-batches become the entries of a metrics line; two ranks: test_layer_statistics.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kha_train.distributed import World
from kha_train.metric import Metric
from kha_train.model.observed import averaged, squares_averaged
from kha_train.train.layer_values import StepValues

KINDS = ("sum", "mean", "rms", "norm", "max", "min", "last")


def entries(*micro_batches: dict[str, Any], layers: Any = None) -> dict[str, Any]:
    values = StepValues({kind: Metric(kind, "1", "", combine=kind, layers=layers) for kind in KINDS})
    for reported in micro_batches:
        values.add({kind: torch.as_tensor(value) for kind, value in reported.items()})
    return values.entries(values.agreed(World.single()).cpu())


def test_a_step_without_values_has_no_entries_and_nothing_to_agree_on() -> None:
    values = StepValues({})
    assert values.agreed(World(rank=1, size=2)).numel() == 0, "it would hang here if it asked the other rank"
    assert values.entries(torch.zeros(0)) == {}


def test_a_mean_weighs_every_token_the_same() -> None:
    """3 tokens, then 1: the mean of means would be 3.5."""
    first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0])
    found = entries(
        {"mean": averaged(first), "rms": squares_averaged(first)},
        {"mean": averaged(second), "rms": squares_averaged(second)},
    )
    assert found == {"mean": 2.75, "rms": pytest.approx(math.sqrt((1 + 4 + 9 + 25) / 4), rel=1e-7)}


def test_padding_is_left_out_of_a_mean() -> None:
    x_BTD = torch.tensor([[[1.0, 3.0], [9.0, 9.0]], [[5.0, 7.0], [9.0, 9.0]]])
    assert averaged(x_BTD, torch.tensor([0, 2])).tolist() == [16.0, 4.0]
    assert squares_averaged(x_BTD, torch.tensor([0, 2])).tolist() == pytest.approx([84.0, 4.0])


def test_layers_are_listed_and_summarised() -> None:
    found = entries({"max": [1.0, 5.0]}, {"max": [4.0, 2.0]}, layers="mean")
    assert found == {"max": 4.5, "max_by_layer": [4.0, 5.0]}


def test_a_value_that_is_not_finite_is_seen() -> None:
    bad = {kind: math.nan for kind in ("sum", "norm", "max", "min", "last")}
    found = entries(bad, bad)
    assert all(math.isnan(value) for value in found.values()) and len(found) == 5
    found = entries({"max": 1.0, "min": 1.0}, {"max": math.nan, "min": math.nan})
    assert all(math.isnan(value) for value in found.values())
    assert entries({"max": -math.inf, "min": math.inf}) == {"max": -math.inf, "min": math.inf}
    assert math.isnan(entries({"max": [1.0, math.nan]}, layers="max")["max"])


def test_a_mean_of_nothing_is_not_a_number() -> None:
    assert math.isnan(entries({"mean": averaged(torch.zeros(0))})["mean"])


def test_the_last_micro_batch_counts_for_last() -> None:
    assert entries({"last": 3.0, "sum": 3.0}, {"last": 4.0, "sum": 4.0}) == {"last": 4.0, "sum": 7.0}
