"""The saved results of `kha analyze`: one strict JSON file per checkpoint, `<run.dir>/analysis/step-XXXXXXXX.json`.

Only this file knows their format. Each result holds the SHA-256 of its checkpoint's manifest: a result whose checkpoint
was replaced since is stale, and no reader gets to see it. Quantities that a variant does not have are None or empty,
and `Inspection.absent` gives the reason.
"""

# H query heads   R, C rows and columns of a matrix

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from kha_train.checkpoint.layout import FOLDER as CHECKPOINTS
from kha_train.checkpoint.layout import step_name
from kha_train.checkpoint.manifest import manifest_sha256
from kha_train.errors import FormatError
from kha_train.foreign.documents import Json, parse_json
from kha_train.foreign.files import read_regular
from kha_train.foreign.typed import Count, Source
from kha_train.record import read_discarded
from kha_train.record.files import replace_json
from kha_train.record.jsonl import decode

SCHEMA = 1
"""The version of the format. A result of another version is not read; an older one is computed again."""
FOLDER = "analysis"
"""The directory of the results and of their page, inside the run directory."""
PROBE_TOKENS = 4096
"""Tokens that are looked at unless asked otherwise, rounded up to whole rows."""
MAX_BYTES = 2**28
_NAME = re.compile(r"step-[0-9]{8,15}\.json")
_FIX = "remove it; `kha analyze` makes it again"

PerHead = tuple[float, ...]
"""One number per head [H]."""
Square = tuple[tuple[float, ...], ...]
"""One number per pair of heads [H, H]."""
Acts = Literal["within", "across", "effective"]
"""What a matrix does, see `LearnedMatrix`."""


@dataclass(frozen=True)
class ProbeRows:
    """The tokens that were looked at: `rows` of the dataset named by the configuration key `field`, evenly spread.

    `digest` is the SHA-256 of their ids and document borders: results with the same digest compare. `tokens` leaves out
    padding. `documents` is the number of documents or parts of documents, `queries` the number of tokens whose
    attention weights were read.
    """

    field: str
    content_id: str
    digest: str
    rows: int
    tokens: int
    documents: int
    queries: int


@dataclass(frozen=True)
class HeadOutputs:
    """How alike the outputs of a layer's heads are, before the output projection; `width` is that of a head.

    `cosine` and `centred_cosine`: the mean over tokens of the cosine of two heads' outputs, as they are and less each
    head's mean output; `cosine_rank` and `centred_rank`: the effective rank of these two matrices, 1 to H. `cka`:
    linear centred kernel alignment; `cka_floor`: what independent heads with the same covariances would have, on
    average, from so few tokens. `ranks`: the effective rank of each head's own covariance, 1 to `width`.
    """

    width: int
    cosine: Square
    centred_cosine: Square
    cka: Square
    cka_floor: Square
    cosine_rank: float
    centred_rank: float
    ranks: PerHead


@dataclass(frozen=True)
class AttentionWeights:
    """Where the heads of a layer look, means over the query tokens that attend to at least two tokens.

    `entropy`: as a share of the largest possible, log(t + 1) for t earlier tokens. `distance`: in tokens. `sink`: the
    weight on the first token of the document. `divergence`: Kullback-Leibler from the mean of all heads, in nats;
    `diversity` is its mean over heads, the generalised Jensen-Shannon divergence (0: identical heads, at most log H).
    """

    entropy: PerHead
    distance: PerHead
    sink: PerHead
    divergence: PerHead
    diversity: float


@dataclass(frozen=True)
class Gate:
    """The sigmoid gate `name` of a layer: its `mean` and standard `deviation` over tokens, heads and dimensions, and
    the means of the heads it acts on (key/value heads for a gate of values). `closed` is the share of it below 0.1;
    None in results from before this was counted. An untrained gate of a map is 0.5 everywhere.
    """

    name: str
    mean: float
    deviation: float
    head_means: PerHead
    closed: float | None = None


@dataclass(frozen=True)
class LearnedMatrix:
    """A matrix through which heads exchange information, or `effective`, the mean derivative of a gated map.

    `name` is that of the parameter inside the attention, such as `interaction.maps.v.up`, with `[h]` if each head has
    its own. `acts`: `within` each head (x M), `across` heads, or `effective`. With the value `identity` times the
    identity, heads pass unchanged (None: no such value), and `distance` is the Frobenius norm of what differs from it.
    `diagonal_mass` is the share of the diagonal in the squared Frobenius norm, `off_diagonal_ratio` the norm of the
    rest over that of the diagonal (both None for a matrix of zeros, or without a diagonal). `off_diagonal_rms` is the
    root mean square off the diagonal. `singular` are its singular values, largest first; empty when it is not finite.
    `values` are its rows, with four digits.
    """

    name: str
    acts: Acts
    identity: float | None
    distance: float | None
    diagonal_mean: float
    diagonal_mass: float | None
    off_diagonal_ratio: float | None
    off_diagonal_rms: float
    singular: tuple[float, ...]
    values: Json

    def array_RC(self) -> np.ndarray:
        """`values` as float64 [rows, columns]."""
        return np.asarray(self.values, dtype=np.float64)

    def apart_RC(self) -> np.ndarray:
        """What differs from the identity, where the matrix has one; otherwise `values`."""
        values_RC = self.array_RC()
        apart_RC: np.ndarray = values_RC - (self.identity or 0.0) * np.eye(*values_RC.shape)
        return apart_RC


@dataclass(frozen=True)
class Clusters:
    """The heads that the matrix `name` composes, grouped by the cosine of their compositions (its columns).

    `labels`: the group of each composed head. `silhouette`: its mean for the number of groups that is best; `p`: the
    share of matrices with shuffled coefficients that reach it. `importance_share`: the share of the variance of head
    importance that lies between the groups, and `importance_p` the share of shuffled groups that reach it (None where
    no head was silenced, or a loss is not finite).
    """

    name: str
    labels: tuple[int, ...]
    silhouette: float
    p: float
    importance_share: float | None
    importance_p: float | None


@dataclass(frozen=True)
class LayerInspection:
    """Everything about one layer. `rise`: by how much the loss rises when a head is silenced, in nats per token;
    `rise_error`: its standard error over documents, which may differ.
    """

    layer: int
    outputs: HeadOutputs | None
    weights: AttentionWeights | None
    rise: PerHead | None
    gates: tuple[Gate, ...]
    matrices: tuple[LearnedMatrix, ...]
    clusters: tuple[Clusters, ...]
    rise_error: PerHead | None = None


@dataclass(frozen=True)
class Inspection:
    """What `kha analyze` found in one checkpoint.

    `manifest` is the SHA-256 of the checkpoint's manifest, `tool` the release that computed this, `loss` that of the
    probe rows in nats per token. `absent` names the quantities that this variant does not have, each with the reason.
    """

    schema: int
    step: int
    manifest: str
    tool: str
    base: str
    interaction: str
    query_heads: int
    kv_heads: int
    probe: ProbeRows
    loss: float
    layers: tuple[LayerInspection, ...]
    absent: dict[str, str]

    def matrices(self) -> dict[str, tuple[LearnedMatrix, ...]]:
        """The learned matrices by name, each a tuple over layers."""
        found: dict[str, tuple[LearnedMatrix, ...]] = {}
        for layer in self.layers:
            for matrix in layer.matrices:
                found[matrix.name] = (*found.get(matrix.name, ()), matrix)
        return found


class _Head(TypedDict):
    """What every version of the formats has."""

    schema: Count


def mean_off_diagonal(square: Sequence[Sequence[float]]) -> float:
    """The mean over pairs of different heads; nan for one head."""
    values_HH = np.asarray(square, dtype=np.float64)
    heads = len(values_HH)
    if heads < 2:
        return float("nan")
    return float((values_HH.sum() - np.trace(values_HH)) / (heads * (heads - 1)))


def path_of(run_dir: Path, step: int) -> Path:
    """The file of the result of `step`."""
    return run_dir / FOLDER / f"{step_name(step)}.json"


def write_inspection(run_dir: Path, inspection: Inspection) -> Path:
    """Writes the result to its file, atomically, and returns the path. Raises OSError."""
    path = path_of(run_dir, inspection.step)
    path.parent.mkdir(exist_ok=True)
    replace_json(path, asdict(inspection))
    return path


def read_inspections(run_dir: Path) -> list[Inspection]:
    """The results of a run by step, without stale ones and those of another version of the format.

    A result outlives its checkpoint, unless the run went back behind that step. Raises DataError when a file is
    damaged, OSError when it cannot be read.
    """
    folder = run_dir / FOLDER
    names = sorted(path.name for path in folder.iterdir() if _NAME.fullmatch(path.name)) if folder.is_dir() else []
    found = [inspection for name in names if (inspection := _read(folder / name)) is not None]
    undone = cache(lambda: {line["step"] for line in read_discarded(run_dir)})
    current = (one for one in found if is_current(run_dir, one.step, one.manifest, undone))
    return sorted(current, key=lambda one: one.step)


def is_current(run_dir: Path, step: int, manifest: str, undone: Callable[[], set[int]] | None = None) -> bool:
    """Whether the checkpoint of `step` with that manifest is still one of the run. If it was removed, the run must not
    have gone back behind that step; `undone` returns the steps that the run undid (None: they are read here).
    """
    saved = manifest_sha256(run_dir / CHECKPOINTS / step_name(step))
    if saved is not None:
        return saved == manifest
    return step not in (undone() if undone else {line["step"] for line in read_discarded(run_dir)})


def read_inspection(run_dir: Path, step: int, manifest: str) -> Inspection | None:
    """The result of the checkpoint of `step` with that manifest; None where it must be computed: there is no file, it
    is of another checkpoint, or of an older version of the format.

    Raises FormatError when it is of a later version, otherwise as `read_inspections`.
    """
    path = path_of(run_dir, step)
    found = _read(path)
    if found is None and (version := _version(path)) > SCHEMA:
        fix = f"use the version that wrote it, or remove {path}"
        raise FormatError("was written by a later version", field=f"{path} schema", value=version, fix=fix)
    return found if found is not None and found.manifest == manifest else None


def _version(path: Path) -> int:
    """The version of the format of a result; 0 where there is no file."""
    values = _values(path)
    return 0 if values is None else int(values["schema"])


def _read(path: Path) -> Inspection | None:
    """The result in `path`; None when there is none, or none of this version. Raises DataError when it is damaged."""
    values = _values(path)
    if values is None or values["schema"] != SCHEMA:
        return None
    source = Source(str(path), fix=_FIX)
    found = source.read(Inspection, values)
    for layer in found.layers:
        for matrix in layer.matrices:
            _check_values(matrix, source, f"layers[{layer.layer}] {matrix.name}")
    return found


def _values(path: Path) -> Mapping[str, Any] | None:
    return saved_values(path, Source(str(path), fix=_FIX))


def saved_values(path: Path, source: Source) -> Mapping[str, Any] | None:
    """What a result of this room holds, as plain values; None where there is no such file. Raises DataError when it is
    damaged, as `source` says.
    """
    raw = read_regular(path, MAX_BYTES)
    if raw is None:
        return None
    try:
        values = decode(parse_json(raw))
    except ValueError as error:
        raise source.fault("", f"is damaged: {error}") from error
    head: Mapping[str, Any] = source.read(_Head, values)
    return head


def _check_values(matrix: LearnedMatrix, source: Source, place: str) -> None:
    """Raises DataError unless the values are rows of numbers of one length."""
    try:
        shape = matrix.array_RC().shape
    except (TypeError, ValueError) as error:
        raise source.fault(place, f"its values are no matrix: {error}") from error
    if len(shape) != 2 or 0 in shape:
        raise source.fault(place, "its values are no matrix", list(shape))
