"""How well spikes are found on labelled curves, beside the rules of others: the table of docs/stability.md."""

from __future__ import annotations

import pytest

from kha_train.bench.spikes import (
    REFERENCE_NOISES,
    RULES,
    Score,
    clean_curve,
    event_detector,
    format_table,
    score_rules,
    spiky_curve,
)

SEEDS = range(5)


@pytest.fixture(scope="module")
def spiky() -> dict[str, Score]:
    """Every rule on curves full of spikes, shifts, drifts and NaN."""
    return score_rules([spiky_curve(seed, 12_000, noise) for seed in SEEDS for noise in REFERENCE_NOISES], RULES)


@pytest.mark.slow
def test_at_least_97_percent_of_separable_spikes_are_found(spiky: dict[str, Score]) -> None:
    ours = spiky["kha_train events"]
    print("\n" + format_table(spiky))
    assert sum(total for _, total in ours.found.values()) >= 200
    assert ours.recall >= 0.97
    assert ours.found["nan"][0] == ours.found["nan"][1]


@pytest.mark.slow
def test_the_rules_of_others_find_fewer_on_the_same_curves(spiky: dict[str, Score]) -> None:
    recall = {name: score.recall for name, score in spiky.items()}
    assert recall.pop("kha_train events") > max(recall.values())


@pytest.mark.slow
def test_at_most_four_false_alarms_per_50000_clean_steps() -> None:
    score = Score()
    for seed in SEEDS:
        for noise in REFERENCE_NOISES:
            curve = clean_curve(seed, 52_000, noise)
            score.add(curve, [step for step, alarm in enumerate(event_detector(curve.losses)) if alarm])
    value, low, high = score.false_per_unit()
    print(
        f"\n{score.false_alarms} false alarms in {score.clean_steps} clean steps: {value:.2f} ({low:.2f} to {high:.2f})"
    )
    assert score.clean_steps >= 500_000
    assert high <= 4.0
