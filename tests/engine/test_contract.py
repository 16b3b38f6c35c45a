"""The contract of an engine, checked for each engine: what the loop, saving, probe, audit and resume rely on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kha_train import build_decoder, compose, distributed, open_stream
from kha_train.data.rows.batch import Batch
from kha_train.engine import deepspeed, plain
from kha_train.engine.audit import audit
from kha_train.engine.contract import Engine, seeded
from kha_train.engine.default import engine_for
from kha_train.errors import ConfigError, CorruptionError
from kha_train.model.host import inputs_of
from kha_train.train.resume import pieces
from kha_train.train.step import next_batch, train_step
from kha_train.variants.registry import engines

ENGINES = {f"zero{stage}": ("deepspeed", stage) for stage in (1, 2, 3)} | {
    name: (name, 1) for name in engines() if name != "deepspeed"
}
"""Every engine there is: one that is added is asked too."""
INTERACTION = "attention.interaction"
ARMS = {
    "a matrix a head": ["attention=kha_mlp", f"{INTERACTION}.share=none"],
    "frozen": ["attention=kha_linear", f"{INTERACTION}.train=false", f"{INTERACTION}.init.kind=random_orthogonal"],
    "fewer components": ["attention=mea", "model.kv_heads=4", f"{INTERACTION}.component_heads=2"],
    "values of a tied state": ["attention=gta", "interaction@attention.interaction=knocking_mlp",
                               f"{INTERACTION}.value_only=true"],
    **{name: [f"attention={name}"] for name in ("linear", "diff", "gated", "gated_headwise")},
}  # fmt: skip
"""Parameters of other shapes and buffers than `TRAINING` has."""
TRAINING = ["engine.device=cpu", "attention=kha_mlp", "data.global_batch_size=4", "engine.micro_batch_size=2"]


@contextmanager
def opened(name: str, overrides: list[str], initial: Any = seeded) -> Iterator[Engine]:
    """An engine that is closed, and its process group left, at the end."""
    chosen, stage = ENGINES[name]
    config = compose([*overrides, f"engine.name={chosen}", f"engine.zero_stage={stage}"])
    kind = engine_for(config, 1)
    world = distributed.start("cpu", 60)
    try:
        engine: Engine = kind(config, world, initial)
        yield engine
        engine.close()
    finally:
        kind.leave_world()


@pytest.fixture
def overrides(small: list[str]) -> list[str]:
    """A small model with an interaction, two micro-batches a step."""
    return [*small, *TRAINING]


def batches(engine: Engine, count: int) -> list[tuple[Batch, int]]:
    """The first batches of the run, with their labels."""
    stream = open_stream(engine.config)
    return [next_batch(stream, engine.world) for _ in range(count)]


def accumulate(engine: Engine, batch: Batch, labels: int, scale: float = 1.0) -> None:
    """All micro-batches of a step, and no step."""
    parts = list(batch.micro_batches(engine.config.engine.micro_batch_size))
    for number, part in enumerate(parts, start=1):
        engine.accumulate(part, scale / labels, 0.0, last=number == len(parts))


def state(engine: Engine) -> dict[str, Tensor]:
    """A copy of all that a step may change."""
    views = {f"{part.name} {kind}": view.clone() for part in engine.fragments() for kind, view in part.views.items()}
    buffers = {name: buffer.clone() for name, buffer in engine.buffers().items()}
    weights = {f"{name} held": weight.detach().clone() for name, weight in engine.held_weights().items()}
    return {**views, **buffers, **weights, "steps": torch.tensor(engine.optimizer_steps)}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_the_name_selects_the_engine_and_runs_use_deepspeed_unless_told_otherwise(overrides: list[str]) -> None:
    assert engine_for(compose(overrides), 2) is deepspeed.Engine
    assert engine_for(compose([*overrides, "engine.name=plain"]), 1) is plain.Engine
    with pytest.raises(ConfigError) as unknown:
        compose([*overrides, "engine.name=plane"])
    assert unknown.value.field == "engine.name" and "plain" in str(unknown.value)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_keeps_its_contract(name: str, overrides: list[str]) -> None:
    """One engine for several promises, for each costs a second to build."""
    with opened(name, overrides) as engine:
        (first, labels), (second, more) = batches(engine, 2)
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in build_decoder(engine.config).named_parameters()}
        assert dict(engine.shapes) == expected
        assert list(engine.held_weights()) == list(expected)
        sizes = {part.name: part.views["master"].numel() for part in engine.fragments()}
        assert sizes == {key: math.prod(shape) for key, shape in expected.items()}
        for part in engine.fragments():
            master = part.flat.detach().narrow(0, part.offset, part.views["master"].numel())
            assert part.views["master"].data_ptr() == master.data_ptr() and part.shape == expected[part.name]

        untouched = state(engine)
        evaluated = engine.evaluate(next(first.micro_batches(2)))
        again = engine.evaluate(next(first.micro_batches(2)))
        assert torch.equal(evaluated.loss_sum, again.loss_sum) and not evaluated.loss_sum.requires_grad
        part = next(first.micro_batches(2))
        tokens = engine.evaluate(part, by_token=True).tokens
        inputs = inputs_of(part, engine.world.device)._replace(labels_BT=None)
        logits_BTV = build_decoder(engine.config)(*inputs).logits_BTV.detach()
        nats_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), part.labels_BT, reduction="none")
        assert torch.allclose(tokens.nats, nats_BT, atol=1e-5)
        assert torch.equal(tokens.hits, logits_BTV.argmax(-1) == part.labels_BT)
        assert tokens.nats.sum().item() == pytest.approx(evaluated.loss_sum.item(), rel=1e-5)
        assert differing(untouched, state(engine)) == []

        accumulate(engine, first, labels)
        norms = engine.gradient_norms()
        assert norms.keys() == {"outside layers", "blocks.0", "blocks.1", "vectors"}
        assert math.hypot(*norms.values()) == pytest.approx(engine.gradient_norm.item(), rel=1e-5)
        owned = dict(engine.gradients())
        assert {key: part.numel() for key, part in owned.items()} == sizes
        assert math.hypot(*(part.double().norm().item() for part in owned.values())) == pytest.approx(
            engine.gradient_norm.item(), rel=1e-5
        )
        audit(engine, "the same")
        assert differing(untouched, state(engine)) == []
        changes: dict[str, Tensor] = {}
        engine.apply(1e-3, changed=lambda key, change: changes.update({key: change.clone()}))
        for part in engine.fragments():
            moved = part.views["master"] - untouched[f"{part.name} master"]
            assert torch.equal(changes.pop(part.name), moved) and moved.any()
        assert not changes
        assert engine.optimizer_steps == 1
        moved = differing(untouched, state(engine))
        assert {f"{key} {kind}" for key in expected for kind in ("master", "exp_avg", "exp_avg_sq", "held")} <= {*moved}

        accumulate(engine, second, more, scale=math.nan)
        assert engine.gradient_norm.item() == math.inf and set(engine.gradient_norms().values()) == {math.inf}
        before = state(engine)
        engine.discard()
        assert differing(before, state(engine)) == [] and engine.optimizer_steps == 1


@pytest.mark.parametrize("name", ENGINES)
def test_the_norm_and_the_clipped_step_are_those_of_torch(name: str, overrides: list[str]) -> None:
    """Against the decoder, autograd, `clip_grad_norm_` and AdamW of torch, at a limit that clips. With a small `eps`
    the first step of Adam is the sign of the gradient, which rounding may turn where it is almost zero."""
    clip = 0.05
    with opened(name, [*overrides, f"optim.grad_clip={clip}", "optim.weight_decay=0", "optim.eps=1e-3"]) as engine:
        (batch, labels), *_ = batches(engine, 1)
        decoder, optim = build_decoder(engine.config), engine.config.optim
        adamw = torch.optim.AdamW(decoder.parameters(), lr=1e-3, betas=optim.betas, eps=optim.eps, weight_decay=0.0)
        whole = decoder(batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen)
        (whole.loss_sum / labels).backward()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), clip)
        adamw.step()
        accumulate(engine, batch, labels)
        assert norm > clip and engine.gradient_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        engine.apply(1e-3)
        expected = {key: value.detach().flatten() for key, value in decoder.named_parameters()}
        for part in engine.fragments():
            assert torch.allclose(part.views["master"], expected[part.name], atol=2e-6)
            moment = adamw.state[decoder.get_parameter(part.name)]["exp_avg"].flatten()
            assert torch.allclose(part.views["exp_avg"], moment, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("name", ENGINES)
def test_a_callers_tighter_limit_scales_the_gradient_and_a_wider_one_does_not(name: str, overrides: list[str]) -> None:
    """The first moment after one step is (1 - beta) times the gradient that was applied."""
    applied = []
    for limit in (0.01, math.inf):
        with opened(name, [*overrides, "optim.grad_clip=0.05"]) as engine:
            (batch, labels), *_ = batches(engine, 1)
            accumulate(engine, batch, labels)
            engine.apply(1e-3, limit)
            squares = sum(float(part.views["exp_avg"].double().square().sum()) for part in engine.fragments())
            applied.append(math.sqrt(squares) / (1 - engine.config.optim.betas[0]))
    assert applied == pytest.approx([0.01, 0.05], rel=1e-4)


def gone_on(name: str, overrides: list[str]) -> list[float]:
    """The losses of two steps after one that was taken and one that was discarded, which a restored engine repeats."""
    with opened(name, overrides) as engine:
        first, refused, second, third = batches(engine, 4)
        train_step(engine, *first, 1e-2)
        accumulate(engine, *refused)
        engine.discard()
        saved = {(piece.name, piece.kind, piece.start): piece.values.clone() for piece in pieces(engine)}
        buffers = {key: buffer.clone() for key, buffer in engine.buffers().items()}
        expected = [train_step(engine, *batch, 1e-2).loss for batch in (second, third)], state(engine)
    with opened(name, overrides, lambda key, default: torch.zeros_like(default())) as engine:
        with torch.no_grad():
            for part in engine.fragments():
                for kind, view in part.views.items():
                    view.copy_(saved[part.name, kind, part.start])
            for key, buffer in engine.buffers().items():
                buffer.copy_(buffers[key])
        engine.optimizer_steps = 1
        engine.refresh_parameters()
        found = [train_step(engine, *batch, 1e-2).loss for batch in (second, third)]
        assert found == expected[0] and differing(expected[1], state(engine)) == []
    return found


@pytest.mark.parametrize("name", ENGINES)
def test_a_discarded_step_was_never_seen_and_what_is_restored_continues_bit_for_bit(
    name: str, overrides: list[str]
) -> None:
    gone_on(name, overrides)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_every_stage_takes_the_steps_of_the_plain_engine_and_continues_bit_for_bit(
    arm: str, overrides: list[str]
) -> None:
    settings = [*overrides, *ARMS[arm], "model.layers=1", "model.hidden_size=32", "model.head_dim=16"]
    expected = gone_on("plain", settings)
    for stage in (1, 2, 3):
        assert gone_on(f"zero{stage}", settings) == pytest.approx(expected, rel=1e-5), stage


@pytest.mark.parametrize("name", ENGINES)
def test_the_audit_finds_a_weight_that_is_not_its_master(name: str, overrides: list[str]) -> None:
    with opened(name, overrides) as engine:
        weight = engine.held_weights()["blocks.1.attention.query.weight"]
        with torch.no_grad():
            weight.view(-1)[3] += 1
        with pytest.raises(CorruptionError, match=r"its copy of blocks\.1\.attention\.query\.weight"):
            audit(engine, "the same")


def test_the_plain_engine_refuses_more_than_one_process(overrides: list[str]) -> None:
    config = compose([*overrides, "engine.name=plain"])
    with pytest.raises(ConfigError, match="one process, not 2") as refused:
        engine_for(config, 2)
    assert refused.value.field == "engine.name" and refused.value.exit_code == 2


@pytest.mark.parametrize("tied", [True, False])
def test_zero_3_keeps_an_embedding_gathered_to_the_head_only_where_they_share_it(
    tied: bool, overrides: list[str]
) -> None:
    # DeepSpeed shards what has more than 100,000 elements: here 256 x 512.
    large = ["model.layers=1", "model.hidden_size=512", "attention=gqa", f"model.tie_embeddings={str(tied).lower()}"]
    with opened("zero3", [*overrides, *large]) as engine:
        ((batch, labels),) = batches(engine, 1)
        accumulate(engine, batch, labels)
        # A parameter that a module reads outside its owner's forward is gathered as long as that module runs.
        assert len(engine.decoder._external_params) == tied
