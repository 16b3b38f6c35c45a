"""Allowed values are given as a range only if there is one; fixes that can be typed are distinct from advice in
words.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from kha_train.cli.main import run
from kha_train.errors import ConfigError, First, Look, Replace, Settings, between, either


def test_an_empty_range_is_not_told() -> None:
    assert [between(1, last) for last in (3, 1, 0)] == ["1 to 3", "1", None]


def test_an_event_of_a_run_without_events_is_refused_without_a_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = tmp_path / "flat.csv"
    curve.write_text("step,loss\n" + "".join(f"{step},3.0\n" for step in range(1, 300)))
    with pytest.raises(SystemExit) as ended:
        run(["spikes", str(curve), "--event", "2"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "configuration error: --event = 2: this run has no events\n"


def test_a_fix_reads_as_words_and_knows_what_of_it_can_be_typed() -> None:
    error = ConfigError(
        "wrong", fix=either("think", Settings("a=1"), First("make it"), Replace("c", "is it {}?", old="b"))
    )
    assert str(error) == "wrong; fix: think, or a=1, or type `make it` first, or is it c?"
    assert error.typed_fixes == error.fix.ways[1:]
    assert ConfigError("wrong", fix=either(Settings("a=1"), Settings("a=2"))).fix == "a=1 or a=2"
    assert ConfigError("wrong", fix="think").typed_fixes == ConfigError("wrong").typed_fixes == ()


def test_a_list_that_is_to_be_typed_is_in_quotes() -> None:
    fix = Settings("a.b=[c,d] e='f [g]' h=i", "{} does it")
    assert fix == "'a.b=[c,d]' e='f [g]' h=i does it" and Settings(fix.typed).typed == fix.typed


def test_a_fix_that_crosses_to_another_process_is_the_same_fix() -> None:
    for fix in (Look("kha x"), First("make it"), Settings("a=[1]"), Replace("c", "is it {}?", old="b")):
        crossed = pickle.loads(pickle.dumps(fix))
        assert crossed == fix and type(crossed) is type(fix) and vars(crossed) == vars(fix)
    error = pickle.loads(pickle.dumps(ConfigError("wrong", fix=either(First("make it"), Replace("c", old="b")))))
    assert str(error) == "wrong; fix: type `make it` first or c" and len(error.typed_fixes) == 2
