"""README.md of an export: what the model is, where it comes from, what was measured of it. The licence is left open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kha_train.checkpoint import layout
from kha_train.checkpoint.merge import MERGED
from kha_train.checkpoint.reader import Checkpoint
from kha_train.config.batch_sizes import BatchSizes
from kha_train.config.schema import RunConfig
from kha_train.estimate.counts import count_parameters
from kha_train.export.compress import ORIGIN_FILE
from kha_train.foreign.documents import Json
from kha_train.metric import Metric
from kha_train.record import declared_in, read_metrics, read_run
from kha_train.record.files import read_json
from kha_train.record.imported import IMPORTED

MEASURED = ("validation/", "evaluation/")
"""What figures in the record begin with that say something of the model."""
NAME_OF_LOSS = "train/loss"
MADE = {IMPORTED: "imported", MERGED: "averaged", ORIGIN_FILE: "compressed"}
"""The files of runs whose weights no training wrote, and how they were made."""


def run_of(checkpoint: Checkpoint) -> Path | None:
    """The run directory that a checkpoint lies in; None for one that was moved elsewhere."""
    home = layout.run_of(checkpoint.path)
    return home if (home / "run.json").is_file() else None


def card(checkpoint: Checkpoint, config: RunConfig, architecture: str, dtype: str, heads: bool, vllm: bool) -> str:
    """The text. Raises DataError when the record of the run is damaged."""
    run = run_of(checkpoint)
    parts = [_head(config, architecture, heads), _use(heads, vllm), _model(config, architecture, dtype)]
    parts += [_origin(checkpoint, config, run), _figures(checkpoint, run), LICENCE]
    return "\n\n".join(parts) + "\n"


LICENCE = """## Licence

Not stated. Whoever publishes this model adds `license:` to the lines at the top, and says here what the training data
allow."""


def _head(config: RunConfig, architecture: str, heads: bool) -> str:
    tags = ["kha_train", config.attention.name, *(["kha_heads"] if heads else [])]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [*(f"- {tag}" for tag in tags), "---", "", f"# {config.run.name}", ""]
    return "\n".join([*lines, f"A language model trained with kha_train, as `{architecture}` of transformers."])


def _use(heads: bool, vllm: bool) -> str:
    load = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    load += ['model = AutoModelForCausalLM.from_pretrained("DIRECTORY")']
    if heads:
        load = ["import kha_heads", *load, 'kha_heads.load(model, "DIRECTORY")']
    load += ['tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")']
    words = ["## Use", "", "```python", *load, "```"]
    if heads:
        words += ["", "Without `kha_heads.load` the model computes something else: its heads exchange information."]
    if vllm:
        words += ["", "Written for vLLM: `vllm serve DIRECTORY`. transformers loads it too."]
    return "\n".join(words)


def _model(config: RunConfig, architecture: str, dtype: str) -> str:
    model, moe, count = config.model, config.moe, count_parameters(config)
    experts = f"{moe.experts} experts, {moe.top_k} a token" if moe.experts else "no experts"
    attention = config.attention
    rows = {
        "class": architecture,
        "attention while training": f"{attention.base.name} with interaction {attention.interaction.name}",
        "parameters": f"{count.total:,}, of which a token passes {count.active:,}",
        "layers, width": f"{model.layers}, {model.hidden_size}",
        "feed-forward": experts,
        "vocabulary, row": f"{model.vocab_size:,} ids, {model.seq_len:,} tokens",
        "weights": dtype,
    }
    return f"## Model\n\n{_table(rows)}"


def _batch(sizes: BatchSizes) -> str:
    first, *later = sizes.stretches()
    return ", ".join([str(first.rows), *(f"{stretch.rows} from step {stretch.first}" for stretch in later)])


def _origin(checkpoint: Checkpoint, config: RunConfig, run: Path | None) -> str:
    made = _made(checkpoint)
    rows: dict[str, Any] = made or _progress(checkpoint, config)
    if "imported from" not in made:
        rows |= {
            "optimiser": f"{config.optim.name}, rate {config.optim.lr:g}, batch {_batch(config.data.batch_sizes)}",
            "data": ", ".join(source.name for source in config.data.sources) or config.data.name,
            "content id of the data": checkpoint.trainer_state.get("data_content_id", "unknown"),
            "seed": config.run.seed,
        }
    rows["written by"] = checkpoint.manifest.tool
    if config.run.init_from:
        rows["weights began as those of"] = Path(config.run.init_from).name
    if run is not None:
        told = read_run(run)
        git = (told.get("provenance") or {}).get("git") or {}
        rows["run"] = told.get("run_id", "unknown")
        rows["commit"] = f"{git.get('commit', 'unknown')}{' with changes' if git.get('dirty') else ''}"
        rows["starts"] = len(told.get("attempts", []))
    return f"## Origin\n\n{_table(rows)}"


def _progress(checkpoint: Checkpoint, config: RunConfig) -> dict[str, Any]:
    progress = checkpoint.trainer_state.get("progress", {})
    budget = f"{progress.get('tokens', 0):,} tokens in {progress.get('samples_seen', 0):,} rows"
    return {"step": f"{checkpoint.step:,} of {config.run.steps:,}", "budget": budget}


def _made(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the weights of a checkpoint were made of, empty for those of a training. Raises DataError."""
    home, made = layout.run_of(checkpoint.path), dict[str, Any]()
    # A compressed run may be of an imported one: then it has the files of both.
    for name, how in MADE.items():
        told = read_json(home / name, dict[str, Json]) if not checkpoint.step else None
        if told is None:
            continue
        if name == IMPORTED:
            made[f"{how} from"] = f"{Path(told['source']).name}, a {told['class']}"
        elif name == MERGED:
            parts = zip(told["sources"], told["weights"], strict=True)
            made[f"{how} from"] = ", ".join(f"{share:.4g} x {_step(one)}" for one, share in parts)
        else:
            made[f"{how} from"] = _step({"checkpoint": told["source"], "step": told["step"]})
    return made


def _step(source: Mapping[str, Json]) -> str:
    return f"step {source['step']:,} of {Path(source['checkpoint']).parent.parent.name}"


def _figures(checkpoint: Checkpoint, run: Path | None) -> str:
    """The last figures of the record up to the step of the checkpoint."""
    found: dict[str, tuple[int, float]] = {}
    lines = [] if run is None else [line for line in read_metrics(run) if line["step"] <= checkpoint.step]
    for line in lines:
        for key, value in line.items():
            told = key.startswith(MEASURED) or key == NAME_OF_LOSS
            if told and isinstance(value, int | float) and math.isfinite(value):
                found[key] = (line["step"], value)
    if run is None or not found:
        return "## Figures\n\nNone: the record of the run is not beside its checkpoint, or has none up to this step."
    declared = declared_in(read_run(run))
    rows = {key: f"{value:.4f}{_unit(declared.get(key))} at step {step:,}" for key, (step, value) in found.items()}
    return f"## Figures\n\nFrom the record of the run, the last ones up to this step.\n\n{_table(rows)}"


def _unit(metric: Metric | None) -> str:
    return f" {metric.unit}" if metric is not None and metric.unit not in ("", "1") else ""


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
