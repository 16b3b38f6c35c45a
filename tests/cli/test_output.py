"""The output of `--json` is JSON for any parser, and the command describes itself when asked."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kha_train.cli import main
from kha_train.cli.main import COMMANDS, build, run
from kha_train.cli.output import print_json, strict

CLI = Path(main.__file__).parent
NUMBERS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


def _refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


@given(VALUES)
def test_an_answer_is_strict_json_whatever_its_numbers_are(value: Any) -> None:
    read = json.loads(json.dumps(strict(value), allow_nan=False), parse_constant=_refuse)
    if isinstance(value, float):
        expected = None if math.isnan(value) else {math.inf: "inf", -math.inf: "-inf"}.get(value, value)
        assert read == expected
    assert strict(read) == read


def test_no_command_prints_json_by_itself() -> None:
    offenders = [
        f"{path.name}:{number}"
        for path in sorted(CLI.glob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(r"\bdumps\(", line) and path.name != "output.py" and "slurm.points_document" not in line
    ]
    assert not offenders, "use print_json, which knows what JSON has no word for"


def test_nan_and_infinity_become_null_and_words(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [math.nan, math.inf, -math.inf, 1.5]})
    assert capsys.readouterr().out == '{"a": [null, "inf", "-inf", 1.5]}\n'


@pytest.mark.parametrize("name", [(), *((name,) for name in COMMANDS), ("checkpoint", "diff"), ("data", "verify")])
def test_h_is_help_everywhere(name: tuple[str, ...]) -> None:
    short, long = (CliRunner().invoke(build(list(COMMANDS)), [*name, option]) for option in ("-h", "--help"))
    assert short.exit_code == 0 and short.output == long.output and "Usage" in short.output


def test_version_says_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["--version"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"kha_train {version('kha_train')}, torch {version('torch')}" in said


def test_the_shell_completes_commands() -> None:
    program = "import sys; sys.argv[0] = 'kha'; from kha_train.cli.main import run; run()"
    asked = {"_KHA_COMPLETE": "complete_bash", "COMP_WORDS": "kha che", "COMP_CWORD": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert answer.stdout.split() == ["checkpoint"], answer.stderr


@pytest.mark.parametrize("debug", ["", "1"])
def test_debugging_shows_the_traceback_and_keeps_the_exit_code(
    debug: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KHA_DEBUG", debug)
    with pytest.raises(SystemExit) as ended:
        run(["plan", "model.kvheads=2"])
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert ("Traceback" in said) is (debug == "1")
    assert said.splitlines()[-1].startswith("configuration error: model.kvheads")
