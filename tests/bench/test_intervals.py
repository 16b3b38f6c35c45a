"""Every 95 % interval that a report prints is measured and covers what it claims; equal arms differ by chance."""

from __future__ import annotations

import ast
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import kha_train
from kha_train.bench import equal_arms, intervals
from kha_train.bench.intervals import PRINTED, SIMULATIONS, Row, binomial_tail
from kha_train.cli.main import app

PACKAGE = Path(kha_train.__file__).parent
POINTS = {"student_975", "poisson_interval", "dispersed_interval", "comb", "NORMAL_975"}
"""What the limits of an interval are made of."""
COMPUTED = {
    "analysis/statistics.py": {"over_seeds", "sign_test", "student_975", "pooled_rate", "mean_of_steps"},
    "stability/statistics.py": {"rate"},
    "bench/protocol.py": {"compare"},
    "analysis/certify/null.py": {"_null"},
    "analysis/certify/power.py": {"power"},
    "analysis/heads/matches.py": {"chance_of_keeping"},
}
"""The functions that compute intervals. All are measured, `rate` as `reported_rate`, which only names it; but `power`
tests with Student's point, the bound of `_null` is for one more difference, and is computed from runs alone, and
`chance_of_keeping` counts permutations.
"""
NO_INTERVAL = "95 % of the steps"
"""A percentile."""


@cache
def trees() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")
    }


def printed_texts(tree: ast.Module) -> list[str]:
    """The string constants of a module that are not documentation."""
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
    ]


def test_every_file_that_prints_a_95_percent_interval_is_in_the_list_of_the_bench() -> None:
    printing = {
        name
        for name, tree in trees().items()
        if any("95 %" in text.replace(NO_INTERVAL, "") for text in printed_texts(tree))
    }
    listed = {file for files in PRINTED.values() for file in files}
    assert printing - listed == {"bench/intervals.py", "bench/equal_arms.py"}
    assert {file for file in listed if not (PACKAGE / file).is_file()} == set()


def test_every_function_that_computes_limits_of_an_interval_is_measured() -> None:
    found: dict[str, set[str]] = {}
    for name, tree in trees().items():
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            names = (getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(function))
            if POINTS & set(names):
                found.setdefault(name, set()).add(function.name)
    assert found == COMPUTED, "measure the new interval in kha_train/bench/intervals.py, then list it here"
    assert set(PRINTED) == set(SIMULATIONS)


def test_every_printed_interval_covers_what_it_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small version of `kha bench intervals`, judged by exact binomial bounds."""
    for name, values in {"STEPS": (200, 1000, 2000), "SEEDS": (2, 5), "EVENTS": (1.0, 10.0)}.items():
        monkeypatch.setattr(intervals, name, values)
    command = ["bench", "intervals", "--seed", "3", "--simulations", "200", "--json"]
    found = json.loads(CliRunner().invoke(app, command).stdout)
    failed = {name: one["failed"] for name, one in found["summary"].items()}
    assert found["holds"] and failed == {name: [] for name in PRINTED}
    printed = {row["setting"]: row["printed"] for row in found["rows"] if row["interval"] == "mean over steps"}
    assert printed["200 steps, AR(1) 0.0"] == printed["2000 steps, AR(1) 0.99"] == 0
    assert printed["1000 steps, AR(1) 0.0"] > 180
    assert "| pooled rate |" in intervals.format_measured(found)


def test_an_interval_that_claims_too_much_or_is_too_wide_fails() -> None:
    """The old intervals: Poisson's of five runs with four events whose rates vary by 100 % covers 64 %."""
    narrow = Row("", "", False, 200, 200, 128)
    wide = Row("", "", True, 2000, 2000, 1999)
    assert not narrow.holds and not wide.holds
    assert Row("", "", False, 2000, 2000, 1999).holds, "exact intervals of counts may cover more"
    assert Row("", "", True, 2000, 1000, 950).holds and Row("", "", True, 2000, 0, 0).holds


def test_the_bound_is_the_exact_binomial_one() -> None:
    by_hand = sum(math.comb(30, k) * 0.92**k * 0.08 ** (30 - k) for k in range(25))
    assert binomial_tail(24, 30, 0.92) == pytest.approx(by_hand, rel=1e-12)
    assert binomial_tail(30, 30, 0.92) == pytest.approx(1.0)


def test_simulated_curves_have_the_variance_and_correlation_they_are_named_for() -> None:
    curves_CN = intervals.autoregressive(np.random.default_rng(0), 4000, 30, 0.8)
    assert curves_CN[:, [0, 29]].var(axis=0) == pytest.approx([1.0, 1.0], abs=0.1)
    assert np.mean(curves_CN[:, 1:] * curves_CN[:, :-1]) == pytest.approx(0.8, abs=0.03)


@pytest.mark.slow
def test_equal_arms_are_trained_and_compared_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_arms, "STEPS", 4)
    monkeypatch.setattr(equal_arms, "SETTINGS", (*equal_arms.SETTINGS, "run.steps=4"))
    command = ["bench", "intervals", "--runs", str(tmp_path / "runs"), "--seed", "5", "--comparisons", "1", "--json"]
    found = json.loads(CliRunner().invoke(app, command).stdout)
    (one,) = found["comparisons"]
    assert one["seeds"] == [5, 6, 7] and len(set(one["differences"])) == 3 and 0 not in one["differences"]
    assert one["low"] < one["mean"] < one["high"] and (found["outside"], found["allowed"]) == (int(one["outside"]), 1)
    assert len(list((tmp_path / "runs").glob("seed-*"))) == 6
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code != 0


def test_of_twenty_comparisons_three_false_ones_are_allowed() -> None:
    """P(N <= 3) = 0.984 for 20 at 5 %."""
    assert binomial_tail(2, 20, 0.05) < equal_arms.LIKELY <= binomial_tail(3, 20, 0.05)
