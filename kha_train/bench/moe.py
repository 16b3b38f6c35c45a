"""Measures the experts of one layer: every implementation that runs here, forward and backward, taking turns in one
process.

All get the same tokens, matrices and routing, and return the gradients of tokens, both matrices and routing weights.
There are two loads: every expert receives the same number of tokens; or the configured router sends tokens that have
something in common, so that some experts receive more. FLOP/s count the actual copies. On Hopper a grouped product
rounds the rows of every expert up to whole tiles; `tile_padding` gives the effect. The memory kept for the backward is
counted by torch's saved-tensor hooks, each storage once, without the inputs.
"""

# N tokens   D model width   F expert width   E experts   J experts per token   M = N * J routed copies
# X = 2F, gate and up side by side

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kha_train.bench import protocol
from kha_train.bench.peers import Adapter, Contender, Implementation, Problem, load_adapters
from kha_train.config.compose import compose
from kha_train.config.resolve import precision_on, triton_problem
from kha_train.config.schema import RunConfig
from kha_train.engine.building import resolve_dtype
from kha_train.errors import ConfigError
from kha_train.model.device import device_facts
from kha_train.model.init import initialise
from kha_train.model.moe.experts import loop
from kha_train.model.moe.grouped import grouped, grouped_product, place, tile_padding
from kha_train.model.moe.megablocks import load_kernels, run_kernels
from kha_train.model.moe.router import Router, Routing, count_experts

BASE = "grouped"
LIKENESS = 1.0
"""Similarity of the tokens sent through the router: the norm of their common part over that of their individual
parts.
"""


def measure(
    overrides: Sequence[str],
    *,
    against: Sequence[str] = (),
    peers: Path | None = None,
    blocks: int = 20,
    warmup: int = 3,
    clock: protocol.Clock = "wall",
) -> dict[str, Any]:
    """Measure the experts of the configuration of `overrides`, with one micro-batch of whole rows at a time, beside the
    peers `against`, whose adapters are in the folder `peers`. Raises as `compose`; ConfigError for an unavailable peer
    or a configuration without experts.
    """
    config = compose(overrides)
    if not config.moe.experts:
        raise ConfigError("has no experts to measure", field="moe.experts", value=0, fix="model=small, or another MoE")
    adapters = load_adapters(peers, against)
    for adapter in adapters.values():
        adapter.check(config)
    cuda = config.engine.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = resolve_dtype(config, device)
    arms, missing = implementations(config, device, dtype, adapters)
    problems = {"balanced": balanced(config, device, dtype), "router": routed(config, device, dtype)}
    moe = config.moe
    return {
        "shape": {
            "model": config.model.name,
            "tokens": config.engine.micro_batch_size * config.model.seq_len,
            "hidden_size": config.model.hidden_size,
            "experts": moe.experts,
            "top_k": moe.top_k,
            "expert_width": moe.expert_width,
            "dtype": str(dtype).removeprefix("torch."),
        },
        "protocol": {"blocks": blocks, "warmup": warmup, "clock": clock, "base": BASE},
        "environment": protocol.environment(device),
        "missing": missing,
        "routings": {
            name: _take_turns(problem, arms, blocks=blocks, warmup=warmup, device=device, clock=clock)
            for name, problem in problems.items()
        },
    }


def implementations(
    config: RunConfig, device: torch.device, dtype: torch.dtype, adapters: Mapping[str, Adapter]
) -> tuple[dict[str, Implementation], dict[str, str]]:
    """What runs here, by name, with `grouped` first, and why the others are left out."""
    arms: dict[str, Implementation] = {BASE: ours(grouped), "loop": ours(loop), "torch grouped_mm": separate}
    missing: dict[str, str] = {}
    reason = triton_problem(device_facts(device), precision_on(config, device.type))
    if reason is None:
        arms["grouped, triton"] = ours(partial(grouped, kernels="triton"))
    else:
        missing["grouped, triton"] = reason
    try:
        arms["megablocks"] = ours(partial(run_kernels, load_kernels()))
    except ConfigError as error:
        missing["megablocks"] = error.problem
    for peer, adapter in adapters.items():
        theirs, left_out = adapter.experts(config, dtype)
        arms |= {f"{peer} {kind}": implementation for kind, implementation in theirs.items()}
        missing |= {f"{peer} {kind}": why for kind, why in left_out.items()}
    return arms, missing


def ours(experts: Callable[[Tensor, Tensor, Tensor, Routing], Tensor]) -> Implementation:
    """An implementation that takes matrices in this project's layout."""

    def bind(problem: Problem) -> Contender:
        return Contender(lambda: experts(*problem.leaves[:3], problem.routing), problem.leaves)

    return bind


def separate(problem: Problem) -> Contender:
    """A plain-torch implementation, as other trainers write it: three grouped products under autograd, weights on the
    outputs, and scatter-adds in both directions. Gate and up are separate matrices.
    """
    x_ND, gate_up_EDX, down_EFD, weight_NJ = problem.leaves
    gate_EDF, up_EDF = (leaf(half) for half in gate_up_EDX.chunk(2, dim=-1))
    expert_NJ, load_E = problem.routing.expert_NJ, problem.routing.load_E

    def forward() -> Tensor:
        order_M, _, ends_E = place(expert_NJ, load_E)
        token_M = order_M // expert_NJ.shape[1]
        x_MD = x_ND[token_M]
        hidden_MF = functional.silu(grouped_product(x_MD, gate_EDF, offs=ends_E))
        hidden_MF = hidden_MF * grouped_product(x_MD, up_EDF, offs=ends_E)
        y_MD = grouped_product(hidden_MF, down_EFD, offs=ends_E) * weight_NJ.flatten()[order_M].unsqueeze(1)
        return torch.zeros_like(x_ND).index_add(0, token_M, y_MD.to(x_ND.dtype))

    return Contender(forward, (x_ND, gate_EDF, up_EDF, down_EFD, weight_NJ))


def leaf(matrix: Tensor) -> Tensor:
    """A contiguous copy of `matrix` that gets a gradient of its own."""
    return matrix.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def balanced(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Problem:
    """Routing that gives every expert the same number of tokens, in a random order."""
    tokens, top_k, experts = _tokens(config), config.moe.top_k, config.moe.experts
    expert_NJ = (torch.arange(tokens * top_k) % experts).view(tokens, top_k)
    expert_NJ = expert_NJ[torch.randperm(tokens, generator=_generator(1))].to(device)
    weight_NJ = torch.rand(tokens, top_k, generator=_generator(2)).to(device)
    return _problem(config, device, dtype, _states(config, 0.0).to(device, dtype), expert_NJ, weight_NJ)


def routed(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Problem:
    """Routing by an untrained router of the configuration, for tokens that resemble each other."""
    x_ND = _states(config, LIKENESS).to(device, dtype)
    router = Router(config, 0)
    initialise(router, config.run.seed)
    with torch.no_grad():
        routing = router.to(device, dtype).eval()(x_ND)
    return _problem(config, device, dtype, x_ND, routing.expert_NJ, routing.weight_NJ)


def _problem(
    config: RunConfig, device: torch.device, dtype: torch.dtype, x_ND: Tensor, expert_NJ: Tensor, weight_NJ: Tensor
) -> Problem:
    experts, width, inner = config.moe.experts, config.model.hidden_size, config.moe.expert_width
    shapes = ((experts, width, 2 * inner), (experts, inner, width))
    matrices = (torch.randn(shape, generator=_generator(3)).mul(0.02).to(device, dtype) for shape in shapes)
    x_ND, up_EDX, down_EFD, weight_NJ = (leaf.requires_grad_() for leaf in (x_ND, *matrices, weight_NJ))
    grad_ND = torch.randn(x_ND.shape, generator=_generator(4)).to(device, dtype)
    routing = Routing(expert_NJ, weight_NJ, count_experts(expert_NJ, experts))
    return Problem((x_ND, up_EDX, down_EFD, weight_NJ), routing, grad_ND)


def _states(config: RunConfig, likeness: float) -> Tensor:
    width = config.model.hidden_size
    own_ND, common_D = (
        torch.randn(_tokens(config), width, generator=_generator(0)),
        torch.randn(width, generator=_generator(5)),
    )
    return own_ND + likeness * common_D


def _take_turns(problem: Problem, arms: dict[str, Implementation], **how: Any) -> dict[str, Any]:
    load_E = problem.routing.load_E
    rows = int(load_E.sum())
    _, width, both = problem.leaves[1].shape
    flops = 3 * 3 * rows * width * both
    contenders = {name: bind(problem) for name, bind in arms.items()}
    kept = {name: _kept_bytes(contender, problem) for name, contender in contenders.items()}
    steps = {name: partial(_step, contender, problem.grad_ND) for name, contender in contenders.items()}
    seconds = protocol.interleave(steps, **how)
    return {
        "largest_load_over_mean": float(load_E.max() * load_E.numel() / rows),
        "tile_padding": tile_padding(load_E),
        "arms": {
            name: {
                **protocol.plain(protocol.timing(taken)),
                "against_base": protocol.plain(protocol.compare(taken, seconds[BASE])),
                "flops_per_second": flops / protocol.timing(taken).seconds,
                "kept_bytes_per_token": kept[name] / problem.grad_ND.shape[0],
                "block_seconds": taken,
            }
            for name, taken in seconds.items()
        },
    }


def _step(contender: Contender, grad_ND: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(contender.forward(), contender.leaves, grad_ND)


def _kept_bytes(contender: Contender, problem: Problem) -> int:
    """Bytes of every storage that the forward saves, without its inputs."""
    given = {tensor.untyped_storage().data_ptr() for tensor in (*contender.leaves, *problem.routing[:3])}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Held until the end: a freed storage could be allocated again at the same address.
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        contender.forward()
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in given)


def _tokens(config: RunConfig) -> int:
    return config.engine.micro_batch_size * config.model.seq_len


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def format_measured(found: dict[str, Any]) -> str:
    """The figures and their protocol, as text."""
    shape, how = found["shape"], found["protocol"]
    layer = f"{shape['top_k']} of {shape['experts']} experts of width {shape['expert_width']}, {shape['dtype']}"
    taken = f"{how['blocks']} interleaved blocks after {how['warmup']} to warm up, {how['clock']} clock; medians"
    lines = [
        f"{shape['model']}, a layer, both passes: {shape['tokens']:,} tokens of {shape['hidden_size']}, {layer}",
        f"{taken}, ratio to {how['base']} with its 95 % interval; {protocol.told(found['environment'])}",
    ]
    for routing, figures in found["routings"].items():
        lines.append(
            f"{routing}: largest load {figures['largest_load_over_mean']:.2f} of the mean; in tiles of 128 rows "
            f"{figures['tile_padding']:.3f} rows are computed for each"
        )
        for name, arm in figures["arms"].items():
            ratio = arm["against_base"]
            lines.append(
                f"  {name:<24} {1000 * arm['seconds']:9.2f} ms  {protocol.shown(ratio, how['blocks'])}  "
                f"{arm['flops_per_second'] / 1e12:7.3f} TF/s, "
                f"{arm['kept_bytes_per_token'] / 1024:7.1f} KiB kept a token"
            )
    lines += [f"  {name:<24} not measured: {reason}" for name, reason in found["missing"].items()]
    return "\n".join(lines)
