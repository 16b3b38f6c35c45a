"""`kha data`: the whole way from text to a verified dataset, answers a program can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kha_train.cli.data import app
from kha_train.errors import ConfigError, DataError


def kha(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("command")
    source = root / "source"
    source.mkdir()
    for i in range(100):
        (source / f"{i}.txt").write_text(f"Text {i} [red] word" * 5)
    corpus = kha("corpus", "--out", root / "corpus", "--no-standard-library", "--extra-root", source)
    assert corpus["documents"] == 100
    tokenizer = kha("tokenizer", "--corpus", root / "corpus", "--out", root / "t.model", "--vocab-size", 300)
    assert tokenizer["vocab_size"] == 300
    written = kha("tokenize", "--corpus", root / "corpus", "--tokenizer", root / "t.model", "--out", root / "shards")
    assert written["train"]["documents"] + written["validation"]["documents"] == 100
    return root


def test_verify_reads_both_datasets(made: Path) -> None:
    answer = kha("verify", made / "shards")
    assert [entry["ok"] for entry in answer.values()] == [True, True]


def test_inspect_shows_statistics_and_text_with_document_borders(made: Path) -> None:
    answer = kha("inspect", made / "shards" / "train", "--samples", 1, "--tokens", 200)
    (entry,) = answer.values()
    text = "".join(f"Text {i} [red] word" * 5 + "‖" for i in (0, 1))
    assert entry["samples"][0]["text"].startswith(text)
    assert entry["bytes_per_token"] == round(entry["text_bytes"] / entry["tokens"], 3)
    plain = CliRunner().invoke(app, ["inspect", str(made / "shards")], catch_exceptions=False)
    assert "[red]" in plain.stdout and str(entry["tokens"]) in plain.stdout


def test_faults_leave_the_command_as_errors_with_their_exit_code(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        kha("verify", tmp_path / "nowhere")
    with pytest.raises(ConfigError):
        kha("tokenize", "--corpus", made / "corpus", "--tokenizer", made / "t.model", "--out", made / "shards")
    path = made / "shards" / "validation" / "shard-00000.tok"
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataError):
        kha("verify", made / "shards")
    path.write_bytes(data)
