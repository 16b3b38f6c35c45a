"""One ZeRO 3 step of each case beside the same step of plain PyTorch; answers losses and gradient norms."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from kha_train import RunConfig, build_decoder, compose, distributed
from kha_train.engine import deepspeed
from kha_train.optim import parameter_groups

torch.set_num_threads(1)
original_settings = deepspeed._settings


def partition_everything(*arguments: Any) -> dict[str, Any]:
    """By default small parameters are kept whole, and these are all small: a module that uses another's parameter would
    not be noticed."""
    settings = original_settings(*arguments)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def batch_of(config: RunConfig) -> SimpleNamespace:
    """Two rows of random tokens, the first of two documents."""
    rows, length = 2, config.model.seq_len
    tokens = torch.randint(0, config.model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(length).repeat(rows, 1)
    positions[0, 10:] -= 10
    return SimpleNamespace(
        tokens_BT=tokens,
        labels_BT=tokens.roll(-1, 1),
        positions_BT=positions,
        cu_seqlens_S=torch.tensor([0, 10, length, 2 * length], dtype=torch.int32),
        max_seqlen=length,
        samples_B=torch.arange(rows).numpy(),
        real_R=None,
        part=(0, 1),
    )


def plain_step(config: RunConfig, batch: SimpleNamespace) -> dict[str, float]:
    """Loss, norm, and the loss after one step of torch's own AdamW."""
    decoder = build_decoder(config)
    groups = parameter_groups(decoder.named_parameters(), config.optim.weight_decay)
    adamw = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps)

    def loss() -> torch.Tensor:
        arguments = (batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen)
        return decoder(*arguments).loss_sum / batch.tokens_BT.numel()

    before = loss()
    before.backward()
    norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), config.optim.grad_clip)
    adamw.step()
    return {"plain loss": before.item(), "plain norm": norm.item(), "plain loss after": loss().item()}


def zero3_step(config: RunConfig, batch: SimpleNamespace) -> dict[str, float]:
    """The same with every parameter partitioned."""
    engine = deepspeed.Engine(config, distributed.start("cpu", 60.0))
    assert all(parameter.numel() == 0 for parameter in engine.decoder.parameters()), "a parameter is kept whole"
    labels = batch.tokens_BT.numel()
    before = engine.accumulate(batch, 1 / labels, 1 / labels, last=True).loss_sum.item() / labels
    norm = engine.gradient_norm.item()
    engine.apply(config.optim.lr)
    after = engine.evaluate(batch).loss_sum.item() / labels
    engine.close()
    return {"loss": before, "norm": norm, "loss after": after}


if __name__ == "__main__":
    deepspeed._settings = partition_everything
    answers = {}
    for name, overrides in json.loads(sys.argv[1])["cases"].items():
        composed = compose(overrides)
        answers[name] = plain_step(composed, batch_of(composed)) | zero3_step(composed, batch_of(composed))
    distributed.stop()
    Path(sys.argv[2]).write_text(json.dumps(answers))
