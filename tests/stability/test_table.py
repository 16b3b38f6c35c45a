"""How well spikes are detected on labelled curves, compared with other rules: the table of docs/stability.md."""

from __future__ import annotations

import pytest

from kha_train.bench.spike_thresholds import format_thresholds, merged, run_thresholds
from kha_train.bench.spikes import (
    REFERENCE_NOISES,
    RULES,
    clean_curve,
    early_curve,
    event_detector,
    score_rules,
    spiky_curve,
)
from kha_train.stability.benchmark import Score, format_table

SEEDS = range(5)


@pytest.fixture(scope="module")
def spiky() -> dict[str, Score]:
    """Every rule on curves full of spikes, shifts, drifts and NaN."""
    return score_rules([spiky_curve(seed, 12_000, noise) for seed in SEEDS for noise in REFERENCE_NOISES], RULES)


@pytest.mark.slow
def test_at_least_98_percent_of_separable_spikes_are_found(spiky: dict[str, Score]) -> None:
    ours = spiky["kha_train events"]
    print("\n" + format_table(spiky))
    assert sum(total for _, total in ours.found.values()) >= 200
    assert ours.recall >= 0.98
    assert ours.found["nan"][0] == ours.found["nan"][1]


@pytest.mark.slow
def test_the_rules_of_others_find_fewer_on_the_same_curves(spiky: dict[str, Score]) -> None:
    recall = {name: score.recall for name, score in spiky.items()}
    assert recall.pop("kha_train events") > max(recall.values())


def test_at_least_98_percent_of_spikes_are_found_while_the_loss_falls_fast() -> None:
    curves = [early_curve(seed, noise) for seed in range(30) for noise in REFERENCE_NOISES]
    score = score_rules(curves, {"ours": event_detector})["ours"]
    print(f"\nearly: {100 * score.recall:.1f} % of {score.found}")
    assert sum(total for _, total in score.found.values()) >= 300
    assert all(200 <= planted.start for curve in curves for planted in curve.planted)
    assert score.recall >= 0.98


def test_nothing_opens_on_the_beginning_of_a_run_without_spikes() -> None:
    """60 curves; Gaussian noise, for heavy tails have outliers as high as spikes."""
    curves = [early_curve(seed, "normal", spikes=False) for seed in range(60)]
    score = score_rules(curves, {"ours": event_detector})["ours"]
    assert (score.clean_steps, score.false_alarms) == (60 * 1500, 0)


def _false_alarms(noise: str) -> Score:
    curves = [clean_curve(seed, 52_000, noise) for seed in SEEDS]
    return score_rules(curves, {"ours": event_detector})["ours"]


@pytest.mark.slow
def test_false_alarms_are_few_on_the_reference_noises_and_bounded_on_heavy_tails() -> None:
    scores = {noise: _false_alarms(noise) for noise in (*REFERENCE_NOISES, "student")}
    reference = merged(*(scores[noise] for noise in REFERENCE_NOISES))
    for name, score in {**scores, "reference": reference}.items():
        value, low, high = score.false_per_unit()
        counts = f"{score.false_alarms} false alarms in {score.clean_steps} clean steps"
        print(f"\n{name}: {counts}: {value:.2f} ({low:.2f} to {high:.2f}) in 50,000")
    assert reference.clean_steps >= 500_000
    assert reference.false_per_unit()[0] <= 2.5
    assert scores["student"].false_per_unit()[0] <= 14.0


def test_a_higher_threshold_finds_no_more_and_makes_up_no_more() -> None:
    found = run_thresholds(seed=5, spiky_steps=3000, clean_steps=12_000, early_curves=3)
    assert list(found) == ["z 7", "z 7.5", "z 8", "z 9"]
    for group in ("early", "reference", "mixed", "student"):
        planted = {kind: total for kind, (_, total) in found["z 7"][group].found.items()}
        assert all({k: t for k, (_, t) in scores[group].found.items()} == planted for scores in found.values())
    assert found["z 9"]["student"].false_alarms < found["z 7"]["student"].false_alarms
    assert found["z 9"]["early"].recall <= found["z 7"]["early"].recall
    table = format_thresholds(found).splitlines()
    assert len(table) == 6 and all(line.count("|") == table[0].count("|") for line in table)
