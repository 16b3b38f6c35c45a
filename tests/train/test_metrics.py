"""The metrics that a run declares: complete, free of contradictions, and what the documentation says of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kha_train import compose
from kha_train.metric import Metric, in_force
from kha_train.record.metrics import EARLIER
from kha_train.train.metrics import declared

EVERYTHING = [
    "attention=gated",
    "moe.z_loss_weight=0.1",
    "moe.auxiliary_loss.weight=0.1",
    "telemetry.layer_statistics_every=1",
]
PAGE = (Path(__file__).parents[2] / "docs" / "record.md").read_text(encoding="utf-8")


def test_the_page_of_the_record_says_of_metrics_what_the_code_declares() -> None:
    """It need not list all: `kha metrics` does."""
    known = declared(compose(EVERYTHING))
    rows = re.findall(r"^\| `([^`]+)` \| (.*?) \| (.*?) \| (yes|) ?\|$", PAGE, flags=re.MULTILINE)
    assert len(rows) > 50
    for name, unit, meaning, timing in rows:
        metric = known[name]
        assert (unit, meaning, timing == "yes") == (metric.unit, metric.meaning, metric.timing), name


def test_what_older_runs_recorded_is_declared_with_the_same_unit_and_flags() -> None:
    known = declared(compose(EVERYTHING))
    assert EARLIER.keys() <= known.keys()
    for name, earlier in EARLIER.items():
        metric = known[name]
        assert (metric.unit, metric.timing, metric.mirrored) == (earlier.unit, earlier.timing, earlier.mirrored), name


def test_declarations_follow_from_what_the_run_is_built_of() -> None:
    assert not any(name.startswith("layer/") for name in declared(compose([])))
    dense = declared(compose(["model=dense_0_61b"]))
    assert not any(name.startswith("moe/") for name in dense) and "train/loss" in dense
    assert "moe/auxiliary_loss" not in declared(compose([])) and "moe/auxiliary_loss" in declared(compose(EVERYTHING))


def test_a_metric_of_layers_stands_for_a_list_and_a_number() -> None:
    found = in_force([Metric("toy/size", "cm", "size of the toy", layers="max")])
    assert list(found) == ["toy/size", "toy/size_by_layer"]
    assert found["toy/size"].meaning == "size of the toy; largest over layers" and found["toy/size"].mirrored
    assert not found["toy/size_by_layer"].mirrored and found["toy/size_by_layer"].unit == "cm"


def test_one_name_has_one_meaning() -> None:
    toy = Metric("toy/size", "cm", "size of the toy")
    assert list(in_force([toy, toy])) == ["toy/size"]
    with pytest.raises(AssertionError, match="toy/size is declared twice"):
        in_force([toy, Metric("toy/size", "m", "size of the toy")])
