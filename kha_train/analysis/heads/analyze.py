"""`kha analyze`: looks into the checkpoints of a run on a CPU and keeps what it finds beside them.

A checkpoint of any ZeRO stage and number of ranks becomes one decoder in fp32, with its interaction as it was trained.
A first pass over the probe rows takes the mean output of each head, a second all other figures and the loss, and one
more for each head the loss without it. Of the run, only `<run.dir>/analysis/` is changed.
"""

# H composed heads   N labels   R, C rows and columns of a matrix

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kha_train.analysis.heads.clusters import FEWEST_HEADS, clusters_of
from kha_train.analysis.heads.inspection import (
    PROBE_TOKENS,
    SCHEMA,
    Clusters,
    Inspection,
    LayerInspection,
    LearnedMatrix,
    PerHead,
    read_inspection,
    write_inspection,
)
from kha_train.analysis.heads.matrices import learned_matrices, numbered
from kha_train.analysis.heads.observe import LayerSums, Observer
from kha_train.analysis.heads.probe_rows import Probe, open_probe
from kha_train.checkpoint import layout
from kha_train.checkpoint.loss import check_not_lost
from kha_train.checkpoint.manifest import manifest_sha256
from kha_train.checkpoint.reader import open_verified
from kha_train.config.compose import load
from kha_train.decode.generate import materialise
from kha_train.distributed import World
from kha_train.errors import CheckpointError, ConfigError
from kha_train.model.decoder import Decoder

Damaged = Callable[[Path, CheckpointError], None]
"""Takes the directory of a damaged checkpoint, and what is wrong."""
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""A progress bar with its title and total; inside its block, the function that adds to what is done."""


@dataclass(frozen=True)
class Request:
    """What to look at: so many `tokens` of the run's validation set or of the dataset in `data`; with `silence` the
    loss without each head; every checkpoint or the newest; `again` what is there already.
    """

    tokens: int = PROBE_TOKENS
    data: str = ""
    silence: bool = True
    every_checkpoint: bool = False
    again: bool = False


def analyze_run(run_dir: Path, request: Request, damaged: Damaged, bar: Bar) -> list[Inspection]:
    """The results of the checkpoints of `run_dir` by step, computed and saved unless they are there already.

    `bar` shows the progress of the forwards on each. A damaged checkpoint is reported to `damaged` and skipped. Raises
    ConfigError (no run, no checkpoint, no data), CheckpointError when all are damaged, and as `open_probe`.
    """
    config, checkpoints = load(run_dir / "config.yaml"), checkpoints_of(run_dir)
    probe, heads = open_probe(config, request.tokens, request.data), config.attention.base.heads().query_heads
    found: list[Inspection] = []
    fault: CheckpointError | None = None
    for step, path in checkpoints:
        with ExitStack() as held:
            manifest = manifest_sha256(path) or ""
            known = None if request.again else read_inspection(run_dir, step, manifest)
            if known is None or not _answers(known, probe, request):
                try:
                    checkpoint = open_verified(path, World.single(), held)
                except CheckpointError as error:
                    damaged(path, error)
                    fault = fault or error
                    continue
                decoder = materialise(config, checkpoint, torch.device("cpu"))
                forwards = len(probe.batches) * (2 + (config.model.layers * heads if request.silence else 0))
                with bar(f"{run_dir.name} {path.name}", forwards) as advance:
                    known = inspect(decoder, step, manifest, probe, request.silence, advance)
                write_inspection(run_dir, known)
        found.append(known)
        if not request.every_checkpoint:
            break
    if fault and not found:
        raise fault
    return sorted(found, key=lambda one: one.step)


def checkpoints_of(run_dir: Path) -> list[tuple[int, Path]]:
    """The step and directory of each checkpoint of a run, the newest first. Raises ConfigError when there is none yet,
    CheckpointError when they are lost, DataError when the events of the run are damaged.
    """
    check_not_lost(run_dir)
    found: dict[int, Path] = {}
    for step, path in layout.candidates(run_dir / layout.FOLDER):
        found.setdefault(step, path)
    if not found:
        raise ConfigError("the run has no checkpoint yet", field="run", value=str(run_dir))
    return list(found.items())


def inspect(
    decoder: Decoder, step: int, manifest: str, probe: Probe, silence: bool, advance: Callable[[int], None]
) -> Inspection:
    """What there is to see in a decoder on a CPU after `step` steps; `manifest` is the SHA-256 of the manifest that it
    was read from. `advance(1)` is called after each forward.
    """
    base, interaction = decoder.config.attention.base, decoder.config.attention.interaction
    heads, observer = base.heads(), Observer(decoder.eval(), probe.batches, partial(advance, 1))
    layers, nats_N = observer.sums(observer.mean_outputs())
    loss = float(nats_N.mean())
    rises = [_rises(observer, layer, heads.query_heads, nats_N) for layer in range(len(layers))] if silence else None
    inspected = _layers(decoder, layers, rises)
    queries = max((layer.weights.queries for layer in layers if layer.weights), default=0)
    return Inspection(
        SCHEMA,
        step,
        manifest,
        f"kha_train {version('kha_train')}",
        base.name,
        interaction.name,
        heads.query_heads,
        heads.kv_heads,
        replace(probe.about, queries=queries),
        loss,
        inspected,
        _absent(decoder, inspected),
    )


def _answers(known: Inspection, probe: Probe, request: Request) -> bool:
    """Whether a saved result is of these rows, and has what is asked for."""
    has_rises = all(layer.rise is not None for layer in known.layers)
    return known.probe.digest == probe.about.digest and (has_rises or not request.silence)


def _rises(observer: Observer, layer: int, heads: int, nats_N: Tensor) -> tuple[PerHead, PerHead]:
    """By how much the loss rises without each head, and the standard error of that: labels of one document are alike,
    so it is that of sums over documents.
    """
    document_N, rises, errors = observer.documents(), [], []
    documents = len(document_N.unique())
    factor = (documents / (documents - 1)) ** 0.5 if documents > 1 else math.nan
    for head in range(heads):
        rise_N = observer.silenced(layer, head) - nats_N
        mean = rise_N.mean()
        sums = torch.bincount(document_N, weights=rise_N - mean)
        rises.append(float(mean))
        errors.append(factor * float(sums.norm() / len(rise_N)))
    return tuple(rises), tuple(errors)


def _layers(
    decoder: Decoder, layers: list[LayerSums], rises: list[tuple[PerHead, PerHead]] | None
) -> tuple[LayerInspection, ...]:
    matrices: list[list[LearnedMatrix]] = [[] for _ in layers]
    for number, matrix in learned_matrices(decoder):
        matrices[number].append(matrix)
    found = []
    for number, sums in enumerate(layers):
        rise, error = (None, None) if rises is None else rises[number]
        derivatives = {name: one.derivative() for name, one in sums.gates.items()}
        effective = (numbered(name, "effective", mean, 1.0) for name, mean in derivatives.items() if mean is not None)
        learned = (*matrices[number], *chain.from_iterable(effective))
        clusters = (_clusters(matrix, rise) for matrix in learned)
        found.append(
            LayerInspection(
                number,
                sums.outputs.figures(),
                sums.weights.figures() if sums.weights else None,
                rise,
                tuple(one.figures(name) for name, one in sums.gates.items()),
                learned,
                tuple(one for one in clusters if one is not None),
                error,
            )
        )
    return tuple(found)


def _clusters(matrix: LearnedMatrix, rise: PerHead | None) -> Clusters | None:
    """The groups of the heads that a matrix composes; None where it composes none, or too few. The importance of a
    key/value head is the mean of its query heads'.
    """
    values_RC = matrix.array_RC()
    composed = values_RC.shape[1]
    if matrix.acts != "across" or composed < FEWEST_HEADS or not np.isfinite(values_RC).all():
        return None
    known = rise is not None and np.isfinite(rise).all()
    importance_H = np.array(rise).reshape(composed, -1).mean(axis=1) if known else None
    return clusters_of(matrix.name, values_RC, importance_H)


def _absent(decoder: Decoder, layers: tuple[LayerInspection, ...]) -> dict[str, str]:
    """The quantities that no layer has, each with the reason."""
    base, interaction = decoder.config.attention.base.name, decoder.config.attention.interaction.name
    matrices = [matrix for layer in layers for matrix in layer.matrices]
    across = [matrix for matrix in matrices if matrix.acts == "across"]
    reasons = {
        "weights": f"{base} has no attention weights that sum to 1, or no token attends to two tokens",
        "rise": "no head was silenced",
        "gates": f"neither {base} nor {interaction} has a gate",
        "matrices": f"heads exchange no information in {base} with {interaction}",
        "clusters": f"it takes {FEWEST_HEADS} composed heads, and {across[0].name} has {len(across[0].values)}"
        if across
        else f"no matrix of {base} with {interaction} composes heads",
    }
    return {name: reason for name, reason in reasons.items() if not any(getattr(layer, name) for layer in layers)}
