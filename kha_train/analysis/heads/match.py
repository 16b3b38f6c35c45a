"""`kha analyze --match`: the heads of two trained checkpoints on the same tokens, matched layer by layer."""

# N tokens   H heads of the reference   I heads of the run   W, X their widths   Q query tokens   U attended tokens

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from kha_train.analysis.heads.analyze import Bar, Request, checkpoints_of
from kha_train.analysis.heads.matches import SCHEMA, LayerMatch, Match, matched, read_match, write_match
from kha_train.analysis.heads.observe import Observer
from kha_train.analysis.heads.probe_rows import open_probe
from kha_train.checkpoint.manifest import manifest_sha256
from kha_train.checkpoint.reader import open_verified
from kha_train.config.compose import load
from kha_train.config.schema import RunConfig
from kha_train.decode.generate import materialise
from kha_train.distributed import World
from kha_train.errors import ConfigError
from kha_train.record import read_run


def match_runs(run_dir: Path, reference_dir: Path, reference: str, request: Request, bar: Bar) -> Match:
    """Which head of the newest checkpoint of `run_dir` plays the part of which head of that of `reference_dir`, called
    `reference` in the result. Computed and saved unless it is there already; `bar` shows the progress of the forwards.

    Raises ConfigError for models of other layers or heads, for other rows of data, and without scipy; CheckpointError
    when a newest checkpoint is damaged, and as `checkpoints_of` and `open_probe`.
    """
    places = [run_dir, reference_dir]
    configs = [load(place / "config.yaml") for place in places]
    _check_alike(*configs)
    ours, theirs = (open_probe(config, request.tokens, request.data) for config in configs)
    if ours.about.digest != theirs.about.digest:
        fix = "name a dataset for both with --data"
        raise ConfigError("is looked at on other rows than the run", field="--match", value=reference, fix=fix)
    (step, path), (other_step, other_path) = (checkpoints_of(place)[0] for place in places)
    manifests = [manifest_sha256(one) or "" for one in (path, other_path)]
    reference_id = str(read_run(reference_dir).get("run_id", ""))
    known = None if request.again else read_match(run_dir, reference_id)
    if known and [known.manifest, known.reference_manifest] == manifests and known.probe == ours.about:
        return known
    title = f"{run_dir.name} beside {reference}"
    forwards = 4 * configs[0].model.layers * len(ours.batches)
    with ExitStack() as held:
        decoders = [
            materialise(config, open_verified(one, World.single(), held), torch.device("cpu"))
            for config, one in zip(configs, (path, other_path), strict=True)
        ]
        advance = partial(held.enter_context(bar(title, forwards)), 1)
        run, other = (Observer(decoder.eval(), ours.batches, advance) for decoder in decoders)
        layers = tuple(matched_layer(layer, other, run) for layer in range(configs[0].model.layers))
    tool = f"kha_train {version('kha_train')}"
    match = Match(
        SCHEMA, tool, step, manifests[0], reference, reference_id, other_step, manifests[1], ours.about, layers
    )
    write_match(run_dir, match)
    return match


def matched_layer(layer: int, reference: Observer, run: Observer) -> LayerMatch:
    """The heads of a layer of both, whose batches are the same."""
    aligned_HI = alignment(reference.outputs(layer), run.outputs(layer))
    patterns = reference.patterns(layer), run.patterns(layer)
    weights = matched(pattern_cosine(*patterns).numpy()) if all(patterns) else None
    return LayerMatch(layer, matched(aligned_HI.numpy()), weights)


def alignment(ours_NHW: Tensor, theirs_NIX: Tensor) -> Tensor:
    """Linear CKA of each head of one model with each of another, |C_hi|^2 / (|C_hh| |C_ii|), [H, I] in float64."""
    ours_NHW, theirs_NIX = (x - x.mean(dim=0) for x in (ours_NHW.double(), theirs_NIX.double()))
    crossed_HWIX = torch.einsum("nhw,nix->hwix", ours_NHW, theirs_NIX)
    norms_H, norms_I = (torch.stack([(head.T @ head).norm() for head in x.unbind(1)]) for x in (ours_NHW, theirs_NIX))
    aligned_HI: Tensor = crossed_HWIX.square().sum(dim=(1, 3)) / torch.outer(norms_H, norms_I)
    return aligned_HI


def pattern_cosine(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """The mean over queries of the cosine of the weights of each head of one model with those of each of another,
    [H, I] in float64. Both are [H, Q, U] for the same queries.
    """
    total_HI, queries = torch.zeros((), dtype=torch.float64), 0
    for ours_HQU, theirs_IQU in zip(ours, theirs, strict=True):
        unit_HQU, unit_IQU = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (ours_HQU, theirs_IQU))
        total_HI = total_HI + unit_HQU.flatten(1) @ unit_IQU.flatten(1).T
        queries += ours_HQU.shape[1]
    return total_HI / queries


def _check_alike(run: RunConfig, reference: RunConfig) -> None:
    """Raises ConfigError unless both have as many layers and query heads."""
    counts = [
        {"model.layers": config.model.layers, "query heads": config.attention.base.heads().query_heads}
        for config in (run, reference)
    ]
    for key, ours in counts[0].items():
        theirs = counts[1][key]
        if ours != theirs:
            raise ConfigError(
                f"heads are matched one to one, and {key} differ", field="--match", value=theirs, allowed=str(ours)
            )
