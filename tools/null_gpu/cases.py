"""The `kha` commands that the null device runs, by name, at tiny sizes; `{folder}` is where they write."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from kha_train.bench.gpu import stages

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STAGES, KERNELS = (1, 2, 3), ("torch", "triton")
RECOMPUTED = ("none", "selective", "full")
ATTENTION = tuple(sorted(path.stem for path in (CONFIGS / "attention").glob("*.yaml")))
MODELS = tuple(sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml")))

TINY = (
    *("model.vocab_size=256", "model.seq_len=64", "model.layers=2", "model.loss_chunk_tokens=64"),
    *("run.steps=3", "validation.every_steps=2", "validation.rows=8", "checkpoint.every_steps=2"),
    *("stability.probe_every=2", "telemetry.peak_tflops=1", "telemetry.console=lines", "telemetry.wandb.mode=disabled"),
    *("engine.device=cuda", "engine.micro_batch_size=2", "data.global_batch_size=4"),
)
NARROW = (*("model.hidden_size=64", "model.query_heads=4", "model.kv_heads=2", "model.head_dim=32"),)
"""Sizes with which a preset of a large model keeps its structure alone."""

SETTINGS = {
    "fp32": "engine.precision=fp32",
    "bf16 sums": "engine.grad_accum_dtype=bf16",
    "bf16 sums, ZeRO 2": "engine.grad_accum_dtype=bf16 engine.zero_stage=2",
    "bf16 sums, ZeRO 3": "engine.grad_accum_dtype=bf16 engine.zero_stage=3",
    "bf16 moments": "engine.grad_accum_dtype=bf16 engine.moment_dtype=bf16 engine.zero_stage=2",
    "bf16 moments, fp32 sums": "engine.moment_dtype=bf16",
    "one micro-batch": "data.global_batch_size=2",
    "untied head": "model.tie_embeddings=false",
    "untied head, ZeRO 3": "model.tie_embeddings=false engine.zero_stage=3",
    "alibi": "attention.positions=alibi",
    "alibi, eager": "attention.positions=alibi attention.backend=eager",
    "learned positions": "attention.positions=learned",
    "no positions": "attention.positions=none",
    "norm of full width": "attention.qk_norm=full_width",
    "no norm": "attention.qk_norm=none",
    "part of a head turned": "model.partial_rotary_factor=0.5",
    "whole rows": "data.isolate_documents=false",
    "whole rows, sdpa": "data.isolate_documents=false attention.backend=sdpa",
    "masked rows, sdpa": "attention.backend=sdpa",
    "eager": "attention.backend=eager",
    "varlen": "attention.backend=varlen",
    "padded rows": "data.packing=best_fit",
    "padded rows, selective": "data.packing=best_fit engine.activation_checkpointing=selective",
    "expert loop": "moe.backend=loop",
    "softmax router": "moe.score=softmax moe.routed_scaling=1.0",
    "shared expert": "moe.shared_experts=1",
    "dense first layer": "moe.dense_layers=1 moe.dense_width=128",
    "groups of experts": "moe.expert_groups=4 moe.top_groups=2",
    "loss of a row": "moe.auxiliary_loss.weight=0.01",
    "loss of the last step": "moe.auxiliary_loss.weight=0.01 moe.auxiliary_loss.scope=previous_step",
    "loss of a micro-batch": "moe.auxiliary_loss.weight=0.01 moe.auxiliary_loss.scope=micro_batch",
    "z-loss": "moe.z_loss_weight=0.001",
    "random routing at first": "moe.routing_warmup_steps=2",
    "signs of the bias": "moe.bias_update=sign_zero_mean",
    "statistics of layers": "telemetry.layer_statistics_every=1",
    "statistics of layers, ZeRO 3": "telemetry.layer_statistics_every=1 engine.zero_stage=3",
    "decay to the identity": "attention=kha_linear optim.interaction_decay=identity engine.zero_stage=2",
    "rates of interactions": "attention=kha_mlp optim.interaction_lr_scale=0.5 engine.zero_stage=3",
    "skip": "stability.policy=skip",
    "zclip": "stability.zclip=true",
    "rewind": "stability.policy=rewind",
    "profile": "profile.first_step=2 profile.last_step=3 profile.memory=true",
    "saved in the foreground": "checkpoint.background=false",
    "read ahead": "data.prefetch=2",
    "audited": "engine.audit_every=1",
    "small buckets": "engine.reduce_bucket_elements=1000 engine.zero_stage=2",
    "muP of experts eager": "attention=kha_mlp attention.interaction.impl=eager",
    "folded": "attention=kha_mlp attention.interaction.impl=folded",
    "frozen matrices": "attention=kha_linear attention.interaction.train=false engine.zero_stage=3",
    "plain engine": "engine.name=plain",
}
"""One setting at a time, on GQA unless it says otherwise."""
SHARED_EXPERTS, SHARED_ROWS = "engine.expert_parallel=2", "engine.context_parallel=2"
REFUSED = {("linear", "rows"), ("talking_heads", "rows")}
"""Attention that no ranks can share, by rule of the trainer."""
PAIRED = {"diff": ["model.kv_heads=4"]}
"""Attention whose heads are pairs, with enough of them for two ranks."""
OF_TWO_RANKS = {
    "two ranks, second shards": "engine.zero_stage=3 engine.hpz_partition_size=2",
    "two ranks, muon": "optim=muon",
    "shared experts, muon": f"{SHARED_EXPERTS} optim=muon engine.zero_stage=2",
    "shared experts, bf16 sums": f"{SHARED_EXPERTS} engine.grad_accum_dtype=bf16",
    "shared experts, fp32": f"{SHARED_EXPERTS} engine.precision=fp32",
    "shared experts, padded rows": f"{SHARED_EXPERTS} data.packing=best_fit",
    "shared experts, loop": f"{SHARED_EXPERTS} moe.backend=loop",
    "shared experts, shared expert": f"{SHARED_EXPERTS} moe.shared_experts=1",
    "shared experts, loss of a row": f"{SHARED_EXPERTS} moe.auxiliary_loss.weight=0.01",
    "shared experts, audited": f"{SHARED_EXPERTS} engine.audit_every=1 telemetry.layer_statistics_every=1",
    "shared experts, accumulated": f"{SHARED_EXPERTS} engine.micro_batch_size=1",
    "shared rows, ZeRO 2": f"{SHARED_ROWS} engine.zero_stage=2 attention=kha_mlp",
    "shared rows, ZeRO 3": f"{SHARED_ROWS} engine.zero_stage=3 attention=kha_mlp",
    "shared rows, triton": f"{SHARED_ROWS} engine.kernels=triton attention=kha_mlp",
    "shared rows, selective": f"{SHARED_ROWS} engine.activation_checkpointing=selective",
    "shared rows, full": f"{SHARED_ROWS} engine.activation_checkpointing=full",
    "shared rows, sdpa": f"{SHARED_ROWS} attention.backend=sdpa",
    "shared rows, padded": f"{SHARED_ROWS} data.packing=best_fit",
    "shared rows, loss of a row": f"{SHARED_ROWS} moe.auxiliary_loss.weight=0.01",
    "shared rows and experts": f"{SHARED_ROWS} {SHARED_EXPERTS}",
    "shared rows and experts, full": f"{SHARED_ROWS} {SHARED_EXPERTS} engine.activation_checkpointing=full",
}
"""One setting at a time on two processes, which share experts or rows where it says so."""
EVALUATED = ("gqa", "kha_mlp", "mea", "mla", "linear", "talking_heads")


def trainings() -> Iterator[tuple[str, list[str]]]:
    """Every attention preset x ZeRO stage x kernels x recomputation, every model preset, and single settings."""
    for preset, stage, kernels, recomputed in product(ATTENTION, STAGES, KERNELS, RECOMPUTED):
        name = f"{preset}, ZeRO {stage}, {kernels}, recomputed {recomputed}"
        engine = (f"engine.kernels={kernels}", f"engine.activation_checkpointing={recomputed}")
        yield name, [f"attention={preset}", f"engine.zero_stage={stage}", *engine]
    for preset in ATTENTION:
        yield f"{preset}, all by auto", [f"attention={preset}"]
    for model in MODELS:
        yield f"model {model}", [f"model={model}", *NARROW, *_narrow_experts(model)]
    for name, overrides in SETTINGS.items():
        yield name, overrides.split()


def _place(name: str) -> str:
    """The directory of a run, without signs that mean something to Hydra."""
    return f"run.dir={{folder}}/runs/{re.sub('[^a-z0-9]+', '-', name.lower())}"


def _narrow_experts(model: str) -> list[str]:
    """Widths that a preset has: a model without experts refuses a width of one. All layers of one stay dense."""
    text = (CONFIGS / "model" / f"{model}.yaml").read_text()
    widths = re.findall(r"^  (expert_width|dense_width): [1-9]", text, re.MULTILINE)
    layers = re.findall(r"^  dense_layers: (\d+)", text, re.MULTILINE)
    return [*(f"moe.{name}=64" for name in widths), *(f"moe.dense_layers={min(int(count), 2)}" for count in layers)]


def commands() -> Iterator[tuple[str, list[str]]]:
    """All cases for one process: trainings, a resumed run, evaluations of trained runs, benchmarks."""
    for name, overrides in trainings():
        yield name, ["train", *TINY, *overrides, _place(name)]
    for preset in EVALUATED:
        run = _place(f"{preset}, all by auto").partition("=")[2]
        longer = ["run.steps=4", "resume.allow_changes=[run.steps]"]
        yield f"resume {preset}", ["train", *TINY, f"attention={preset}", f"run.dir={run}", *longer]
        yield f"eval {preset}", ["eval", run, "--device", "cuda"]
        yield f"branch of {preset}", [
            "train", *TINY, f"attention={preset}", f"run.branch_from={run}", "engine.zero_stage=3",
            _place(f"branch of {preset}"), "run.steps=6",
        ]  # fmt: skip
    yield from benchmarks()


def benchmarks() -> Iterator[tuple[str, list[str]]]:
    """The stages of `kha bench gpu` as they are, at reduced sizes; without pytest, which judges values, and without the
    peer, whose own routing selects no expert where nothing is computed."""
    small = ("model.hidden_size=64", "model.query_heads=4", "model.kv_heads=2", "model.head_dim=64", "model.seq_len=64")
    small += ("model.layers=2", "model.vocab_size=256", "moe.expert_width=64", "telemetry.peak_tflops=1")
    quick = {"--blocks": "3", "--warmup": "1", "--steps": "1"}
    for stage in stages(rehearse=False):
        if stage.command[0] != "pytest" and "--against" not in stage.command:
            words = list(stage.command)
            for option, value in quick.items():
                if option in words:
                    words[words.index(option) + 1] = value
            words = [word for word in words if not word.startswith(("model.layers=", "model.vocab_size="))]
            # cuDNN has no attention kernel for a device that computes nothing.
            words = [word.replace("backend=cudnn", "backend=sdpa") for word in words]
            yield f"bench: {stage.name}", ["bench", *words, *small, "--json"]


def of_two_ranks() -> Iterator[tuple[str, list[str]]]:
    """Trainings of two processes, whose collectives move bytes between them: ZeRO, shared experts, shared rows."""
    for preset, stage in product(("gqa", "kha_mlp", "mea"), STAGES):
        name = f"two ranks, {preset}, ZeRO {stage}"
        overrides = [f"attention={preset}", f"engine.zero_stage={stage}", "engine.audit_every=1"]
        yield name, ["train", *TINY, *overrides, _place(name)]
    for stage, kernels, recomputed in product(STAGES[:2], KERNELS, RECOMPUTED):
        name = f"shared experts, ZeRO {stage}, {kernels}, recomputed {recomputed}"
        engine = (f"engine.kernels={kernels}", f"engine.activation_checkpointing={recomputed}")
        yield name, ["train", *TINY, SHARED_EXPERTS, f"engine.zero_stage={stage}", *engine, _place(name)]
    for preset, shared in product(ATTENTION, ("experts", "rows")):
        if (preset, shared) not in REFUSED:
            name = f"shared {shared}, {preset}"
            setting = SHARED_EXPERTS if shared == "experts" else SHARED_ROWS
            yield name, ["train", *TINY, f"attention={preset}", *PAIRED.get(preset, []), setting, _place(name)]
    for name, overrides in OF_TWO_RANKS.items():
        yield name, ["train", *TINY, *overrides.split(), _place(name)]
