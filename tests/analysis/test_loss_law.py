"""The loss law of MEA eq 35 is found again from curves that it made."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kha_train.analysis.loss_law import fit_loss_law, law_of_run


@pytest.mark.parametrize(
    ("scale", "exponent", "floor"), [(1e9, 0.3, 1.7), (2.5e13, 0.095, 0.0), (3e5, 1.2, 2.0), (7e8, 0.5, -0.2)]
)
def test_an_exact_curve_gives_its_own_law(scale: float, exponent: float, floor: float) -> None:
    tokens = scale * np.geomspace(1e-3, 10.0, 24)
    law = fit_loss_law(tokens, (scale / tokens) ** exponent + floor)
    assert law is not None and not law.at_edge
    assert law.exponent == pytest.approx(exponent, rel=1e-6) and law.tokens == pytest.approx(scale, rel=1e-6)
    assert law.floor == pytest.approx(floor, abs=1e-6) and law.error < 1e-7
    far = 100 * scale
    assert law.at(far) == pytest.approx((scale / far) ** exponent + floor, abs=1e-6)


def test_no_other_law_is_nearer_to_a_noisy_curve() -> None:
    """Against all three parameters, varied around it together; the law itself is not on the grid."""
    drawn = np.random.default_rng(0)
    tokens = np.geomspace(1e7, 1e10, 24)
    loss = (1e9 / tokens) ** 0.3 + 1.7 + drawn.normal(0.0, 0.02, 24)
    law = fit_loss_law(tokens, loss)
    assert law is not None
    best = min(
        np.mean(((scale / tokens) ** exponent + floor - loss) ** 2) ** 0.5
        for scale in law.tokens * np.linspace(0.9, 1.1, 20)
        for exponent in law.exponent * np.linspace(0.9, 1.1, 20)
        for floor in law.floor + np.linspace(-0.1, 0.1, 20)
    )
    assert law.error <= best


def test_a_curve_that_does_not_fall_or_is_too_short_has_no_law() -> None:
    tokens = np.geomspace(1e7, 1e10, 24)
    assert fit_loss_law(tokens, 2.0 + np.log(tokens) / 10) is None
    assert fit_loss_law(tokens[:5], (1e9 / tokens[:5]) ** 0.3) is None
    assert fit_loss_law(tokens, np.full(24, np.nan)) is None
    steep = fit_loss_law(tokens, 3.0 - 0.1 * np.log(tokens))
    assert steep is not None and steep.at_edge, "a logarithm has no floor"


def test_the_law_of_a_run_leaves_out_the_first_tenth_of_its_tokens() -> None:
    tokens = np.arange(1, 4001) * 1e4
    loss = np.where(tokens < 0.09 * tokens[-1], 50.0, (1e7 / tokens) ** 0.3 + 1.7)
    columns = {"tokens": tokens, "train/loss": loss}
    law = law_of_run(SimpleNamespace(column=columns.__getitem__))  # type: ignore[arg-type]
    assert law is not None
    assert (law.exponent, law.floor) == (pytest.approx(0.3, rel=1e-4), pytest.approx(1.7, rel=1e-4))
