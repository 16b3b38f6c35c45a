"""The same steps with experts whole on every rank and shared among ranks: losses, norms, masters, waits. And the layer
alone, whole and shared, on the same rows."""

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
from kha_train.model.device import resolve_on
from kha_train.model.moe import parallel
from kha_train.model.moe.experts import Experts
from kha_train.model.moe.parallel import ExpertRanks
from kha_train.model.moe.router import Routing, count_experts
from kha_train.train.step import next_batch, train_step
from kha_train.train.watch import Ruling

torch.set_num_threads(1)


def whole_masters(engine: Engine) -> dict[str, Tensor]:
    """Every fp32 master, put together from the fragments of all ranks; every element must have one owner."""
    masters, owners = {}, {}
    for name, shape in engine.shapes.items():
        masters[name], owners[name] = torch.zeros(shape).flatten(), torch.zeros(shape).flatten()
    for fragment in engine.fragments():
        master = fragment.views["master"]
        masters[fragment.name].narrow(0, fragment.start, len(master)).copy_(master)
        owners[fragment.name].narrow(0, fragment.start, len(master)).add_(1)
    for name, master in masters.items():
        engine.world.sum_(master)
        assert bool((engine.world.sum_(owners[name]) == 1).all()), name
    return masters


def run(config: RunConfig, world: World, steps: int, discarded: int | None, crowd: bool) -> dict[str, Any]:
    """Train and tell. With `crowd` the routers choose among the first `top_k` experts alone: others get no token."""
    engine = Engine(config, world)
    waits, sent = [0], [0]
    exchanged, accumulate = parallel.exchanged, engine.accumulate

    def counted(x: Tensor, *others: Any) -> Tensor:
        sent[0] += x.nbytes
        return exchanged(x, *others)

    def measured(*given: Any, **options: Any) -> Any:
        parallel.exchanged = counted
        try:
            return accumulate(*given, **options)
        finally:
            parallel.exchanged = exchanged

    engine.accumulate = measured
    to_host = Tensor.cpu

    def noted(tensor: Tensor) -> Tensor:
        caller = sys._getframe(1).f_code.co_filename
        waits[0] += caller.endswith("moe/parallel.py")
        return to_host(tensor)

    Tensor.cpu = noted
    if crowd:
        for router in engine.decoder.routers():
            router.selection_bias[: config.moe.top_k] += 10.0
    told: dict[str, Any] = {"loss": [], "norm": [], "auxiliary": []}
    before = whole_masters(engine)
    stream = open_stream(config, world.rank, world.size)

    def judge(step: int) -> Any:
        def ruling(loss: float, norm: float) -> Ruling:
            if step < steps - 1:
                return Ruling(step != discarded)
            told["layers"] = engine.gradient_norms()
            return Ruling(True, probe=True)

        return ruling

    for step in range(steps):
        batch, labels = next_batch(stream, world)
        waits[0] = sent[0] = 0
        result = train_step(engine, batch, labels, config.optim.lr, judge(step))
        told["waits of a step"] = waits[0]
        told["rows sent in a step"] = world.sum_ints(sent[0])[0]
        told["loss"].append(result.loss)
        told["norm"].append(result.grad_norm)
        told["auxiliary"].append([result.balance_loss, result.z_loss])
    told["logits"] = result.evidence["max_logits"]
    evaluated = engine.evaluate(next(batch.micro_batches(1)))
    told["evaluated"] = world.sum_(evaluated.loss_sum.double()).item()
    told["held"] = sum(parameter.numel() for parameter in engine.decoder.parameters())
    told["optimizer"] = type(engine._optimizer).__name__
    after = whole_masters(engine)
    engine.close()
    Tensor.cpu = to_host
    return {**told, "masters": after, "moved": {name: float((after[name] - before[name]).norm()) for name in after}}


def compared(config: RunConfig, world: World, case: dict[str, Any]) -> dict[str, Any]:
    """What each number of ranks that share the experts tells, and how far its masters are from those without."""
    answers, base = {}, {}
    for size in (1, *case["sizes"]):
        sized = replace(config, engine=replace(config.engine, expert_parallel=size))
        found = run(sized, world, case["steps"], case.get("discarded"), case.get("crowd", False))
        masters = found.pop("masters")
        base = base or masters
        found["apart"] = {name: float((masters[name] - base[name]).norm()) for name in base}
        answers[str(size)] = found
    if "micro" in case:
        other = replace(config, engine=replace(config.engine, micro_batch_size=case["micro"]))
        found = run(other, world, case["steps"], case.get("discarded"), case.get("crowd", False))
        masters = found.pop("masters")
        answers["another micro-batch"] = {
            **found,
            "apart": {name: float((masters[name] - base[name]).norm()) for name in base},
        }
    return answers


def choices(kind: str, tokens: int, experts: int, top_k: int, seed: int) -> Tensor:
    """[tokens, top_k]: any experts, or for all tokens the `first` or `last` ones."""
    drawn = torch.Generator().manual_seed(seed)
    if kind == "any":
        rows = [torch.randperm(experts, generator=drawn)[:top_k] for _ in range(tokens)]
        return torch.stack(rows) if rows else torch.zeros(0, top_k, dtype=torch.int64)
    chosen = torch.arange(top_k) if kind == "first" else experts - 1 - torch.arange(top_k)
    return chosen.expand(tokens, top_k).clone()


def layer_differences(config: RunConfig, world: World, dtype: torch.dtype, kind: str, tokens: list[int]) -> list[str]:
    """What differs in a bit between a whole layer on the rows of all ranks (`tokens` of each) and a shared one."""
    resolved = resolve_on(config, world.device)
    ranks = ExpertRanks(dist.group.WORLD, world.rank, world.size)
    whole, shared = Experts(config, resolved), Experts(config, resolved)
    drawn = torch.Generator().manual_seed(0)
    for name in ("gate_up", "down"):
        values = 0.1 * torch.randn(getattr(whole, name).shape, generator=drawn)
        setattr(whole, name, torch.nn.Parameter(values.to(dtype)))
        setattr(shared, name, torch.nn.Parameter(ranks.own(values.to(dtype))))
    shared.spread(ranks)
    width = config.model.hidden_size
    x = [torch.randn(count, width, generator=drawn).to(dtype) for count in tokens]
    up = [torch.randn(count, width, generator=drawn).to(dtype) for count in tokens]
    chosen = [choices(kind, n, config.moe.experts, config.moe.top_k, seed) for seed, n in enumerate(tokens)]
    weights = [torch.rand(n, config.moe.top_k, generator=drawn) for n in tokens]

    def passed(layer: Experts, x_ND: Tensor, weight_NJ: Tensor, expert_NJ: Tensor, up_ND: Tensor) -> list[Tensor]:
        x_ND, weight_NJ = x_ND.clone().requires_grad_(), weight_NJ.clone().requires_grad_()
        load_E = count_experts(expert_NJ, config.moe.experts)
        y_ND = layer(x_ND, Routing(expert_NJ, weight_NJ, load_E))
        (y_ND * up_ND).float().sum().backward()
        return [y_ND.detach(), x_ND.grad, weight_NJ.grad]

    expected = passed(whole, torch.cat(x), torch.cat(weights), torch.cat(chosen), torch.cat(up))
    found = passed(shared, x[world.rank], weights[world.rank], chosen[world.rank], up[world.rank])
    names = ["output", "gradient of the input", "gradient of the weights"]
    pairs = {name: (e.split(tokens)[world.rank], f) for name, e, f in zip(names, expected, found, strict=True)}
    for name in ("gate_up", "down"):
        pairs[f"gradient of {name}"] = (ranks.own(getattr(whole, name).grad), getattr(shared, name).grad)
    case = f"{config.moe.backend} {dtype} {kind} {tokens}"
    return [f"{case}: {name}" for name, (e, f) in pairs.items() if not torch.equal(e, f)]


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    world = distributed.start("cpu", 100.0)
    answer: dict[str, Any] = {"layer": []}
    if arguments.get("layer"):
        empty_last = [48] * (world.size - 1) + [0]
        # The loop sums a token's experts in bf16 and in the order of the experts.
        for backend, dtype in (("grouped", torch.float32), ("grouped", torch.bfloat16), ("loop", torch.float64)):
            config = compose([*arguments["layer"], f"moe.backend={backend}"])
            for kind in ("any", "first", "last"):
                for tokens in ([48] * world.size, [1] * world.size, empty_last):
                    answer["layer"] += layer_differences(config, world, dtype, kind, tokens)
    for name, case in arguments["cases"].items():
        answer[name] = compared(compose(case["overrides"]), world, case)
    Engine.leave_world()
    Path(sys.argv[2]).write_text(json.dumps(answer))
