"""Secrets never reach a file; everyday words of language models (tokens, tokenizer) always do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kha_train.record import Record, Redactor
from kha_train.record.metrics import EARLIER
from kha_train.record.redact import REDACTED, is_secret_name

CANARY = "canary-4f1e9a7c"
SECRET_NAMES = [
    "api_key", "apikey", "API-KEY", "wandb.api_key", "WANDB_API_KEY", "openaiApiKey", "token", "HF_TOKEN", "authToken",
    "GITHUB_TOKEN", "access_tokens", "id_token", "secret", "AWS_SECRET_ACCESS_KEY", "client-secret", "password",
    "passwd", "PASSWORD", "db_passwords", "sig", "X-Amz-Signature", "credential", "credentials",
    "GOOGLE_APPLICATION_CREDENTIALS", "--api-key",
]  # fmt: skip
PLAIN_NAMES = [
    "tokens", "tokenizer", "tokenizer_sha256", "train/tokens_per_second", "loss_chunk_tokens", "tokens_per_epoch",
    "flops_per_token", "bytes_per_token", "eos_token", "eos_token_id", "pad_token", "num_tokens", "token_count",
    "TOKENIZERS_PARALLELISM", "MAX_TOKENS", "token_dtype", "tokenised", "key", "keys", "kv_heads", "passed", "passes",
    "secretary", "monkey", "apikeyboard",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_name_is_recognised(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", [*PLAIN_NAMES, *EARLIER])
def test_a_name_of_the_trade_is_not_a_secret(name: str) -> None:
    assert not is_secret_name(name)


def test_no_configuration_key_of_the_schema_is_taken_for_a_secret() -> None:
    from dataclasses import fields, is_dataclass
    from typing import get_type_hints

    from kha_train.config.schema import RunConfig

    names, todo = set(), [RunConfig]
    while todo:
        cls = todo.pop()
        hints = get_type_hints(cls)
        names |= {field.name for field in fields(cls)}
        todo += [hints[field.name] for field in fields(cls) if is_dataclass(hints[field.name])]
    assert len(names) > 40
    assert [name for name in names if is_secret_name(name)] == []


def test_values_under_secret_keys_go_and_counts_stay() -> None:
    tree = {"wandb": {"api_key": CANARY, "tags": ["a"]}, "token": 17, "tokens": 8192, "password": 1234, "secret": None}
    assert Redactor({}).clean(tree) == {
        "wandb": {"api_key": REDACTED, "tags": ["a"]},
        "token": 17,
        "tokens": 8192,
        "password": REDACTED,
        "secret": None,
    }


def test_the_environments_secrets_are_found_by_value_anywhere() -> None:
    redactor = Redactor({"WANDB_API_KEY": CANARY, "TOKENIZERS_PARALLELISM": "false", "DB_PASSWORD": "test"})
    tree = {"note": f"failed with {CANARY}!", "list": [CANARY], CANARY: 1, "x": "false", "path": "tests/x", "y": "test"}
    cleaned = redactor.clean(tree)
    assert CANARY not in repr(cleaned)
    assert cleaned["x"] == "false"
    assert cleaned["path"] == "tests/x"
    assert cleaned["y"] == REDACTED


@pytest.mark.parametrize(
    "text",
    [
        f"python -m kha_train telemetry.wandb.api_key={CANARY}",
        f"train --api-key {CANARY} --steps 5",
        f"train --verbose --token {CANARY}",
        f"a: api_key={CANARY}",
        f'{{"api_key": "{CANARY}", "steps": 3}}',
        f"password: '{CANARY}'",
        f"https://user:{CANARY}@example.org/repo.git",
        f"url?access_token={CANARY}&page=2",
    ],
)
def test_a_secret_inside_free_text_is_hidden(text: str) -> None:
    assert CANARY not in Redactor({}).text(text)


@pytest.mark.parametrize(
    "text",
    [
        "torchrun --nproc-per-node 2 -m kha_train attention=kha_mlp data.tokenizer=/x/y model.seq_len=512",
        "token: 151000 is beyond the manifest's maximum 4999",
        "tokens=8192 tokens_per_second: 1.5e5",
        "https://example.org/a@b",
        "loss went to nan at step 5",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert Redactor({}).text(text) == text


@given(st.dictionaries(st.text(max_size=8), st.one_of(st.integers(), st.text(max_size=12), st.none())))
def test_cleaning_twice_changes_nothing_more(tree: dict) -> None:
    redactor = Redactor({"API_KEY": CANARY})
    once = redactor.clean(tree)
    assert redactor.clean(once) == once


def test_no_file_of_a_run_directory_contains_the_canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setattr("sys.orig_argv", ["python", f"--api-key={CANARY}", f"hf_token={CANARY}"])
    record = Record.open(tmp_path)
    record.begin_attempt(0, facts={"note": CANARY, "config": {"api_key": CANARY}})
    record.step({"step": 1, "tokens": 8192, "note": CANARY})
    record.step({"step": 2, "tokens": 16384})
    record.event("failed", 1, error=f"401 for {CANARY}")
    record.rewind_to(1, f"because of {CANARY}")
    record.update_run(result={"secret": CANARY})
    record.close()
    for path in tmp_path.rglob("*"):
        assert CANARY not in path.read_text(), path
    assert '"tokens": 8192' in (tmp_path / "metrics.jsonl").read_text()
