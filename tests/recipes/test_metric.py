"""The recipe of a metric: one file; then the record, the run's declarations and `kha metrics` have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kha_train import build_decoder, compose, open_stream
from kha_train.record import declared_in, read_metrics, read_run

FILE = "kha_train/model/attention/grouped_query.py"
SETTINGS = ["attention=gqa", "engine.device=cpu", "data.global_batch_size=4", "engine.micro_batch_size=2"]


def expected_of_the_first_step(settings: list[str]) -> list[float]:
    """What the heads of each layer put out for the first global batch, by a hook on what follows them."""
    config = compose(settings)
    decoder, found = build_decoder(config), []
    for block in decoder.blocks:
        output = block.get_submodule("attention.output")
        output.register_forward_pre_hook(lambda _, given: found.append(given[0].double().square().mean().sqrt().item()))
    batch = next(open_stream(config))
    with torch.no_grad():
        decoder(batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen)
    return found


def test_a_metric_of_one_file_is_recorded_declared_and_listed(
    follow: Callable[[str], Any], small: list[str], tmp_path: Path
) -> None:
    recipe = follow("a metric")
    assert recipe.touched() == [FILE]
    recipe.run("ruff", "check", FILE)
    recipe.run("ruff", "format", "--check", FILE)
    listing = recipe.type_commands()
    assert "attn/output_rms_by_layer" in listing and "root mean square of head outputs" in listing

    run_dir = tmp_path / "run"
    settings = [*small, *SETTINGS, "engine.activation_checkpointing=full"]
    recipe.run("kha", "train", *settings, "run.steps=2", f"run.dir={run_dir}")
    first, second = read_metrics(run_dir)
    expected = expected_of_the_first_step([*small, *SETTINGS])
    assert first["attn/output_rms_by_layer"] == pytest.approx(expected, rel=1e-5)
    assert first["attn/output_rms"] == max(first["attn/output_rms_by_layer"]) != second["attn/output_rms"]

    declared = declared_in(read_run(run_dir))
    one, listed = declared["attn/output_rms"], declared["attn/output_rms_by_layer"]
    assert (one.unit, one.meaning) == ("1", "root mean square of head outputs; largest over layers")
    assert one.mirrored and not listed.mirrored and not one.timing
    assert set(first) <= set(declared), "every number of a line is declared"
    assert "attn/output_rms_by_layer" in recipe.run("kha", "metrics", "--run", str(run_dir), "--json")
