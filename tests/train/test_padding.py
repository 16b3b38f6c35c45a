"""What a run records about rows with padding."""

from __future__ import annotations

from pathlib import Path

import pytest

from kha_train.config.compose import compose
from kha_train.data.stream import open_stream
from kha_train.record import read_metrics
from kha_train.train.run import train

STEPS = 3


@pytest.mark.slow
def test_the_record_counts_experts_by_tokens_and_says_how_much_was_padding(padded: list[str], tmp_path: Path) -> None:
    overrides = [*padded, f"run.steps={STEPS}", "data.global_batch_size=4", "engine.micro_batch_size=2"]
    config = compose([*overrides, f"run.dir={tmp_path / 'run'}", "validation.every_steps=2"])
    train(config)
    lines, stream = read_metrics(tmp_path / "run"), open_stream(config)
    for line in lines:
        tokens = next(stream).token_count
        assert line["data/padding"] == pytest.approx(1 - tokens / (4 * 64))
        # A load is a whole number of tokens: largest over mean, times the mean over real tokens.
        mean = tokens * config.moe.top_k / config.moe.experts
        for maxvio in line["moe/maxvio_by_layer"]:
            assert maxvio * mean == pytest.approx(round(maxvio * mean), abs=1e-3)
    assert any(line["data/padding"] > 0.1 for line in lines)
    assert [line["tokens"] for line in lines] == [4 * 64 * step for step in range(1, STEPS + 1)]


@pytest.mark.slow
def test_a_run_that_cannot_have_padding_records_none(small: list[str], tmp_path: Path) -> None:
    train(compose([*small, "run.steps=1", f"run.dir={tmp_path / 'run'}"]))
    assert all("data/padding" not in line for line in read_metrics(tmp_path / "run"))
