"""The same steps with rows whole on every rank and shared among ranks, and the gradients of one step; reports both."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kha_train import compose, distributed, open_stream
from kha_train.config.schema import RunConfig
from kha_train.distributed import World
from kha_train.engine.deepspeed import Engine
from kha_train.model.attention import context as sharing
from kha_train.model.attention.context import ContextRanks
from kha_train.model.decoder import DecoderOutput, build_decoder
from kha_train.model.host import inputs_of
from kha_train.train import probe
from kha_train.train.step import next_batch, train_step
from kha_train.train.watch import Ruling

torch.set_num_threads(1)


def backward(config: RunConfig, world: World, context: ContextRanks | None) -> tuple[DecoderOutput, dict[str, Tensor]]:
    """Forward and backward of the first step's first micro-batch in fp64, whole or as this rank's part of it."""
    ranks = (world.rank, world.size) if context else (0, 1)
    batch = next(next(open_stream(config, *ranks)).micro_batches(config.engine.micro_batch_size))
    decoder = build_decoder(config).double()
    for router in decoder.routers():
        router.selection_bias.copy_(torch.linspace(-0.1, 0.1, config.moe.experts))
    output = decoder(*inputs_of(batch, world.device), context=context)
    total = output.auxiliary.total_sum if output.auxiliary else torch.zeros(())
    (output.loss_sum + total).backward()
    grads = {name: weight.grad for name, weight in decoder.named_parameters()}
    return output, {name: grad for name, grad in grads.items() if grad is not None}


def crossed(config: RunConfig, parts: int) -> list[bool]:
    """For each cut of a row into `parts`: whether a document goes across it in a row of the first micro-batch."""
    batch = next(next(open_stream(config)).micro_batches(config.engine.micro_batch_size))
    rows, length = batch.tokens_BT.shape
    borders = set(batch.cu_seqlens_S.tolist())
    cuts = range(length // parts, length, length // parts)
    return [any(row * length + cut not in borders for row in range(rows)) for cut in cuts]


def gradients(config: RunConfig, world: World) -> dict[str, Any]:
    """How far the sums over ranks that share rows are from a forward and backward of the same rows by one rank."""
    shared = ContextRanks(dist.group.WORLD, world.rank, world.size)
    whole, expected = backward(replace(config, engine=replace(config.engine, context_parallel=1)), world, None)
    sized = replace(config, engine=replace(config.engine, context_parallel=world.size))
    part, found = backward(sized, world, shared)
    apart = {name: float((world.sum_(found[name]) - g).norm() / g.norm().clamp(1e-30)) for name, g in expected.items()}
    numbers = [[one.loss_sum, one.auxiliary.total_sum if one.auxiliary else torch.zeros(())] for one in (part, whole)]
    sums = [world.sum_(x.detach().clone()).item() for x in numbers[0]]
    return {
        "worst": max(apart, key=lambda name: apart[name]),
        "apart": max(apart.values()),
        "sums": sums,
        "expected": [x.item() for x in numbers[1]],
        "loads": torch.equal(world.sum_(part.load_LE.clone()), whole.load_LE),
        "crossed": crossed(config, world.size),
    }


def train(config: RunConfig, world: World, steps: int) -> dict[str, Any]:
    """Steps, the second of them discarded, and the bytes that each sends around attention; then what the probe and an
    evaluation see of parts of rows and of whole ones.
    """
    sent, real = [0], sharing.all_to_all

    def counted(received: Tensor, given: Tensor, group: Any) -> Any:
        size = dist.get_world_size(group)
        sent[0] += given.nbytes * (size - 1) // size
        return real(received, given, group=group)

    sharing.all_to_all = counted
    engine, stream = Engine(config, world), open_stream(config, world.rank, world.size)
    told: dict[str, Any] = {"loss": [], "norm": [], "auxiliary": [], "bytes": [], "logits": [], "evaluated": []}
    for step in range(steps):
        batch, labels = next_batch(stream, world)
        sent[0] = 0
        result = train_step(engine, batch, labels, config.optim.lr, lambda loss, norm, at=step: Ruling(at != 1))
        told["bytes"].append(sent[0])
        told["loss"].append(result.loss)
        told["norm"].append(result.grad_norm)
        told["auxiliary"].append([result.balance_loss, result.z_loss])
    batch, labels = next_batch(stream, world)
    told["padding"] = train_step(engine, batch, labels, config.optim.lr).padding
    for one in (batch, batch.whole):
        told["logits"].append(probe._largest_logits(engine, one))
        loss = world.sum_(engine.evaluate(next(one.micro_batches(1))).loss_sum.double()).item()
        told["evaluated"].append(loss if one is batch else loss / config.engine.context_parallel)
    engine.close()
    sharing.all_to_all = real
    return told


if __name__ == "__main__":
    arguments, world = json.loads(sys.argv[1]), distributed.start("cpu", 100.0)
    answer: dict[str, Any] = {"gradients": {}, "steps": {}}
    for name, overrides in arguments["gradients"].items():
        answer["gradients"][name] = gradients(compose(overrides), world)
    for name, overrides in arguments["steps"].items():
        answer["steps"][name] = [
            train(compose([*overrides, f"engine.context_parallel={size}"]), world, arguments["count"])
            for size in (1, *arguments["sizes"])
        ]
    Engine.leave_world()
    Path(sys.argv[2]).write_text(json.dumps(answer))
