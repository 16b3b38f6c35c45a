"""Writes the weights of a checkpoint of zeros as an export, and prints the MiB of both: written, and by how much memory
grew at most beyond what importing the code and reading the configuration took.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch

from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import open_verified
from kha_train.checkpoint.weights import write_weights as save
from kha_train.config.build import to_plain
from kha_train.config.compose import compose
from kha_train.distributed import World
from kha_train.export.exporting import Request, plan_of, write_weights
from kha_train.export.tokenizer_files import Wanted
from kha_train.model.decoder import lay_out_decoder

SHARD = 32 * 2**20
MODEL = (
    "model=tiny", "attention=kha_linear", "model.layers=3", "model.hidden_size=512", "model.head_dim=64",
    "model.query_heads=16", "model.vocab_size=8192", "moe.experts={experts}", "moe.expert_width=512",
)  # fmt: skip


def mebibytes(name: str) -> float:
    """A figure of this process's memory: `VmRSS` now, `VmHWM` at most."""
    found = re.search(rf"^{name}:\s+([0-9]+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def checkpoint(run: Path, experts: int) -> None:
    """Save a checkpoint of zeros of a model with so many experts a layer, of 3 MiB each."""
    config = compose([setting.format(experts=experts) for setting in MODEL])
    decoder = lay_out_decoder(config)
    pieces = (
        Piece(name, "master", tuple(one.shape), 0, torch.zeros(one.numel())) for name, one in decoder.named_parameters()
    )
    names = {name for name, _ in decoder.named_parameters()} | {"head.weight"}
    buffers = {name: torch.zeros(one.shape) for name, one in decoder.state_dict().items() if name not in names}
    save(run, to_plain(config), pieces, buffers)


if __name__ == "__main__":
    place, experts = Path(sys.argv[1]), int((sys.argv[2:] or ["24"])[0])
    if not (place / "run").exists():
        checkpoint(place / "run", experts)
        # A process of its own, whose largest memory is not that of making the checkpoint.
        os.execv(sys.executable, [sys.executable, *sys.argv])
    plan = plan_of(open_verified(place / "run", World.single()), Request(place / "out", tokenizer=Wanted(none=True)))
    (place / "out").mkdir()
    before = mebibytes("VmRSS")
    written = write_weights(plan, place / "out", SHARD, lambda size: None)
    print(written / 2**20, mebibytes("VmHWM") - before)
