"""Accepted configurations train, and the plan accepts what the trainer accepts: random configurations at tiny size."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

from data_tools.synthetic import write_dataset
from kha_train import compose
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError, KhaError
from kha_train.estimate.plan import make_plan
from kha_train.record import read_metrics
from kha_train.train.run import train

ATTENTION = (
    *("gqa", "gqa", "mha", "mqa", "gta", "mla", "talking_heads", "diff", "linear", "gated"),
    *("kha_linear", "kha_mlp", "kha_gate", "mea"),
)
INTERACTIONS = ("none", "knocking_linear", "knocking_mlp", "knocking_gate", "explicit")
MOST_REFUSED = 0.2
PER_PART = 250


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 64 ids."""
    directory = tmp_path_factory.mktemp("tiny")
    write_dataset(directory, vocab_size=64, documents=60, seed=0, max_length=128)
    return directory


def seldom(usual: Any, *others: Any) -> tuple[Any, ...]:
    """Choices of which one in twenty is not `usual`."""
    return (usual,) * 19 * len(others) + others


SETTINGS: dict[str, tuple[Any, ...]] = {
    "run.seed": (0, 1, 150_000_000_000_000, 2**63 - 1),
    "model.layers": (1, 2),
    "model.hidden_size": (16, 24, 32),
    "model.head_dim": (8, 12, 16),
    "model.seq_len": (1, 2, 17, 32, 64),
    "model.vocab_size": seldom(64, 128),
    "model.tie_embeddings": (False, True),
    "model.partial_rotary_factor": seldom(1.0, 0.5, 0.25),
    "model.loss_chunk_tokens": (1, 7, 1000, 2**60),
    "model.norm_eps": seldom(1e-6, 1e-30, 1.0),
    "model.scale_residual_init": (False, True),
    "attention.qk_norm": seldom("per_head", "full_width", "none"),
    "attention.positions": seldom("rope", "alibi", "learned", "none"),
    "attention.backend": seldom("auto", "sdpa", "eager", "varlen", "flash_attn", "cudnn"),
    "moe.expert_width": (8, 16),
    "moe.backend": seldom("grouped", "loop", "loop", "megablocks"),
    "moe.shared_experts": (0, 1),
    "moe.score": ("sigmoid", "softmax"),
    "moe.renormalize": (False, True),
    "moe.bias_update": ("rms", "sign", "sign_zero_mean"),
    "moe.auxiliary_loss.weight": (0.0, 0.01),
    "moe.auxiliary_loss.scope": ("sequence", "previous_step", "micro_batch"),
    "moe.z_loss_weight": (0.0, 0.001),
    "moe.routing_warmup_steps": (0, 1, 3),
    "data.isolate_documents": (False, True),
    "data.packing": seldom("concat", "best_fit"),
    "data.shuffle": ("global", "block"),
    "data.reader": ("pread", "memory_map"),
    "data.prefetch": (0, 1, 2),
    "optim.lr": (1e-30, 1e-3, 0.01),
    "optim.betas": ("[0.9,0.95]", "[0.0,0.0]", "[0.9,0.999]"),
    "optim.eps": (1e-8, 1e-30),
    "optim.weight_decay": (0.0, 0.1),
    "optim.grad_clip": (1e-6, 1.0, 1e30),
    "optim.schedule.name": ("cosine", "wsd"),
    "optim.schedule.warmup": (0.0, 0.5, 1.0),
    "optim.schedule.decay": (0.0, 0.5),
    "engine.zero_stage": (1, 2, 3),
    "engine.device": seldom("auto", "cpu"),
    "engine.precision": ("auto", "fp32", "bf16"),
    "engine.grad_accum_dtype": seldom("fp32", "bf16"),
    "engine.moment_dtype": seldom("fp32", "bf16"),
    "engine.kernels": seldom("auto", "torch", "triton"),
    "engine.activation_checkpointing": ("none", "selective", "full"),
    "engine.reduce_bucket_elements": (1, 7, 1000, 50_000_001),
    "engine.hpz_partition_size": seldom(1, 2),
    "engine.expert_parallel": seldom(1, 2),
    "engine.audit_every": (0, 1, 2),
    "engine.hang_timeout_seconds": (600.0, 1e9),
    "engine.collective_timeout_seconds": (600.0, 1e9),
    "checkpoint.every_steps": (1, 2, 2**62),
    "checkpoint.keep_last": (1, 2**62),
    "checkpoint.background": (False, True),
    "validation.every_steps": (0, 1, 2),
    "validation.rows": (1, 3, 5),
    "stability.policy": ("observe", "skip", "rewind", "abort"),
    "stability.zclip": (False, True),
    "stability.probe_every": (0, 1, 2),
}


def configuration(number: int) -> tuple[str, ...]:
    """The overrides of a tiny run, a function of `number`; settings that depend on each other are drawn together."""
    rng = random.Random(number)
    drawn = {key: rng.choice(values) for key, values in SETTINGS.items()}
    drawn["model.query_heads"] = heads = rng.choice((1, 2, 4))
    drawn["model.kv_heads"] = rng.choice([count for count in (1, 2, 4) if heads % count == 0])
    drawn["moe.dense_layers"] = dense = rng.choice(seldom(0, 1, drawn["model.layers"]))
    if dense:
        drawn["moe.dense_width"] = 16
    if dense >= drawn["model.layers"]:
        drawn |= {"moe.experts": 0, "moe.top_k": 0, "moe.expert_width": 0, "moe.shared_experts": 0}
    else:
        drawn["moe.experts"] = experts = rng.choice((1, 2, 4, 6))
        drawn["moe.top_k"] = rng.randint(1, min(experts, 3))
        if experts in (4, 6) and rng.random() < 0.5:
            drawn |= {"moe.expert_groups": 2, "moe.top_groups": 2}
    drawn["engine.micro_batch_size"] = micro = rng.randint(1, 3)
    drawn["data.global_batch_size"] = rng.choice(seldom(2 * micro, micro, 3 * micro, 2 * micro + 1))
    attention = rng.choice(ATTENTION)
    overrides = [f"attention={attention}"]
    if rng.random() < 0.2:
        overrides.append(f"interaction@attention.interaction={rng.choice(INTERACTIONS)}")
    if attention == "mla":
        overrides += ["attention.base.latent_width=16", "attention.base.rotary_dim=8", "attention.qk_norm=none"]
        del drawn["attention.qk_norm"]
    return (*overrides, *(f"{key}={str(value).lower()}" for key, value in drawn.items()))


def composed(overrides: tuple[str, ...], data: Path, run_dir: Path) -> RunConfig | None:
    """The configuration, two steps on `data` planned for one CPU; None when it is refused."""
    fixed = [
        f"data.train={data}/train",
        f"data.validation={data}/validation",
        "cluster=cpu",
        "cluster.devices=1",
        "cluster.devices_per_node=1",
        "run.steps=2",
        f"run.dir={run_dir}",
        "telemetry.wandb.mode=disabled",
        "telemetry.peak_tflops=0.1",
        "telemetry.console=quiet",
    ]
    try:
        return compose([*fixed, *overrides])
    except ConfigError:
        return None


def outcome_of_training(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> str:
    """`trained` when all steps are in the record, else the words of a refusal before the first of them."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    try:
        assert train(config).finished
    except KhaError as error:
        assert error.exit_code == 2 and not list(read_metrics(Path(config.run.dir))), error
        return str(error)
    assert [line["step"] for line in read_metrics(Path(config.run.dir))] == [1, 2]
    return "trained"


def check(count: int, first: int, tiny: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """Judge `count` random configurations by the plan and by training; answers how many the trainer accepted."""
    accepted: Counter[bool] = Counter()

    @seed(first)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**63).map(configuration))
    def judge(overrides: tuple[str, ...]) -> None:
        config = composed(overrides, tiny, folder / "run")
        assume(config is not None)
        try:
            planned = make_plan(config).accepted
        except ConfigError:
            planned = False
        trained = outcome_of_training(config, monkeypatch)
        shutil.rmtree(folder / "run", ignore_errors=True)
        assert planned == (trained == "trained"), trained
        accepted[trained == "trained"] += 1

    judge()
    return accepted


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_what_is_accepted_trains_two_steps_and_the_plan_says_so_before(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted = check(40, 0, tiny, tmp_path, monkeypatch)
    assert accepted.total() >= 40 and accepted[False] <= MOST_REFUSED * accepted.total()


@pytest.mark.soak
@pytest.mark.parametrize("part", range(3000 // PER_PART))
def test_three_thousand_configurations_train_as_planned(
    part: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted = check(PER_PART, 1 + part, tiny, tmp_path, monkeypatch)
    assert accepted.total() >= PER_PART and accepted[False] <= MOST_REFUSED * accepted.total()
