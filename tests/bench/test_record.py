"""The benchmark of records runs every command on synthetic runs, and prints its protocol."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kha_train.bench.record import QUESTIONS, format_measured
from kha_train.cli.bench import app
from kha_train.errors import ConfigError


@pytest.mark.slow
def test_every_question_is_asked_of_every_length() -> None:
    answer = CliRunner().invoke(app, ["record", "--steps", "200", "--json"], catch_exceptions=False)
    found = json.loads(answer.stdout.splitlines()[-1])
    assert QUESTIONS.keys() < found["steps"]["200"].keys()
    for name in QUESTIONS:
        assert found["steps"]["200"][name]["seconds"] > 0 and found["steps"]["200"][name]["mib"] > 10
    assert 0 < found["steps"]["200"]["page_bytes"] < 5e6 and found["sweep_point_seconds"] > 0
    found["steps"] = {int(steps): costs for steps, costs in found["steps"].items()}
    assert "200 steps" in format_measured(found)


@pytest.mark.parametrize("steps", ["", "1e5", "1000,,2000", "5", "9" * 5000, "\N{SUPERSCRIPT TWO}"])
def test_lengths_that_are_none_are_refused(steps: str) -> None:
    with pytest.raises(ConfigError, match="--steps"):
        CliRunner().invoke(app, ["record", "--steps", steps], catch_exceptions=False)
