"""What `kha generate` refuses before it loads a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kha_train.cli.main import app
from kha_train.errors import KhaError


def refused(*words: str) -> KhaError:
    error = CliRunner().invoke(app, ["generate", *words]).exception
    assert isinstance(error, KhaError), error
    return error


@pytest.mark.parametrize("text", [["--prompt", "a"], ["--prompts", "-"]])
def test_a_prompt_is_given_as_ids_or_as_text(tmp_path: Path, text: list[str]) -> None:
    assert refused(str(tmp_path), "--ids", "1,2", *text).field == "--ids"


def test_a_bad_prompt_is_named_by_its_line_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('"a"\n\n[1]\n')
    assert "line 3 has no text" in refused(str(tmp_path), "--prompts", str(tmp_path / "p.jsonl")).line()
