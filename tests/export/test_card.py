"""The model card says where weights come from that no training wrote."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from kha_train.checkpoint.merge import merge
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import open_verified
from kha_train.checkpoint.weights import write_weights
from kha_train.config.build import to_plain
from kha_train.config.compose import compose
from kha_train.distributed import World
from kha_train.engine.building import persistent_buffers
from kha_train.export.card import card
from kha_train.export.compress import compress_run
from kha_train.export.exporting import trained_config
from kha_train.export.importing import prepare
from kha_train.model.decoder import lay_out_decoder

SMALL = ("model.layers=2", "model.hidden_size=32", "model.head_dim=8", "model.vocab_size=64", "model.seq_len=24")


def written(run: Path, *overrides: str) -> Path:
    """A run with a checkpoint of random weights."""
    config = compose([*SMALL, *overrides])
    decoder = lay_out_decoder(config)
    shapes = {name: tuple(one.shape) for name, one in decoder.named_parameters()}
    pieces = [Piece(name, "master", shape, 0, torch.randn(shape).flatten()) for name, shape in shapes.items()]
    buffers = {name: torch.zeros(one.shape) for name, one in persistent_buffers(decoder).items()}
    write_weights(run, to_plain(config), pieces, buffers)
    return run


def origin(run: Path) -> str:
    """That part of the card."""
    checkpoint = open_verified(run, World.single())
    text = card(checkpoint, trained_config(checkpoint), "Class", "float32", heads=False, vllm=False)
    return text.partition("## Origin")[2].partition("##")[0]


def test_an_average_names_its_checkpoints_and_their_shares_and_no_budget_of_its_own(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a"), written(tmp_path / "b", "optim.lr=0.25")
    assert "| budget | 0 tokens" in origin(a)
    merge([a, b], [1, 3], tmp_path / "mean", lambda count: None)
    told = origin(tmp_path / "mean")
    assert "| averaged from | 0.25 x step 0 of a, 0.75 x step 0 of b |" in told and "rate 0.25" in told
    assert "budget" not in told


def test_a_compressed_model_names_its_source(tmp_path: Path) -> None:
    compress_run(written(tmp_path / "a"), "all", 1, tmp_path / "half", lambda title, total: nullcontext(lambda n: None))
    assert "| compressed from | step 0 of a |" in origin(tmp_path / "half")


@pytest.mark.slow
def test_an_imported_model_has_no_optimiser_and_no_data_of_ours(save_model: Callable[..., Any], tmp_path: Path) -> None:
    save_model("qwen3", tmp_path / "stock")
    prepare(tmp_path / "stock", tmp_path / "run").write(tmp_path / "run")
    told = origin(tmp_path / "run")
    assert "| imported from | stock, a qwen3 |" in told
    assert not any(word in told for word in ("optimiser", "budget", "seed", "data"))
    compress_run(tmp_path / "run", "all", 1, tmp_path / "half", lambda title, total: nullcontext(lambda count: None))
    told = origin(tmp_path / "half")
    assert "| imported from | stock, a qwen3 |" in told and "| compressed from | step 0 of run |" in told
    assert "optimiser" not in told


def test_a_run_says_whose_weights_it_began_with(tmp_path: Path) -> None:
    assert "| weights began as those of | base |" in origin(written(tmp_path / "run", "run.init_from=runs/base"))


def test_a_checkpoint_of_the_ring_names_its_run(tmp_path: Path) -> None:
    ring = written(tmp_path / "run" / "ring")
    assert "| run |" not in origin(ring)
    (tmp_path / "run" / "run.json").write_text('{"run_id": "abc", "attempts": []}')
    assert "| run | abc |" in origin(ring)
