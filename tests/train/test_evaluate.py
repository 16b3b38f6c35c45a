"""Validation: the figures against their definitions, and no rank left waiting by a damaged row."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kha_train import build_decoder, compose
from kha_train.data.format.manifest import content_id_of
from kha_train.data.format.shards import ShardSet
from kha_train.distributed import World
from kha_train.model.decoder import Decoder
from kha_train.train.evaluate import evaluate


class PlainEngine:
    """What `evaluate` needs of an engine, around a decoder in plain PyTorch."""

    world = World.single()

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def evaluate(self, batch: Any) -> Any:
        """Forward with labels."""
        with torch.no_grad():
            return self.decoder(
                batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen
            )


def test_loss_and_bits_per_byte_are_what_they_say(small: list[str]) -> None:
    from kha_train.data.stream import bytes_per_id, validation_batches

    config = compose([*small, "model.layers=1", "engine.micro_batch_size=3"])
    decoder = build_decoder(config)
    sizes_V = bytes_per_id(config)
    found = evaluate(PlainEngine(decoder), validation_batches(config), sizes_V)

    nats, labels, text_bytes = 0.0, 0, 0
    for batch in validation_batches(config):
        logits_BTV = (
            PlainEngine(decoder)
            .decoder(batch.tokens_BT, None, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen)
            .logits_BTV
        )
        kept = batch.labels_BT >= 0
        logits_NV, labels_N = logits_BTV[kept].detach().double(), batch.labels_BT[kept]
        nats += torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum").item()
        labels += int(kept.sum())
        text_bytes += int(sizes_V[batch.labels_BT[kept]].sum())
    assert labels > 300
    assert found.loss == pytest.approx(nats / labels, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)


@pytest.mark.slow
def test_a_damaged_row_that_one_rank_reads_stops_all_ranks(
    small: list[str], dataset: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(dataset / "validation", damaged)
    entry = ShardSet.open(damaged).manifest.shards[0]
    path = next(path for path in sorted(damaged.glob("*.tok")))
    ids = np.fromfile(path, dtype=np.uint16)
    assert entry.tokens == len(ids)
    ids[64 * 4 + 10] = 60_000
    ids.tofile(path)
    overrides = [
        *small,
        f"data.validation={damaged}",
        "data.check_crc=false",
        f"run.dir={tmp_path}/run",
        "run.steps=2",
        "validation.every_steps=1",
    ]
    told = run_ranks(Path(__file__).with_name("validation_worker.py"), 2, overrides=overrides)
    assert "60000" in told[1]
    assert told[0] == f"rank 1: {told[1]}"
    assert (tmp_path / "run" / "FATAL").exists()


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "validation"])
def test_ranks_whose_copies_of_the_data_differ_do_not_begin(
    small: list[str], dataset: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]], split: str
) -> None:
    other = shutil.copytree(dataset / split, tmp_path / "other")
    raw = json.loads((other / "manifest.json").read_text())
    raw["corpus"]["made"] = "yesterday"
    (other / "manifest.json").write_text(json.dumps(raw | {"content_id": content_id_of(raw)}))
    overrides = [*small, f"run.dir={tmp_path}/run", "run.steps=2"]
    told = run_ranks(
        Path(__file__).with_name("validation_worker.py"),
        2,
        overrides=overrides,
        of_rank={"1": [f"data.{split}={other}"]},
    )
    assert "reads other data than rank 0" in told[1] and f"data.{split}" in told[1]
    assert told[0] == f"rank 1: {told[1]}"
