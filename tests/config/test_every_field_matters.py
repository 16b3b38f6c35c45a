"""Every setting changes something observable. A setting that nothing reads has no place in the schema.

`CHANGES` gives each field another valid value and names the observable that must change; `UNSEEN` lists the few that
cannot, with the reason. A field in neither fails.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from data_tools.synthetic import write_dataset
from kha_train import RunConfig, build_decoder, compose, distributed, open_stream
from kha_train.config.build import flatten, to_plain
from kha_train.config.compose import shipped
from kha_train.config.resolve import Device, decide
from kha_train.data.stream import validation_batches
from kha_train.distributed import World
from kha_train.engine.building import build_optimizer, materialise, resolve_dtype
from kha_train.engine.contract import seeded
from kha_train.engine.settings import deepspeed_settings
from kha_train.errors import CheckpointError, ConfigError, DataError, ResumeError
from kha_train.estimate.counts import count_parameters, flops_per_token
from kha_train.estimate.plan import make_plan
from kha_train.model import loss as loss_module
from kha_train.model.device import resolve_on
from kha_train.optim import Part, learning_rate, parameter_groups
from kha_train.optim.muon import Muon
from kha_train.record import read_events, read_metrics
from kha_train.stability.events import Observation
from kha_train.stability.monitor import Verdict
from kha_train.stability.policy import Decision, Policy
from kha_train.telemetry.console import Console
from kha_train.telemetry.profiler import Profiler
from kha_train.telemetry.throughput import peak_flops
from kha_train.telemetry.wandb import WandbMirror
from kha_train.train import run as train_run
from kha_train.train import session as session_module
from kha_train.train.metrics import declared
from kha_train.train.ring import Copy
from kha_train.train.saving import Saver
from kha_train.train.watch import Watch
from kha_train.variants.optimizer import LinearMap
from kha_train.variants.registry import OPTIMIZERS

PRESETS = sorted(path.stem for path in (shipped("configs") / "attention").glob("*.yaml"))


class _Asked(Exception):
    """Raised instead of the real call, to see only its arguments."""


# Observables: configuration -> a value that can be compared.


def plan(config: RunConfig) -> Any:
    """Parameters and operations."""
    return count_parameters(config), flops_per_token(config)


def shapes(config: RunConfig) -> Any:
    """Name and shape of everything the decoder holds."""
    with torch.device("meta"):
        decoder = build_decoder(config)
    return {name: tuple(tensor.shape) for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]}


def initial_values(config: RunConfig) -> Any:
    """A digest of the initial weights."""
    digest = hashlib.sha256()
    for tensor in build_decoder(config).state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def metrics(config: RunConfig) -> Any:
    """What a run declares; which steps have statistics of layers, tests/train/test_layer_statistics.py shows."""
    return set(declared(config))


def first_loss(config: RunConfig) -> Any:
    """The loss of the first micro-batch at initialisation, where only the arithmetic can differ."""
    batch = next(next(open_stream(config)).micro_batches(2))
    arguments = (batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen)
    return build_decoder(config)(*arguments).loss_sum.item()


def kernels(config: RunConfig) -> Any:
    """The functions chosen to compute attention and experts: backends agree on results, so only the choice differs."""
    block = build_decoder(config).blocks[0]
    run = block.feed_forward.experts.run
    return block.attention.attend.__name__, getattr(run, "func", run).__name__


def folding(config: RunConfig) -> Any:
    """Whether the interaction is computed on weights: results agree, so only this differs."""
    return build_decoder(config).blocks[0].attention.interaction.folded


def way_of_the_norm(config: RunConfig) -> Any:
    """What normalises and rotates the queries: kernels agree on results, so only this differs."""
    decoder = build_decoder(config, decide(config, Device("cuda", (9, 0))))
    return type(decoder.blocks[0].attention.query_norm).__name__


def bias_after_a_step(config: RunConfig) -> Any:
    """Selection biases after an uneven load."""
    decoder = build_decoder(config)
    decoder.finish_step(torch.arange(config.model.layers * config.moe.experts).view(config.model.layers, -1))
    return decoder.selection_bias_LE().tolist()


def forward_of_a_choice(config: RunConfig) -> Any:
    """Loss and loads with a strongly selective router, where its settings decide which experts are chosen."""
    decoder = build_decoder(config)
    with torch.no_grad():
        for router in decoder.routers():
            router.weight.mul_(50.0)
    tokens = torch.arange(128).view(2, 64)
    output = decoder(tokens, tokens)
    return output.loss_sum.item(), output.load_LE.tolist(), output.auxiliary


def planned(config: RunConfig) -> Any:
    """The output of `kha plan`, which may be a refusal."""
    try:
        return make_plan(config).to_dict()
    except ConfigError as error:
        return str(error)


def loss_chunks(config: RunConfig, patch: pytest.MonkeyPatch) -> Any:
    """How many pieces the loss is computed in."""
    calls = []
    original = loss_module._logit_gradient
    patch.setattr(loss_module, "_logit_gradient", lambda *given: calls.append(1) or original(*given))
    first_loss(config)
    return len(calls)


def forwards_of_a_block(config: RunConfig) -> Any:
    """How often a block runs in one forward and backward: twice when it is recomputed."""
    decoder, batch, calls = build_decoder(config), next(open_stream(config)), []
    decoder.blocks[0].attention.register_forward_hook(lambda *given: calls.append(1))
    decoder(batch.tokens_BT, batch.labels_BT).loss_sum.backward()
    return len(calls)


def first_batch(config: RunConfig) -> Any:
    """Samples, tokens and borders of the first step."""
    batch = next(open_stream(config))
    return batch.samples_B.tolist(), batch.tokens_BT.tolist(), batch.cu_seqlens_S.tolist()


def second_batch(config: RunConfig) -> Any:
    """Samples of the second step."""
    return next(open_stream(config, samples_seen=config.data.global_batch_size, steps_done=1)).samples_B.tolist()


def batch_after_2048_samples(config: RunConfig) -> Any:
    """Tokens of the step that begins at sample 2048."""
    return next(open_stream(config, samples_seen=2048)).tokens_BT.tolist()


def file_reader(config: RunConfig) -> Any:
    """How files are read: both ways give the same ids, so only the reader differs."""
    return type(open_stream(config).samples.sources[0].rows.shards._files).__name__


def threads_reading_ahead(config: RunConfig) -> Any:
    """How many threads read while the caller does something else."""
    stream = open_stream(config)
    next(stream)
    return sum(thread.name.startswith("data-prefetch") for thread in threading.enumerate())


def cache_of_blocks(config: RunConfig) -> Any:
    """Where blocks of a dataset at a URL are kept, and how many bytes of them."""
    url = f"file://{config.data.train}"
    files = open_stream(replace(config, data=replace(config.data, train=url))).samples.sources[0].rows.shards._files
    return str(files._cache.directory), files._cache._limit


def validation_samples(config: RunConfig) -> Any:
    """Rows and tokens of the validation."""
    return [(batch.samples_B.tolist(), batch.tokens_BT.sum().item()) for batch in validation_batches(config)]


def damage_is_seen(config: RunConfig) -> Any:
    """Whether a flipped bit in a shard is noticed."""
    shard = next(Path(config.data.train).glob("*.tok"))
    whole = shard.read_bytes()
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    try:
        stream = open_stream(config)
        for _ in range(stream.samples_per_epoch // config.data.global_batch_size):
            next(stream)
    except DataError:
        return True
    finally:
        shard.write_bytes(whole)
    return False


def compiled_blocks(config: RunConfig, patch: pytest.MonkeyPatch) -> Any:
    """How many blocks torch is asked to compile when the engine makes the decoder."""
    asked: list[int] = []
    patch.setattr(torch.nn.Module, "compile", lambda module: asked.append(1))
    materialise(config, resolve_on(config, torch.device("cpu")), World.single(), seeded)
    return len(asked)


def profiled(config: RunConfig, tmp_path: Path) -> Any:
    """The files of a profile of three steps, and whether they tell of memory."""
    profiler = Profiler(config, tmp_path, World.single(), print)
    for step in (1, 2, 3):
        with profiler.over(step):
            torch.ones(step).sum()
    profiler.close()
    return {path.name: "CPU Mem" in path.read_text() for path in (tmp_path / "profile").glob("*.txt")}


def engine_settings(config: RunConfig) -> Any:
    """The settings passed to DeepSpeed."""
    return deepspeed_settings(config, World.single(), resolve_dtype(config, torch.device("cpu")))


def learning_rates(config: RunConfig) -> Any:
    """The rate of every step."""
    return [learning_rate(config.optim, step, config.run.steps) for step in range(1, config.run.steps + 1)]


def adamw(config: RunConfig) -> Any:
    """The optimiser's own settings by parameter group."""
    decoder = build_decoder(config)
    optimizer = build_optimizer(config, decoder, decoder.named_parameters(), {})
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def muon(config: RunConfig) -> Any:
    """A matrix after two steps of Muon."""
    share = torch.nn.Parameter(torch.zeros(12))
    optimizer = Muon([{"params": [share], "weight_decay": 0.0}], config.optim)
    optimizer.lay_out([(share, [Part("w", 0, 12, 0)])], {"w": (3, 4)}, {"w": LinearMap()}, World.single())
    optimizer.start([share], torch.float32)
    for seed in (0, 1):
        share.grad = torch.randn(12, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    return share.tolist()


def weight_decays(config: RunConfig) -> Any:
    """The decay of every parameter group."""
    groups = parameter_groups(build_decoder(config).named_parameters(), config.optim.weight_decay)
    return {group["name"]: group["weight_decay"] for group in groups}


def process_group(config: RunConfig, patch: pytest.MonkeyPatch) -> Any:
    """How training asks to join the other ranks."""

    def asked(*arguments: Any) -> None:
        raise _Asked(*arguments)

    patch.setattr(distributed, "start", asked)
    with pytest.raises(_Asked) as call:
        train_run.train(config)
    return call.value.args


def decisions(config: RunConfig) -> Any:
    """The decisions, step by step, about a curve with NaN, a lasting spike, and a loss twice its mean."""
    watch, decided = Watch(config), []
    calm = [2.0 + 0.01 * (step % 7) for step in range(200)]
    for step, loss in enumerate([*calm, *[math.nan] * 5, *calm[:10], *[3.0] * 20, *calm, *[9.0] * 6], start=1):
        norm = 3.0 if step == 150 else 1.0 + 0.01 * (step % 5)
        ruling = watch.judge(Observation(step, loss, norm, samples_first=8 * step))
        decided.append((*watch.decision, ruling.max_norm, ruling.probe))
    return decided


def rewind_of_a_run(config: RunConfig, patch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Where a run that must go back after step 5 goes to, and what it skips; None when it ends instead."""

    def decide(policy: Policy, verdict: Verdict) -> Decision:
        decided.append(verdict)
        return Decision(False, "rewind", "told to") if len(decided) == 5 else Decision(True)

    decided: list[Verdict] = []
    patch.setattr(Policy, "decide", decide)
    run_files(config, patch, tmp_path)
    rewinds = [event for event in read_events(Path(config.run.dir)) if event["kind"] == "rewind"]
    return [(event["to_step"], event["window"]) for event in rewinds]


def failed_saves_until_the_end(config: RunConfig) -> Any:
    """How many saves may fail in a row."""

    def fail() -> None:
        raise CheckpointError("no")

    seen: list[Any] = []
    saver = Saver(config, World.single(), Path(), sync=lambda: None, event=lambda *given, **_: seen.append(given))
    with pytest.raises(CheckpointError):
        for _ in range(100):
            saver._settle(fail)
    return len(seen)


def ring_copies(config: RunConfig, patch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The steps after which a short run copies its state into the ring."""
    taken: list[int] = []
    patch.setattr(Copy, "take", lambda copy, engine, step, state: taken.append(step))
    run_files(config, patch, tmp_path)
    return taken


def watchdog_timeout(config: RunConfig, patch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The timeout of the watchdog."""
    asked: list[float] = []
    original = train_run.Watchdog
    patch.setattr(train_run, "Watchdog", lambda *given: asked.append(given[2]) or original(*given))
    run_files(config, patch, tmp_path)
    return asked


def audited_steps(config: RunConfig, patch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """How often a short run compares what its ranks hold."""
    asked: list[str] = []
    patch.setattr(session_module, "audit", lambda engine, decisions: asked.append(decisions))
    run_files(config, patch, tmp_path)
    return len(asked)


def refusal(config: RunConfig, patch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Whether a start is refused, and why: a directory without a checkpoint cannot be begun from."""
    try:
        run_files(config, patch, tmp_path)
    except CheckpointError as error:
        return error.problem
    return None


def refused_changes(config: RunConfig, patch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Whether a finished run may be resumed with another learning rate."""
    run_files(config, patch, tmp_path)
    try:
        run_files(replace(config, optim=replace(config.optim, lr=1e-4)), patch, tmp_path)
    except ResumeError:
        return "refused"
    return "goes on"


def damaged_checkpoint(config: RunConfig, patch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What happens to a run whose newest checkpoint is damaged."""
    run_files(config, patch, tmp_path)
    newest = max(Path(config.run.dir, "checkpoints").glob("step-*"))
    (newest / "trainer.json").write_text("{}")
    return refusal(config, patch, tmp_path) is None


def console_mode(config: RunConfig) -> Any:
    """How the console shows a run, away from a terminal."""
    return Console(config, total_steps=1).mode


def mfu_denominator(config: RunConfig) -> Any:
    """The peak that MFU is measured by."""
    return peak_flops(config, torch.device("cpu"), torch.float32)


def wandb_run(config: RunConfig, patch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """How the W&B run is opened."""
    calls: list[dict[str, Any]] = []
    patch.setattr(wandb, "init", lambda **given: calls.append(given) or _SilentRun())
    WandbMirror(config, tmp_path, "id", warn=lambda text: None)
    names = ("mode", "project", "entity", "group", "name", "tags")
    return [{name: call[name] for name in names} for call in calls]


def run_files(config: RunConfig, patch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The results of a short training run: its directory, its checkpoints, the steps it trained and validated."""
    patch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        patch.setenv(name, "0")
        patch.delenv(name)
    logging.disable(logging.WARNING)
    train_run.train(config)
    logging.disable(logging.NOTSET)
    run_dir = Path(config.run.dir)
    lines = read_metrics(run_dir)
    validated = [line["step"] for line in lines if "validation/loss" in line]
    return str(run_dir), sorted(path.name for path in (run_dir / "checkpoints").glob("step-*")), len(lines), validated


def folders_of_a_run(config: RunConfig, patch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What sinks leave in the directory of a short training run."""
    run_files(config, patch, tmp_path)
    return {path.name for path in Path(config.run.dir).iterdir()} & {"wandb", "tensorboard"}


def entries_at_the_end(config: RunConfig, patch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What the last line of a short training run has."""
    run_files(config, patch, tmp_path)
    return sorted(read_metrics(Path(config.run.dir))[-1])


class _SilentRun:
    def define_metric(self, *names: str, **options: str) -> None:
        """As wandb's."""


RANDOM_MEA = ("attention=mea", "attention.interaction.init.kind=random")
GATED = ("interaction@attention.interaction=knocking_gate", "attention.interaction.init.kind=random")
YARN = ("model.rope_scaling=yarn", "model.rope_factor=4", "model.rope_original_seq_len=64")
Change = tuple[Any, Callable[..., Any]] | tuple[Any, Callable[..., Any], str]
CHANGES: dict[str, Change] = {
    "run.dir": ("runs/elsewhere", run_files),
    "run.name": ("another", wandb_run),
    "run.steps": (5, run_files),
    "run.seed": (1, initial_values),
    "model.layers": (1, plan),
    "model.hidden_size": (128, shapes),
    "model.query_heads": (8, shapes),
    "model.kv_heads": (1, shapes),
    "model.head_dim": (16, shapes),
    "model.vocab_size": (512, shapes),
    "model.seq_len": (32, first_batch),
    "model.tie_embeddings": ("false", plan),
    "model.norm_eps": (1e-2, first_loss),
    "model.rope_theta": (100.0, first_loss),
    "model.partial_rotary_factor": (0.5, first_loss),
    "model.rope_scaling": ("linear", first_loss, *YARN),
    "model.rope_factor": (8.0, first_loss, "model.rope_scaling=linear", "model.rope_factor=4"),
    "model.rope_original_seq_len": (16, first_loss, *YARN),
    "model.rope_beta_fast": (2.0, first_loss, *YARN),
    "model.rope_beta_slow": (0.1, first_loss, *YARN),
    "model.rope_attention_factor": (1.0, first_loss, *YARN),
    "model.init_std": (0.05, initial_values),
    "model.scale_residual_init": ("false", initial_values),
    "model.loss_chunk_tokens": (7, loss_chunks),
    "attention.name": ("another", wandb_run),
    "attention.base.query_heads": (8, shapes),
    "attention.base.kv_heads": (1, shapes),
    "attention.base.head_dim": (16, shapes),
    "attention.interaction.name": ("knocking_linear", shapes),
    "attention.interaction.projections": ("[q,v]", plan),
    "attention.interaction.share": ("none", shapes),
    "attention.interaction.train": ("false", plan),
    "attention.interaction.component_heads": (1, plan, "attention=mea"),
    "attention.interaction.component_heads_by_layer": ("[0,1]", plan, "attention=mea"),
    "attention.interaction.value_only": ("true", first_loss, "attention=gta", *GATED),
    "attention.interaction.impl": ("eager", folding),
    "attention.interaction.init.kind": ("random", initial_values),
    "attention.interaction.init.scale": (0.5, initial_values, "attention.interaction.init.kind=scaled_identity"),
    "attention.interaction.compose": ("[k]", plan, "attention=mea"),
    "attention.interaction.head_norm": ("false", plan, "attention=mea"),
    "attention.interaction.mix_after_rope": ("true", first_loss, *RANDOM_MEA),
    "attention.base.output_gate": ("headwise", shapes),
    "attention.base.chunk_tokens": (7, planned, "attention=linear"),
    "attention.base.name": ("talking_heads", shapes, "attention.backend=eager"),
    "attention.base.latent_width": (16, plan, "attention=mla"),
    "attention.base.rotary_dim": (8, plan, "attention=mla"),
    "attention.base.query_latent_width": (16, plan, "attention=mla"),
    "attention.positions": ("alibi", first_loss),
    "attention.qk_norm": ("full_width", shapes),
    "attention.backend": ("eager", kernels),
    "moe.experts": (16, shapes),
    "moe.top_k": (3, plan),
    "moe.expert_width": (32, shapes),
    "moe.backend": ("loop", kernels),
    "moe.shared_experts": (1, shapes),
    "moe.dense_layers": (1, shapes, "moe.dense_width=64"),
    "moe.dense_width": (32, shapes, "moe.dense_layers=1", "moe.dense_width=64"),
    "moe.score": ("softmax", forward_of_a_choice),
    "moe.router_precision": ("bf16", forward_of_a_choice),
    "moe.renormalize": ("false", forward_of_a_choice),
    "moe.expert_groups": (4, forward_of_a_choice),
    "moe.top_groups": (2, forward_of_a_choice, "moe.expert_groups=4"),
    "moe.bias_update": ("sign", bias_after_a_step),
    "moe.auxiliary_loss.weight": (0.1, forward_of_a_choice),
    "moe.auxiliary_loss.scope": ("micro_batch", forward_of_a_choice, "moe.auxiliary_loss.weight=0.1"),
    "moe.z_loss_weight": (0.1, forward_of_a_choice),
    "moe.routing_warmup_steps": (10, forward_of_a_choice),
    "moe.routing_seed": (1, forward_of_a_choice, "moe.routing_warmup_steps=10"),
    "moe.routed_scaling": (1.0, first_loss),
    "moe.bias_update_rate": (0.5, bias_after_a_step),
    "data.train": ("{other}/train", first_batch),
    "data.validation": ("{other}/validation", validation_samples),
    "data.seed": (1, first_batch),
    "data.skip_windows": ("[[0,2]]", first_batch),
    "data.global_batch_size": (12, first_batch),
    "data.batch_schedule": ("[{start_step: 2, global_batch_size: 4}]", second_batch),
    "data.sources": (
        "[{name: b, path: {other}/train, weight: 1}]",
        first_batch,
        "data.train=''",
        "data.sources=[{name: a, path: {other}/train, weight: 1}]",
    ),
    "data.phases": (
        "[{start_sample: 2048, weights: [0, 1]}]",
        batch_after_2048_samples,
        "data.train=''",
        "data.sources=[{name: a, path: {other}/train, weight: 1}, {name: b, path: {other}/train, weight: 1}]",
    ),
    "data.isolate_documents": ("false", first_batch),
    "data.packing": ("best_fit", first_batch),
    "data.shuffle": ("block", first_batch),
    "data.reader": ("memory_map", file_reader),
    "data.prefetch": (2, threads_reading_ahead),
    "data.cache_dir": ("{other}/cache", cache_of_blocks, "data.train={other}/train"),
    "data.cache_gib": (0.5, cache_of_blocks, "data.train={other}/train", "data.cache_dir={other}/cache"),
    "data.check_crc": ("false", damage_is_seen, "data.train={other}/train"),
    "optim.lr": (1e-4, learning_rates),
    "optim.betas": ("[0.8,0.99]", adamw),
    "optim.eps": (1e-6, adamw),
    "optim.name": ("muon", adamw),
    "optim.momentum": (0.5, muon, "optim=muon"),
    "optim.nesterov": ("false", muon, "optim=muon"),
    "optim.iterations": (3, muon, "optim=muon"),
    "optim.iteration_dtype": ("bf16", muon, "optim=muon"),
    "optim.weight_decay": (0.5, weight_decays),
    "optim.interaction_decay": ("identity", adamw),
    "optim.interaction_lr_scale": (0.5, adamw),
    "optim.grad_clip": (0.5, engine_settings),
    "optim.schedule.name": ("wsd", learning_rates),
    "optim.schedule.warmup": (0.5, learning_rates),
    "optim.schedule.decay": (0.7, learning_rates, "optim.schedule.name=wsd"),
    "optim.schedule.final": (0.5, learning_rates),
    "optim.schedule.surge.factor": (9, learning_rates, "optim.schedule.surge.length=0.5"),
    "optim.schedule.surge.start": (0.5, learning_rates, "optim.schedule.surge={factor: 9, length: 0.5}"),
    "optim.schedule.surge.length": (0.5, learning_rates, "optim.schedule.surge.factor=9"),
    "engine.zero_stage": (3, engine_settings),
    "engine.micro_batch_size": (2, engine_settings),
    "engine.device": ("cuda", process_group),
    "engine.precision": ("bf16", engine_settings),
    "engine.grad_accum_dtype": ("bf16", engine_settings, "engine.precision=bf16"),
    "engine.kernels": ("triton", way_of_the_norm),
    "engine.activation_checkpointing": ("full", forwards_of_a_block),
    "engine.compile": ("block", compiled_blocks),
    "engine.moment_dtype": ("bf16", planned),
    "profile.first_step": (1, profiled, "profile.last_step=2"),
    "profile.last_step": (3, profiled, "profile.first_step=1", "profile.last_step=2"),
    "profile.memory": ("true", profiled, "profile.first_step=1", "profile.last_step=1"),
    "engine.reduce_bucket_elements": (1000, engine_settings),
    "engine.context_parallel": (2, engine_settings),
    "engine.hpz_partition_size": (2, engine_settings, "engine.zero_stage=3"),
    "engine.expert_parallel": (2, planned),
    "engine.collective_timeout_seconds": (60.0, process_group),
    "engine.hang_timeout_seconds": (60.0, watchdog_timeout),
    "engine.audit_every": (1, audited_steps),
    "run.init_from": ("{other}", refusal),
    "run.branch_from": ("{other}", refusal),
    "run.max_minutes": (1e-9, run_files),
    "resume.allow_changes": ("[optim.lr]", refused_changes),
    "resume.strict": ("true", damaged_checkpoint),
    "checkpoint.every_steps": (1, run_files),
    "checkpoint.every_minutes": (1e-9, run_files),
    "checkpoint.keep_last": (1, run_files),
    "checkpoint.keep_every_steps": (2, run_files, "checkpoint.keep_last=1"),
    "checkpoint.max_failures": (1, failed_saves_until_the_end),
    "checkpoint.ring_steps": (2, ring_copies),
    "validation.every_steps": (1, run_files),
    "validation.rows": (3, validation_samples),
    "validation.sets": ("[{name: code, path: {other}/validation}]", entries_at_the_end),
    "evaluation.tasks": ("[context]", entries_at_the_end),
    "stability.policy": ("abort", decisions),
    "stability.max_nonfinite_steps": (5, decisions),
    "stability.max_skips": (3, decisions, "stability.policy=skip"),
    "stability.rewind.after": (5, decisions, "stability.policy=rewind"),
    "stability.rewind.at_most": (0, decisions, "stability.policy=rewind"),
    "stability.rewind.margin": (2, rewind_of_a_run, "run.steps=8"),
    "stability.rewind.window": (3, rewind_of_a_run, "run.steps=8"),
    "stability.zclip": ("true", decisions),
    "stability.probe_every": (7, decisions),
    "telemetry.console": ("lines", console_mode),
    "telemetry.sinks": ("[tensorboard]", folders_of_a_run),
    "telemetry.peak_tflops": (3.0, mfu_denominator),
    "telemetry.layer_statistics_every": (2, metrics),
    "telemetry.wandb.mode": ("disabled", wandb_run),
    "telemetry.wandb.project": ("another", wandb_run),
    "telemetry.wandb.entity": ("another", wandb_run),
    "telemetry.wandb.group": ("another", wandb_run),
    "telemetry.wandb.tags": ("[another]", wandb_run),
    "cluster.device": ("cuda", planned),
    "cluster.devices": (4, planned),
    "cluster.devices_per_node": (1, planned),
    "cluster.memory_gib": (99.0, planned),
    "cluster.reserved_gib": (1.25, planned),
    "cluster.peak_tflops": (3.0, planned),
    "cluster.mfu": (0.5, planned),
    "cluster.node_bandwidth_gb": (3.0, planned),
    "cluster.network_bandwidth_gb": (3.0, planned, "cluster.devices_per_node=1"),
    "cluster.storage_bandwidth_gb": (3.0, planned),
    "cluster.price_per_hour": (3.0, planned),
    "cluster.hours_between_failures": (3.0, planned),
    "cluster.capability": (7.5, planned, "cluster.device=cuda", "attention.backend=auto"),
}

UNSEEN = {
    "checkpoint.background": "changes when the files are written, never which",
    "model.name": "a label: says in the saved configuration which preset the numbers came from",
    "data.name": "a label, as model.name",
    "cluster.name": "a label, as model.name",
    "engine.name": "another engine computes the same (tests/engine/test_contract.py), up to rounding",
    "attention.base.max_tokens": "a bound: rows beyond it are refused (tests/model/attention)",
}


SEEN: dict[Any, Any] = {}
"""What each observable was without a change, seen once: that may be a whole run."""


def test_every_field_is_listed_once() -> None:
    chosen = [*(f"attention={preset}" for preset in PRESETS), *(f"optim={name}" for name in OPTIMIZERS)]
    leaves = {key for preset in chosen for key in flatten(to_plain(compose([preset])))}
    assert leaves == CHANGES.keys() | UNSEEN.keys()
    assert not CHANGES.keys() & UNSEEN.keys()


def trains(observable: Callable[..., Any]) -> bool:
    """Whether it needs a folder, which is for a run."""
    return "tmp_path" in observable.__code__.co_varnames[: observable.__code__.co_argcount]


@pytest.mark.parametrize(
    "field",
    [pytest.param(field, marks=pytest.mark.slow if trains(seen[1]) else ()) for field, seen in CHANGES.items()],
)
def test_another_value_is_seen(
    field: str, configuration: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, observable, *needs = CHANGES[field]
    names = observable.__code__.co_varnames[1 : observable.__code__.co_argcount]

    def seen(where: str, *overrides: str) -> Any:
        given = {"patch": monkeypatch, "tmp_path": _folder(tmp_path / where)}
        config = compose(configuration(*needs, *overrides))
        return observable(config, **{name: given[name] for name in names})

    if (observable, *needs) not in SEEN:
        SEEN[observable, *needs] = seen("before")
    assert SEEN[observable, *needs] != seen("after", f"{field}={value}")


@pytest.fixture
def configuration(small: list[str], dataset: Path, other_dataset: Path) -> Callable[..., list[str]]:
    """`configuration(*overrides)`: a small configuration that has every field, some of them changed."""

    def make(*overrides: str) -> list[str]:
        base = [
            *small,
            "cluster=cpu",
            "attention=kha_mlp",
            "telemetry.wandb.mode=offline",
            "run.steps=4",
            "run.dir=runs/one",
            "run.name=one",
            "checkpoint.every_steps=2",
            "checkpoint.keep_last=2",
            "validation.every_steps=2",
            "optim.schedule.warmup=0.25",
        ]
        return base + [override.replace("{other}", str(other_dataset)) for override in overrides]

    return make


@pytest.fixture(scope="session")
def other_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other documents of the same vocabulary."""
    directory = tmp_path_factory.mktemp("other")
    write_dataset(directory, vocab_size=256, documents=100, seed=9)
    return directory


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
