"""`kha export`: a checkpoint becomes a directory that transformers loads, verified before anybody sees it.

1. the checkpoint is read and checked; its configuration says which class of transformers computes the same
2. what is linear between projection and norm is multiplied into the projections (`--absorb`)
3. the weights are written tensor by tensor, then everything small beside them
4. another process loads the result and compares logits and ids with ours (`verification.py`)
5. the directory gets its name
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kha_train.checkpoint.fit import source_of
from kha_train.checkpoint.reader import Checkpoint, open_verified
from kha_train.config.compose import from_plain
from kha_train.config.saved import SavedConfig, completed
from kha_train.config.schema import RunConfig
from kha_train.decode.absorb import absorbed_config
from kha_train.decode.generate import materialise
from kha_train.distributed import World
from kha_train.errors import ConfigError
from kha_train.export import hugging_face
from kha_train.export.card import card
from kha_train.export.families import family_of
from kha_train.export.family import Family, plain_groups
from kha_train.export.heads_files import Insertion, insertion_of, write_heads
from kha_train.export.links import Link
from kha_train.export.reference import Reference, reference_of, rounded_decoder
from kha_train.export.shards import bytes_of, write_shards
from kha_train.export.tokenizer_files import Speech, Wanted, speech_of, write_tokenizer
from kha_train.export.verification import verify
from kha_train.export.weights import Weights
from kha_train.foreign.documents import Json
from kha_train.record.files import published, write_json, write_text

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPORT = "export_report.json"
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""A progress bar with its title and total; inside its block, the function that adds to what is done."""


@dataclass(frozen=True)
class Request:
    """What is asked for: the directory `out`; whether linear interactions are multiplied into the weights; their
    `dtype`; the flavour for vLLM; the most bytes of a file of weights; where the tokenizer is.
    """

    out: Path
    absorb: bool = True
    dtype: str = "float32"
    vllm: bool = False
    shard_bytes: int = 5 * 10**9
    tokenizer: Wanted = field(default_factory=Wanted)


@dataclass(frozen=True)
class Plan:
    """What is going to be written: `trained` is the configuration of the checkpoint, `exported` that of the decoder
    that `family` computes, with `insertion` between its heads. `speech` is its tokenizer.
    """

    checkpoint: Checkpoint
    trained: RunConfig
    exported: RunConfig
    family: Family
    dtype: torch.dtype
    insertion: Insertion | None
    speech: Speech

    @cached_property
    def weights(self) -> Weights:
        """The tensors of the exported decoder."""
        return Weights(self.checkpoint, self.trained, self.exported)

    @cached_property
    def values(self) -> dict[str, Json]:
        """What config.json says of the model."""
        return self.family.config(self.exported)

    @cached_property
    def links(self) -> list[Link]:
        """All tensors of the host."""
        return list(self.family.links(self.exported, self.values))


def export(source: Path, request: Request, bar: Bar) -> dict[str, Any]:
    """Export the checkpoint `source`, or the newest one of a run, and return the report.

    Raises ConfigError for a model without a host, a place that is taken, or a machine without transformers;
    CheckpointError for a damaged or missing checkpoint; ExportError when the result does not compute the same; OSError;
    as `speech_of` and `reference_of`, and DataError for a damaged record.
    """
    if problem := hugging_face.missing():
        raise ConfigError(problem, field="kha export", fix="pip install 'kha_train[export]'")
    with ExitStack() as held:
        checkpoint = open_verified(source, World.single(), held)
        plan = plan_of(checkpoint, request)
        with published(request.out, "--out") as beside:
            reference, rounding = _reference(plan)
            with bar("writing weights", bytes_of(plan.links, plan.weights.shapes, plan.dtype)) as advance:
                written = write_weights(plan, beside, request.shard_bytes, advance)
            _write_small(plan, request, beside)
            with bar("verifying in another process", 1) as advance:
                found = verify(beside, reference, plan.speech.text)
                advance(1)
            report = _report(plan, request, written, rounding) | found
            write_json(beside / REPORT, report)
    return report


def plan_of(checkpoint: Checkpoint, request: Request) -> Plan:
    """What `request` makes of the checkpoint. Raises ConfigError for a model without a host, and as `speech_of`."""
    trained = trained_config(checkpoint)
    exported = _served(plain_groups(_absorbed(trained, request)), request)
    family, insertion = family_of(exported), insertion_of(exported)
    speech = speech_of(trained, request.tokenizer)
    plan = Plan(checkpoint, trained, exported, family, DTYPES[request.dtype], insertion, speech)
    _check_flavour(plan, request)
    for link in plan.links:
        if not link.host:
            link.layout.to_host(tuple(plan.weights.read(part) for part in link.ours))
    return plan


def trained_config(checkpoint: Checkpoint) -> RunConfig:
    """The configuration that a checkpoint was trained with. Raises CheckpointError without one, ConfigError for one
    that is not ours.
    """
    source = source_of(checkpoint)
    saved = checkpoint.trainer_state.get("config")
    if not isinstance(saved, Mapping):
        raise source.fault("config", "missing")
    return from_plain(completed(source.read(SavedConfig, saved, "config")))


def write_weights(plan: Plan, directory: Path, shard_bytes: int, advance: Callable[[int], None]) -> int:
    """Write the weights into `directory`, one tensor at a time, and return their bytes. Raises as `write_shards`."""
    weights = plan.weights
    return write_shards(directory, plan.links, weights.shapes, weights.read, plan.dtype, shard_bytes, advance)


def _write_small(plan: Plan, request: Request, directory: Path) -> None:
    """Write everything but the weights and the report."""
    special, model = plan.speech.config(), plan.exported.model
    more = {"initializer_range": model.init_std, "use_cache": True, "dtype": request.dtype}
    write_json(directory / "config.json", {**plan.values, **special, **more})
    write_json(directory / "generation_config.json", {**special})
    write_tokenizer(directory, plan.speech, model.seq_len)
    if plan.insertion is not None:
        write_heads(directory, plan.values, plan.insertion, plan.weights.read)
    text = card(plan.checkpoint, plan.trained, plan.family.architecture, request.dtype, plan.insertion is not None,
                request.vllm)  # fmt: skip
    write_text(directory / "README.md", text)


def _absorbed(trained: RunConfig, request: Request) -> RunConfig:
    """The configuration with what can be multiplied into the projections taken out of the interaction."""
    left = absorbed_config(trained) if request.absorb else None
    return trained if left is None else left


def _served(config: RunConfig, request: Request) -> RunConfig:
    """The flavour for vLLM, whose classes with a sigmoid router never tie the output layer, and build shared experts
    unless there is no setting for them, which transformers refuses: so an output layer of its own, and a shared expert
    of zeros.
    """
    if not request.vllm or config.moe.dense_layers == config.model.layers or config.moe.score != "sigmoid":
        return config
    moe = replace(config.moe, shared_experts=max(1, config.moe.shared_experts))
    return replace(config, model=replace(config.model, tie_embeddings=False), moe=moe)


def _check_flavour(plan: Plan, request: Request) -> None:
    """Raises ConfigError for a model that vLLM has no class for."""
    reason = ""
    if plan.insertion is not None:
        name = plan.exported.attention.interaction.name
        reason = f"vLLM has no place for {name}, which acts on activations"
    elif plan.exported.moe.dense_layers == plan.exported.model.layers and plan.family.model_type == "glm4_moe":
        reason = "vLLM's class for this model wants a layer with experts, and all are dense"
    if request.vllm and reason:
        raise ConfigError(reason, field="--vllm", fix="export without --vllm")


def _reference(plan: Plan) -> tuple[Reference, dict[str, float] | None]:
    """Our logits: of the decoder as it was trained, or with the numbers of an export that rounds them; then also how
    far these are from the trained decoder's.
    """
    trained = reference_of(materialise(plan.trained, plan.checkpoint, torch.device("cpu")).eval())
    if plan.dtype == torch.float32:
        return trained, None
    rounded = reference_of(rounded_decoder(plan.exported, plan.links, plan.weights.read, plan.dtype))
    before, after = (one.logits_BTV.log_softmax(-1) for one in (trained, rounded))
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    largest = (trained.logits_BTV - rounded.logits_BTV).abs().max()
    return rounded, {"mean_divergence_nats": float(divergence), "largest_difference": float(largest)}


def _report(plan: Plan, request: Request, written: int, rounding: dict[str, float] | None) -> dict[str, Any]:
    trained, exported = plan.trained.attention.interaction, plan.exported.attention.interaction
    return {
        "checkpoint": str(plan.checkpoint.path),
        "step": plan.checkpoint.step,
        "out": str(request.out),
        "class": plan.family.architecture,
        "model_type": plan.family.model_type,
        "flavour": "vllm" if request.vllm else "transformers",
        "dtype": request.dtype,
        "bytes": written,
        "interaction": {"trained": trained.name, "left": exported.name},
        "heads": None if plan.insertion is None else plan.insertion.name,
        "rounding": rounding,
    }
