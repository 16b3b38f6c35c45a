"""The law of differences: a planted one is found again, and its intervals cover what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kha_train.analysis.difference_law import PARAMETERS, TOKENS, Cell, fit_law

WIDTHS = {"dense": (2e5, 1e6, 3e6, 6e6), "mixture": (3e5, 1.2e6, 3.4e6, 7e6)}
BUDGETS = (122_880.0, 245_760.0, 491_520.0)
PLANTED = {"dense": -0.010, "mixture": -0.020, PARAMETERS: -0.004, TOKENS: 0.006}


def ladder(noise: float, seed: int, seeds: int = 5, bend: float = 0.0) -> list[Cell]:
    """The planted law with its noise; `bend` nats are added on the largest rung."""
    draw = np.random.default_rng(seed)
    rungs = [(family, size, budget) for family, sizes in WIDTHS.items() for size in sizes for budget in BUDGETS]
    middle = math.exp(sum(math.log(size) for _, size, _ in rungs) / len(rungs))
    cells = []
    for family, size, budget in rungs:
        mean = PLANTED[family] + PLANTED[PARAMETERS] * math.log2(size / middle)
        mean += PLANTED[TOKENS] * math.log2(budget / BUDGETS[1]) + bend * (size in (6e6, 7e6))
        cells.append(Cell(family, int(size), budget, {one: mean + noise * draw.normal() for one in range(seeds)}))
    return cells


def test_a_planted_law_is_recovered_exactly_without_noise_and_predicts_the_largest_rung() -> None:
    law = fit_law(ladder(noise=0.0, seed=0))
    assert law is not None and law.cells == 24 and len(law.largest) == 6
    assert {name: found.mean for name, found in law.coefficients.items()} == pytest.approx(PLANTED, abs=1e-12)
    for one in law.largest:
        assert one.parameters in (6_000_000, 7_000_000) and one.error.mean == pytest.approx(0.0, abs=1e-12)


def test_intervals_over_seeds_cover_the_planted_law_as_often_as_they_say() -> None:
    """Of 400 intervals at 95 %, 380 are expected, with a deviation of 4.4."""
    laws = [fit_law(ladder(noise=0.02, seed=seed)) for seed in range(100)]
    inside = [
        found.low <= PLANTED[name] <= found.high for law in laws if law for name, found in law.coefficients.items()
    ]
    assert len(inside) == 400 and 365 <= sum(inside) <= 395


def test_a_law_that_bends_on_the_largest_rung_is_found_out_there() -> None:
    straight, bent = (fit_law(ladder(noise=0.002, seed=1, bend=bend)) for bend in (0.0, 0.05))
    assert straight is not None and bent is not None
    assert sum(one.error.excludes_zero for one in bent.largest) == 6
    assert sum(one.error.excludes_zero for one in straight.largest) <= 1
    assert all(one.error.mean == pytest.approx(0.05, abs=0.01) for one in bent.largest)


def test_a_seed_without_every_difference_is_left_out_and_one_seed_makes_no_law() -> None:
    cells = ladder(noise=0.01, seed=2, seeds=3)
    lost = [Cell(one.family, one.parameters, one.tokens, {**one.differences, 2: math.inf}) for one in cells[:1]]
    law = fit_law([*lost, *cells[1:]])
    assert law is not None and law.coefficients[TOKENS].seeds == 2
    assert fit_law(ladder(noise=0.01, seed=2, seeds=1)) is None and fit_law([]) is None


def test_one_budget_does_not_determine_a_law() -> None:
    assert fit_law([one for one in ladder(noise=0.0, seed=0) if one.tokens == BUDGETS[0]]) is None
