"""Initial values, the order of the data and the routing warm-up have a seed each; `run.seed` stands in for the last two
where they are null."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kha_train import build_decoder, compose, open_stream
from kha_train.config.build import to_plain
from kha_train.config.compose import from_plain
from kha_train.config.saved import completed

WARM = "moe.routing_warmup_steps=10"


def weights(overrides: list[str]) -> list[Any]:
    """The initial weights."""
    return [value.tolist() for value in build_decoder(compose(overrides)).parameters()]


def order(overrides: list[str]) -> list[Any]:
    """The tokens of the first two steps."""
    stream = open_stream(compose(overrides))
    return [next(stream).tokens_BT.tolist() for _ in range(2)]


def noise(overrides: list[str]) -> list[Any]:
    """What a router with all weights zero chooses, where chance decides alone."""
    decoder = build_decoder(compose([*overrides, WARM]))
    router = decoder.routers()[0]
    with torch.no_grad():
        router.weight.copy_(torch.linspace(-1, 1, router.weight.numel()).view_as(router.weight))
    x_ND = torch.linspace(-1, 1, 16 * router.weight.shape[1]).view(16, -1)
    return router(x_ND).expert_NJ.tolist()


PARTS = {"run.seed": weights, "data.seed": order, "moe.routing_seed": noise}


@pytest.mark.parametrize("seed", PARTS)
def test_each_seed_moves_its_own_part_and_no_other(small: list[str], seed: str) -> None:
    fixed = [*small, "run.seed=0", "data.seed=0", "moe.routing_seed=0"]
    for owner, part in PARTS.items():
        assert (part(fixed) != part([*fixed, f"{seed}=1"])) == (owner == seed), owner


@pytest.mark.parametrize("seed", ["data.seed", "moe.routing_seed"])
def test_a_seed_that_is_null_is_run_seed(small: list[str], seed: str) -> None:
    part = PARTS[seed]
    assert part([*small, "run.seed=5"]) == part([*small, f"{seed}=5"]) != part(small)
    assert part([*small, "run.seed=5", f"{seed}=null"]) == part([*small, f"{seed}=5"])


def test_mixture_and_order_follow_the_seed_of_the_data(small: list[str], dataset: Any) -> None:
    sources = ", ".join(f"{{name: {name}, path: {dataset}/train, weight: {weight}}}" for name, weight in ("a1", "b2"))
    mixed = [*small, "data.train=''", f"data.sources=[{sources}]"]
    dealt = {}
    for name, more in {"run": ["run.seed=7"], "data": ["data.seed=7"], "none": []}.items():
        samples = open_stream(compose([*mixed, *more])).samples
        dealt[name] = samples.mixture.samples(0, 64)[0].tolist()
    assert dealt["run"] == dealt["data"] != dealt["none"]


def test_a_configuration_saved_before_the_seeds_parted_counts_as_run_seed() -> None:
    plain = to_plain(compose(["run.seed=6"]))
    del plain["data"]["seed"], plain["moe"]["routing_seed"]
    config = from_plain(completed(plain))
    assert (config.data_seed, config.routing_seed) == (6, 6)
