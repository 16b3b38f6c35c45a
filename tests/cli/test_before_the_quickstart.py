"""The commands of README and docs in an empty directory need what `kha quickstart` makes, and say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from kha_train.cli.main import run
from kha_train.config.compose import compose
from kha_train.config.first_steps import QUICKSTART, quickstart_first

COMMANDS = [
    "train attention=kha_mlp run.steps=1",
    "compare quickstart/runs/gqa-200 quickstart/runs/kha_mlp-200",
    "compare quickstart",
    "status quickstart",
    "spikes quickstart/runs/gqa-200",
    "generate quickstart/runs/gqa-200 --prompt def",
    "checkpoint list quickstart/runs/gqa-200",
    "data inspect quickstart/shards/train",
    "data verify quickstart/shards/train",
    "data tokenizer --corpus quickstart/corpus --out t.model --vocab-size 300",
    "data tokenize --corpus quickstart/corpus --tokenizer quickstart/tokenizer.model --out shards",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_needs_the_quickstart_says_to_type_it_first(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(command.split())
    assert ended.value.code == 2
    assert "type `kha quickstart` first" in capsys.readouterr().err.splitlines()[-1]


def test_what_the_quickstart_does_not_make_or_has_made_is_no_reason_to_type_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert quickstart_first(Path("runs/mine")) is None and quickstart_first(".") is None
    assert quickstart_first(tmp_path / "quickstart" / "runs") is not None
    (tmp_path / "quickstart" / "runs").mkdir(parents=True)
    assert quickstart_first("quickstart/runs/mistyped") is None
    assert quickstart_first("quickstart/shards/train") is not None
    assert compose().data.train.startswith(f"{QUICKSTART}/")
