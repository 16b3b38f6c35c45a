"""What every attention variant costs at one shape, as a page: by the formulas of `kha plan`, beside the papers."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kha_train.analysis.study_page import table_lines
from kha_train.config.compose import compose, shipped
from kha_train.errors import ConfigError
from kha_train.estimate.counts import FlopCount, interaction_overhead
from kha_train.estimate.plan import make_plan

BASELINE = "gqa"
PAPER_LENGTH, PAPER_WIDTH, PAPER_HEADS = 2048, 1024, 32
"""The shape at which the KHA paper states its overhead (section 3.4): L, d and n of its equations 10 to 12."""


@dataclass(frozen=True)
class VariantCost:
    """A variant at the shape: parameters, forward operations per token and their share of a layer that the interaction
    adds (percent), cache in bytes per token and per row, and bytes of a rank. `refused` says why it cannot run there.
    """

    name: str
    parameters: int = 0
    active_parameters: int = 0
    forward_flops: int = 0
    interaction_share: float = 0.0
    cache_per_token: int = 0
    cache_per_row: int = 0
    rank_bytes: int = 0
    refused: str = ""


def variant_costs(overrides: Sequence[str]) -> list[VariantCost]:
    """The cost of every preset of attention under `overrides`, the baseline first.

    Raises ConfigError where the baseline itself cannot be composed.
    """
    names = sorted(file.stem for file in (shipped("configs") / "attention").glob("*.yaml"))
    ordered = [BASELINE, *(name for name in names if name != BASELINE)]
    return [_cost(name, overrides) for name in ordered]


def _cost(name: str, overrides: Sequence[str]) -> VariantCost:
    try:
        config = compose([*overrides, f"attention={name}"])
    except ConfigError as error:
        if name == BASELINE:
            raise
        return VariantCost(name, refused=f"{error.field}: {error.problem}")
    plan = make_plan(config)
    told = plan.to_dict()
    return VariantCost(
        name=name,
        parameters=plan.parameters.total,
        active_parameters=plan.parameters.active,
        forward_flops=plan.flops.forward,
        interaction_share=100 * plan.flops.by_component["interaction"] / _layers(plan.flops),
        cache_per_token=told["cache_bytes_per_token"],
        cache_per_row=told["cache_bytes_per_row"],
        rank_bytes=plan.memory.total,
    )


def _layers(flops: FlopCount) -> int:
    """Forward operations per token of all layers, without head and interaction."""
    return flops.forward - flops.by_component["head"] - flops.by_component["interaction"]


def paper_shares(length: int, width: int, heads: int) -> tuple[float, float]:
    """The KHA paper's own count, in percent of a layer and of its attention: attention 8 L d^2 + 4 L^2 d, feed-forward
    18 L d^2, and 6 L d^2 / n for KHA-MLP (equations 10 to 12). It counts a forward, attention without its causal half.
    """
    attention = 8 * length * width**2 + 4 * length**2 * width
    extra = 6 * length * width**2 / heads
    return 100 * extra / (attention + 18 * length * width**2), 100 * extra / attention


def costs_as_json(costs: Sequence[VariantCost]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(one) for one in costs]


def cost_page(overrides: Sequence[str], costs: Sequence[VariantCost]) -> str:
    """The page, which ends with a line break."""
    return "\n".join(_lines(overrides, costs)) + "\n"


def _lines(overrides: Sequence[str], costs: Sequence[VariantCost]) -> Iterator[str]:
    config = compose([*overrides, f"attention={BASELINE}"])
    model, base = config.model, costs[0]
    yield "# What each attention variant costs\n"
    yield (
        f"`{model.name}` on rows of {model.seq_len:,} tokens, a rank of {config.cluster.name}. **Every column but the "
        "last is estimated**, by the formulas of [`kha plan`](plan.md), which tests hold to the real modules. **The "
        "last is to be measured**: no training step of this code has run on a GPU. The study `overhead` "
        "([studies.md](studies.md)) times steps. This page is made by\n"
    )
    yield f"```sh\nkha plan --variants {shlex.join(overrides)}\n```\n"
    head = ["attention", "parameters", "active", "forward, GFLOP a token", "interaction, % of a layer"]
    head += ["cache, bytes a token", "memory of a rank, GiB", "time of a step"]
    known = [one for one in costs if not one.refused]
    yield from table_lines(head, [_row(one, base) for one in known])
    yield "\nParameters and operations are also given as the difference to `gqa`. Matrix products alone are counted,"
    yield "causal attention once. An interaction is counted unfolded: a linear one folds into weights, and its share is"
    yield "then zero."
    yield from (f"`{one.name}` keeps {one.cache_per_row:,} bytes a row instead." for one in known if one.cache_per_row)
    yield from (f"\n`{one.name}` cannot run here. {one.refused}." for one in costs if one.refused)
    yield "\n## Beside the papers\n"
    layer, attention = paper_shares(PAPER_LENGTH, PAPER_WIDTH, PAPER_HEADS)
    shares = {one.name: one.interaction_share for one in known}
    added = interaction_overhead(compose([*overrides, "attention=kha_mlp"])).parameters
    paper = f"L {PAPER_LENGTH}, d {PAPER_WIDTH}, n {PAPER_HEADS}"
    yield from table_lines(
        ["figure", "printed", "estimated here", "how"],
        [
            [f"KHA-MLP of a layer, {paper}", "0.55 %", f"{layer:.3f} %", "the paper's formulas (KHA eq 10 to 12)"],
            [f"KHA-MLP of its attention, {paper}", "1.17 %", f"{attention:.3f} %", "the same"],
            ["KHA-MLP of a layer, this shape", "-", f"{shares['kha_mlp']:.3f} %", "our count, causal attention once"],
            ["KHA-Linear of a layer, this shape", "-", f"{shares['kha_linear']:.3f} %", "the same; 0 when folded"],
            ["KHA-MLP, parameters", "-", f"{added:.4f} %", "our count"],
        ],
    )
    yield "\nThe paper says that these are shares of training. Its formulas count a forward, and assume heads that are"
    yield "together as wide as the model. Here, attention is wider, so the share is counted from the shape itself."


def _row(one: VariantCost, base: VariantCost) -> list[str]:
    more, work = one.parameters - base.parameters, 100 * (one.forward_flops / base.forward_flops - 1)
    parameters, flops = f"{one.parameters:,}", f"{one.forward_flops / 1e9:.4f}"
    return [
        f"`{one.name}`",
        parameters if one is base else f"{parameters} ({more:+,})",
        f"{one.active_parameters:,}",
        flops if one is base else f"{flops} ({work:+.3f} %)",
        f"{one.interaction_share:.3f}" if one.interaction_share else "-",
        f"{one.cache_per_token:,}",
        f"{one.rank_bytes / 2**30:.2f}",
        "not measured",
    ]
