"""Ranks that share rows take the same steps as ranks with rows of their own: losses, auxiliary losses, gradients and
norms of every base that ends in a softmax, with documents across the cuts and with padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train import compose
from kha_train.errors import ConfigError
from kha_train.estimate.context import exchanged

WORKER = Path(__file__).with_name("context_worker.py")
NARROW = ("model.head_dim=16", "data.global_batch_size=8", "engine.micro_batch_size=4", "moe.expert_width=32")
EXACT = ("moe.backend=loop",)
"""Experts that compute in fp64, too."""
BALANCED = ("moe.auxiliary_loss.weight=0.1", "moe.z_loss_weight=0.01")
WARM = ("moe.routing_warmup_steps=5",)
GRADIENTS: dict[str, tuple[str, ...]] = {
    "gqa": (*BALANCED, *WARM),
    "mqa, whose one key head is repeated": ("attention=mqa", "moe.auxiliary_loss.scope=micro_batch", *BALANCED),
    "key heads that are repeated twice": ("model.query_heads=12", "model.kv_heads=3", "attention.backend=eager"),
    "mha": ("attention=mha", "attention.positions=learned", "model.tie_embeddings=false"),
    "gta": ("attention=gta", "attention.qk_norm=none"),
    "mla": ("attention=mla", "attention.base.latent_width=32", "attention.base.rotary_dim=8"),
    "diff": ("attention=diff", "model.query_heads=8", "model.kv_heads=8"),
    "gated": ("attention=gated",),
    "kha_linear": ("attention=kha_linear", "attention.interaction.impl=eager"),
    "kha_mlp, folded": ("attention=kha_mlp", "attention.interaction.impl=folded"),
    "kha_gate": ("attention=kha_gate",),
    "mea": ("attention=mea", "attention.interaction.init.kind=random"),
    "biased scores": ("attention.positions=alibi",),
    "whole rows": ("data.isolate_documents=false", "moe.auxiliary_loss.scope=previous_step", *BALANCED),
    "padding": ("data.packing=best_fit", *BALANCED, *WARM),
}
STEPS: dict[str, tuple[str, ...]] = {
    "ZeRO 1, accumulated": ("engine=zero1", "attention=kha_mlp", *BALANCED, *WARM, "engine.micro_batch_size=2"),
    "ZeRO 2, padding, recomputed": (
        "engine=zero2", "data.packing=best_fit", "engine.activation_checkpointing=full", *BALANCED
    ),
    "ZeRO 3, recomputed in part": ("engine=zero3", "engine.activation_checkpointing=selective", "attention=mqa"),
    "ZeRO 2, experts shared too": (
        "engine=zero2", "engine.expert_parallel=2", "attention=kha_linear", "engine.micro_batch_size=2", *BALANCED
    ),
}  # fmt: skip


def asked(small: list[str], padded: list[str], cases: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """The overrides of each case, on rows with padding where it says so."""
    return {name: [*(padded if "padding" in name else small), *NARROW, *settings] for name, settings in cases.items()}


def differences(answer: dict[str, Any], overrides: dict[str, list[str]], sizes: tuple[int, ...]) -> list[Any]:
    """Where ranks that share rows differ from ranks that do not: in sums and gradients (fp64), in steps by more than
    1e-6 (fp32), and in bytes from the plan.
    """
    found: list[Any] = []
    for name, one in answer["gradients"].items():
        if one["apart"] > 1e-9 or one["sums"] != pytest.approx(one["expected"], rel=1e-9) or not one["loads"]:
            found.append((name, one))
        if "padding" not in name and not all(one["crossed"]):
            found.append((name, "no document across a cut"))
    for name, (whole, *shared) in answer["steps"].items():
        for size, one in zip(sizes, shared, strict=True):
            pairs = {key: (one[key], whole[key]) for key in ("loss", "norm", "auxiliary", "padding")}
            pairs |= {key: one[key] for key in ("logits", "evaluated")}
            found += [
                (name, size, key, mine, theirs)
                for key, (mine, theirs) in pairs.items()
                if flat(mine) != pytest.approx(flat(theirs), rel=1e-6)
            ]
            planned = f"engine.context_parallel={size}", f"cluster.devices={max(sizes)}", "engine.precision=fp32"
            own = compose([*overrides[name], *planned])
            if set(one["bytes"]) != {exchanged(own)["bytes_per_step"]}:
                found.append((name, size, one["bytes"], exchanged(own)))
    return found


def flat(values: Any) -> list[float]:
    """The numbers in nested lists; None counts as 0."""
    return [x for one in values for x in flat(one)] if isinstance(values, list) else [values or 0.0]


@pytest.mark.slow
def test_two_ranks_that_share_rows_compute_what_each_row_alone_gives(
    small: list[str], padded: list[str], run_ranks: Callable[..., list[Any]]
) -> None:
    steps = asked(small, padded, STEPS)
    exact = {name: [*settings, *EXACT] for name, settings in asked(small, padded, GRADIENTS).items()}
    answers = run_ranks(WORKER, 2, gradients=exact, steps=steps, sizes=[2], count=4)
    assert [differences(answer, steps, (2,)) for answer in answers] == [[], []]


@pytest.mark.soak
def test_four_ranks_share_rows_in_pairs_or_all_together(
    small: list[str], padded: list[str], run_ranks: Callable[..., list[Any]]
) -> None:
    steps = {name: [*settings, "data.global_batch_size=16"] for name, settings in asked(small, padded, STEPS).items()}
    exact = {name: [*settings, *EXACT] for name, settings in asked(small, padded, GRADIENTS).items()}
    answers = run_ranks(WORKER, 4, gradients=exact, steps=steps, sizes=[2, 4], count=4)
    assert [differences(answer, steps, (2, 4)) for answer in answers] == [[]] * 4


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("attention=talking_heads",), "mixes the scores of all heads"),
        (("attention=linear",), "keeps sums over earlier tokens"),
        (("model.query_heads=6",), "does not divide the 6 heads"),
        (("attention=diff", "model.kv_heads=4"), "does not divide the 2 heads, or pairs"),
        (("model.seq_len=62",), "does not divide the 62 tokens"),
        (("engine.compile=block",), "compiled blocks"),
    ],
)
def test_what_ranks_cannot_share_is_refused_with_settings_that_work(settings: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        compose([*settings, "engine.context_parallel=4"])
    for way in refused.value.typed_fixes:
        compose([*settings, "engine.context_parallel=4", *way.typed.split()])
