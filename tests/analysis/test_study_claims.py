"""What a result says in a line, and where it contradicts a paper, worked out by hand."""

from __future__ import annotations

from typing import Any

from kha_train.analysis.study_claims import contradictions, verdict
from kha_train.analysis.study_files import ResultFile

BASE = [2.0, 2.1, 2.2]


def result(values: dict[str, list[float]], **changed: Any) -> ResultFile:
    """A result of arms against `base`, with a table that prints `mlp` 0.02 below it."""

    def arm(name: str, losses: list[float]) -> dict[str, Any]:
        size = {"parameters": 2_000_000, "active_parameters": 1_500_000, "tokens": 250_000}
        own = {str(seed): loss for seed, loss in enumerate(losses)}
        return {"reference": None if name == "base" else "base", "stands_for": None, "size": size,
                "values": {"train_loss": own}}  # fmt: skip

    known: Any = {
        "study": "mine", "scale": "cpu", "arms": {name: arm(name, losses) for name, losses in values.items()},
        "measures": [{"name": "train_loss", "kind": "train_loss", "larger_is_better": False, "tokens": 0.0}],
        "published": [{"what": "table 1", "arm": "base", "value": 1.85, "better_than": "", "ours": ""},
                      {"what": "table 1", "arm": "mlp", "value": 1.83, "better_than": "", "ours": ""}],
        "published_at": "6.6B, 75B tokens", "published_higher_is_better": False,
    }  # fmt: skip
    return known | changed


def test_a_difference_of_the_other_sign_is_a_contradiction_with_both_differences_and_sizes() -> None:
    """Differences 0.19, 0.2, 0.21: mean 0.2, half 4.303 x 0.01 / sqrt(3) = 0.02484."""
    (line,) = contradictions(result({"base": BASE, "mlp": [2.19, 2.3, 2.41]})).lines
    printed, ours = line.split(" Here, ")
    assert printed == "table 1: `mlp` - `base` is -0.02 (6.6B, 75B tokens)."
    assert ours == (
        "`mlp` - `base`: train_loss +0.2 [+0.1752, +0.2248], 1.5M active of 2M parameters, 250k tokens, 3 seeds "
        "(study `mine`, scale cpu)."
    )


def test_the_same_sign_no_difference_and_a_seed_that_diverged_contradict_nothing() -> None:
    for losses, agreeing in (([1.8, 1.9, 2.01], 1), ([2.1, 2.0, 2.3], 0), ([9.0, 9.1, float("inf")], 0), ([9.0], 0)):
        assert contradictions(result({"base": BASE, "mlp": losses})) == ([], agreeing, 1 - agreeing)


def test_figures_of_which_higher_is_better_turn_the_sign() -> None:
    lower = {"base": BASE, "mlp": [1.8, 1.9, 2.01]}
    assert contradictions(result(lower, published_higher_is_better=True)).lines
    assert not contradictions(result(lower)).lines


def test_a_pair_of_which_a_paper_prints_both_signs_is_left_out() -> None:
    printed = [
        {"what": what, "arm": arm, "value": value, "better_than": "", "ours": ""}
        for what, values in (("language", (65.5, 69.8)), ("professional", (42.8, 42.3)))
        for arm, value in zip(("base", "mlp"), values, strict=True)
    ]
    values = {"base": BASE, "mlp": [2.19, 2.3, 2.41]}
    for rows, compared in ((printed, 0), (printed[:2], 1)):
        assert contradictions(result(values, published=rows, published_higher_is_better=True)).printed == compared


def test_an_arm_of_another_name_is_held_against_the_one_that_it_stands_for() -> None:
    found = result({"base": BASE, "small_mlp": [2.19, 2.3, 2.41]})
    assert contradictions(found).printed == 0
    found["arms"]["small_mlp"]["stands_for"] = "mlp"
    assert contradictions(found).lines[0].startswith("table 1: `mlp` - `base` is -0.02")


def test_a_printed_relation_without_a_figure_is_held_against_the_pair() -> None:
    printed = [{"what": "abstract", "arm": "mlp", "value": None, "better_than": "base", "ours": ""}]
    (line,) = contradictions(result({"base": BASE, "mlp": [2.19, 2.3, 2.41]}, published=printed)).lines
    assert line.startswith("abstract: `mlp` is better than `base` (6.6B, 75B tokens). Here, `mlp` - `base`: train_loss")


def test_the_verdict_counts_the_arms_that_differ_by_interval_or_sign_test() -> None:
    def one(arm: str, interval: tuple[float, float, float] | None, p: float, worse: int = 6) -> dict[str, Any]:
        seen = None if interval is None else dict(zip(("mean", "low", "high"), interval, strict=True))
        return {"arm": arm, "reference": "base", "measure": "train_loss", "differences": {"0": 0.0, "1": 0.0},
                "interval": seen, "better": 0, "worse": worse, "sign_test": p}  # fmt: skip

    compared = [one("mlp", (-0.2, -0.3, -0.1), 0.5), one("gate", (0.1, -0.1, 0.3), 0.5), one("mea", None, 0.03)]
    told = verdict(result({"base": BASE}, comparisons=compared))
    assert told == "2 of 3 arms differ in train_loss (2 seeds): mlp - base -0.2, mea - base better in 0, worse in 6"
    told = verdict(result({"base": BASE}, comparisons=[one("mea", None, 0.063, worse=5)]))
    assert told.endswith("; too few seeds differ for a sign test of mea - base better in 0, worse in 5")
    assert verdict(result({"base": BASE}, comparisons=[])) == "0 of 0 arms differ in train_loss (0 seeds)"
