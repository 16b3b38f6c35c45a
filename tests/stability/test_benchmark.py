"""The labelled set scores any rule: hits and false alarms as counted by hand, and a rule may be any command."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from kha_train.bench.spikes import RULES, alarms_of, labelled_set
from kha_train.stability.benchmark import (
    LABELLED,
    Curve,
    Planted,
    command_rule,
    encode_labelled,
    read_labelled,
    score_rule,
)
from kha_train.stability.command import main
from kha_train.stability.errors import CurveError
from tests.conftest import Kha

JUMPS = """
import sys
before = None
for step, text in enumerate(sys.stdin):
    loss = float(text)
    if before is not None and not loss - before < 0.5:
        print(step)
    before = loss
"""


@pytest.fixture
def jumps(tmp_path: Path) -> str:
    """A command that raises an alarm at every rise of half a nat, and where a loss is not finite."""
    (tmp_path / "rule.py").write_text(JUMPS)
    return f"{sys.executable} '{tmp_path / 'rule.py'}'"


def test_the_committed_set_is_what_the_generator_makes() -> None:
    assert LABELLED.read_text() == "".join(encode_labelled(*one) + "\n" for one in labelled_set())
    read = dict(read_labelled())
    assert {one.kind for curve in read.values() for one in curve.planted} >= {"narrow", "wide", "nan", "overlapping"}


def test_hits_and_false_alarms_are_those_counted_by_hand(jumps: str) -> None:
    losses = [2.0] * 700
    losses[50] = 3.0  # nothing was planted here
    losses[100] = 3.0
    losses[106] = float("nan")
    losses[140] = 4.0  # within 200 steps of a spike: neither right nor wrong
    losses[607:610] = [3.0, 3.0, 3.0]  # seven steps late
    curve = Curve(losses, [Planted("narrow", 100, 101, True), Planted("nan", 106, 106, True),
                           Planted("overlapping", 140, 141, False), Planted("wide", 600, 610, True)])  # fmt: skip
    found = score_rule([curve], command_rule(jumps))
    # After a NaN every comparison is an alarm once more, at step 107.
    assert found.found == {"narrow": [1, 1], "nan": [1, 1], "wide": [0, 1]}
    assert found.false_alarms == 1 and found.recall == 2 / 3
    # Clean: up to step 99, and from 200 steps after the overlapping spike to the wide one.
    assert found.clean_steps == 100 + (600 - 341)


def test_a_rule_that_fails_or_prints_something_else_is_refused(tmp_path: Path) -> None:
    curve = Curve([1.0, 2.0])
    cases = {"print(2)": "allowed: steps from 0 to 1", "print('no')": "printed 'no'", "1/0": "ended with 1"}
    for program, told in cases.items():
        (tmp_path / "rule.py").write_text(program)
        with pytest.raises(CurveError, match=told):
            score_rule([curve], command_rule(f"{sys.executable} {tmp_path / 'rule.py'}"))
    for nothing in ("no-such-program-at-all", ""):
        with pytest.raises(CurveError, match="cannot be started"):
            command_rule(nothing)([1.0])
    (tmp_path / "set.jsonl").write_text('{"name": "a", "losses": [1.0]}\n')
    with pytest.raises(CurveError, match=r"set\.jsonl, line 1"):
        read_labelled(tmp_path / "set.jsonl")


@pytest.mark.slow
def test_both_commands_give_one_score(jumps: str, kha: Kha) -> None:
    code, told, _ = kha("bench", "spikes", "--rule", jumps, "--json")
    found = json.loads(told)
    assert code == 0
    with redirect_stdout(StringIO()) as alone:
        main(["--rule", jumps, "--json"])
    assert json.loads(alone.getvalue()) == found[jumps]
    ours = score_rule(
        [curve for _, curve in read_labelled()], lambda losses: alarms_of(RULES["kha_train events"], losses)
    )
    assert found["kha_train events"]["recall"] == ours.recall > 0.95
    code, _, told = kha("bench", "spikes", "--rule", "false")
    assert code == 2 and "ended with 1" in told
