"""`engine.kernels=auto` on CUDA: decides for each part, when a run starts, between torch and a Triton kernel.

A kernel is first compared with torch, forward and backward, at the shape of a micro-batch. It is selected if it agrees
and is faster; torch computes every other part.
"""

# B batch   T tokens   D model width   H heads   K head width   N = B * T   E experts   J experts per token

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kha_train.config.resolve import Resolved, decide, triton_problem
from kha_train.config.schema import RunConfig
from kha_train.distributed import Caught, World
from kha_train.model.attention.backends import lay_out_documents
from kha_train.model.attention.base import RowContext, build_attention
from kha_train.model.attention.choice import CHECK_TOLERANCE
from kha_train.model.attention.measured import Timer, cuda_seconds
from kha_train.model.decoder import build_rotary_table
from kha_train.model.device import DTYPES, device_facts
from kha_train.model.init import reset_buffers
from kha_train.model.moe.experts import Experts
from kha_train.model.moe.router import Routing

PARTS = {
    "interaction": "interaction of heads",
    "norm": "norm and rotation",
    "expert_kernels": "permute, SwiGLU and combine",
}
"""The fields of `Resolved` that have kernels, and what these compute."""

Kernels = Mapping[str, str]
"""What computes a part, by its name in `PARTS`."""


class Answer(NamedTuple):
    """What was selected for each part that has a kernel here, the measurements in words ("" for none), and the parts
    whose kernel failed.
    """

    selected: Kernels
    told: str
    failed: frozenset[str] = frozenset()


def kernels_of(resolved: Resolved) -> Kernels:
    """What `resolved` selects for each part."""
    return {part: getattr(resolved, part).name for part in PARTS}


def as_text(kernels: Kernels) -> str:
    """One line, such as `interaction=folded norm=triton`, for the record and for a broadcast."""
    return " ".join(f"{part}={name}" for part, name in kernels.items())


def from_text(text: str) -> Kernels:
    """The inverse of `as_text`; words that name no part are ignored."""
    words = (word.partition("=") for word in text.split())
    return {part: name for part, _, name in words if part in PARTS}


def candidates(config: RunConfig, resolved: Resolved, device: torch.device) -> dict[str, Resolved]:
    """The parts that a Triton kernel can compute here, each with the resolution in which one computes it. Empty unless
    `engine.kernels=auto`, and with `engine.compile`, whose graphs fuse these operations themselves.
    """
    if config.engine.kernels != "auto" or config.engine.compile != "none":
        return {}
    facts = device_facts(device)
    if triton_problem(facts, resolved.precision):
        return {}
    kernels = decide(replace(config, engine=replace(config.engine, kernels="triton")), facts)
    return {
        part: resolved._replace(**{part: getattr(kernels, part)})
        for part in PARTS
        if getattr(kernels, part).name == "triton" != getattr(resolved, part).name
        and (part != "expert_kernels" or config.moe.dense_layers < config.model.layers)
    }


def measure_kernels(config: RunConfig, resolved: Resolved, device: torch.device, earlier: Kernels) -> Answer:
    """What computes each part on this rank's device. A part of `earlier` keeps its choice if that still works, so that
    a resumed run computes the same numbers. Without CUDA nothing is measured.
    """
    kernels = candidates(config, resolved, device) if device.type == "cuda" else {}
    answer = fastest_kernels(config, resolved, kernels, device, cuda_seconds, earlier)
    if kernels:
        # What was measured leaves no memory behind in the allocator.
        torch.cuda.empty_cache()
    return answer


def agreed_kernels(answer: Answer, resolved: Resolved, world: World) -> Answer:
    """The answer of the first rank, on every rank, without the kernels that failed on any. Every rank calls it."""
    failed = world.max_ints(*(int(part in answer.failed) for part in PARTS))
    plain, selected = kernels_of(resolved), dict(from_text(world.broadcast_text(as_text(answer.selected))))
    told = [answer.told] if answer.told else []
    for part, anywhere in zip(PARTS, failed, strict=True):
        if anywhere and selected.get(part) == "triton":
            selected[part] = plain[part]
            told.append(f"{PARTS[part]} {plain[part]}, because the kernel failed on another rank")
    return answer._replace(selected=selected, told="; ".join(told))


def with_kernels(config: RunConfig, resolved: Resolved, selected: Kernels, device: torch.device) -> Resolved:
    """`resolved` with a Triton kernel for every part for which it is `selected`, on any rank."""
    facts = device_facts(device)
    kernels = decide(replace(config, engine=replace(config.engine, kernels="triton")), facts)
    for part, name in selected.items():
        if name == "triton":
            choice = getattr(kernels, part)._replace(why="measured, see below")
        else:
            choice = getattr(resolved, part)._replace(why="measured, see below")
        resolved = resolved._replace(**{part: choice})
    return resolved


def fastest_kernels(
    config: RunConfig,
    resolved: Resolved,
    kernels: Mapping[str, Resolved],
    device: torch.device,
    seconds: Timer,
    earlier: Kernels,
) -> Answer:
    """Compare and time each part of `kernels` against `resolved`. A kernel that disagrees with torch, or fails in any
    way, is not selected.
    """
    selected: dict[str, str] = {}
    told: list[str] = []
    failed: set[str] = set()
    for part, with_kernel in kernels.items():
        plain = getattr(resolved, part).name
        # A compiler or a device may raise any error.
        with Caught() as caught:
            ours, theirs = (_run_of(part, config, way, device) for way in (with_kernel, resolved))
            _compare(PARTS[part], ours(), theirs())
            taken = {"triton": seconds(_unread(ours), device), plain: seconds(_unread(theirs), device)}
        if caught.error:
            selected[part] = plain
            failed.add(part)
            first, *_ = str(caught.error).splitlines() or [""]
            told.append(f"{PARTS[part]} {plain}, because the kernel failed: {type(caught.error).__name__}: {first}")
            continue
        order = sorted(taken, key=lambda one: taken[one])
        selected[part] = order[0] if part not in earlier else "triton" if earlier[part] == "triton" else plain
        times = ", ".join(f"{one} {1000 * taken[one]:.2f} ms" for one in order)
        told.append(f"{PARTS[part]} {selected[part]} ({times}{'; the run began with it' if part in earlier else ''})")
    words = f"kernels measured, forward and backward of a layer: {'; '.join(told)}" if told else ""
    return Answer(selected, words, frozenset(failed))


Run = Callable[[], list[Tensor]]
"""Computes the output of a part and the gradients of everything it reads."""


def _run_of(part: str, config: RunConfig, resolved: Resolved, device: torch.device) -> Run:
    """The part alone at the shape of a micro-batch, with random weights and inputs that depend on nothing else."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[resolved.precision]
    # Ranks that share rows have a part of the tokens each.
    tokens = config.model.seq_len // config.engine.context_parallel
    rows, width = config.engine.micro_batch_size, config.model.hidden_size
    experts = part == "expert_kernels"
    with torch.device("meta"):
        module = Experts(config, resolved) if experts else build_attention(config, resolved, _layer(config))
    module.to_empty(device=device)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator, device=device) * config.model.init_std
        # Gains are near 1.
        parameter.data = (values + float(parameter.dim() == 1)).to(dtype)
    reset_buffers(module, config.run.seed, device)
    x_BTD = torch.randn(rows, tokens, width, generator=generator, device=device).to(dtype).requires_grad_()
    if experts:
        routing = _routing(config, rows * tokens, device, generator)
        return _differentiated(module, lambda: module(x_BTD.flatten(0, 1), routing), [x_BTD, routing.weight_NJ])
    context = _rows(config, rows, tokens, device)
    return _differentiated(module, lambda: module(x_BTD, context), [x_BTD])


def _layer(config: RunConfig) -> int:
    """A layer with the interaction, where some layers have none."""
    names = [options.name for options in config.interactions]
    wanted = config.attention.interaction.name
    return names.index(wanted) if wanted in names else 0


def _rows(config: RunConfig, rows: int, tokens: int, device: torch.device) -> RowContext:
    rotary = build_rotary_table(config)
    if rotary is not None:
        reset_buffers(rotary, device=device)
    positions_BT = torch.arange(tokens, device=device).expand(rows, tokens)
    return RowContext(rotary(positions_BT) if rotary else None, lay_out_documents(rows, tokens, device))


def _routing(config: RunConfig, tokens: int, device: torch.device, generator: torch.Generator) -> Routing:
    """Random experts for every token."""
    moe = config.moe
    score_NE = torch.rand(tokens, moe.experts, generator=generator, device=device)
    weight_NJ, expert_NJ = score_NE.topk(moe.top_k)
    load_E = torch.bincount(expert_NJ.flatten(), minlength=moe.experts)
    return Routing(expert_NJ, weight_NJ.requires_grad_(), load_E)


def _differentiated(module: nn.Module, forward: Callable[[], Tensor], inputs: list[Tensor]) -> Run:
    read = [*inputs, *module.parameters()]

    def run() -> list[Tensor]:
        out = forward()
        # Parameters of a part that this configuration does not use have no gradient.
        found = torch.autograd.grad(out.float().square().mean(), read, allow_unused=True)
        return [out.detach(), *(gradient for gradient in found if gradient is not None)]

    return run


def _unread(run: Run) -> Callable[[], None]:
    def timed() -> None:
        run()

    return timed


def _compare(part: str, found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected), "both ways have the same parameters"
    for ours, theirs in zip(found, expected, strict=True):
        difference, size = (ours.float() - theirs.float()).norm().item(), theirs.float().norm().item()
        if not difference <= CHECK_TOLERANCE * size:
            raise ArithmeticError(f"{part}: off by {difference / size if size else difference:.2g}, relative to torch")
