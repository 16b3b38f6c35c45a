"""Figures of a whole model from `kha analyze`, for studies that ask about heads and learned matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kha_train.analysis.heads.inspection import LayerInspection, LearnedMatrix
from kha_train.analysis.heads.table import layer_row
from kha_train.errors import CheckpointError

Advance = Callable[[int], None]


def heads_figure(run_dir: Path, name: str) -> float | None:
    """The figure `name` of `FIGURES` of the newest checkpoint of a run: its mean over layers, and over the matrices of
    a layer. None where the variant has no such thing. Computes what is not saved yet, which takes seconds.

    Raises as `analyze_run`.
    """
    # Torch is needed only where something is computed.
    from kha_train.analysis.heads.analyze import Request, analyze_run

    (inspection,) = analyze_run(run_dir, Request(silence=False), _unheard, _no_bar)
    found = [value for layer in inspection.layers for value in FIGURES[name](layer) if math.isfinite(value)]
    return float(np.mean(found)) if found else None


def _of_row(name: str) -> Callable[[LayerInspection], list[float]]:
    def of(layer: LayerInspection) -> list[float]:
        value = layer_row(layer)[name]
        return [] if value is None else [value]

    return of


def _unheard(checkpoint: Path, error: CheckpointError) -> None:
    """A damaged checkpoint is passed over; the run's own record tells of it."""


@contextmanager
def _no_bar(name: str, forwards: int) -> Iterator[Advance]:
    """A study shows its own progress."""
    yield lambda count: None


def _matrices(layer: LayerInspection) -> Iterable[LearnedMatrix]:
    """The learned matrices at whose value `identity` heads pass unchanged; gates and derivatives are left out."""
    return (matrix for matrix in layer.matrices if matrix.acts != "effective" and matrix.identity)


FIGURES: Mapping[str, Callable[[LayerInspection], list[float]]] = {
    **{name: _of_row(name) for name in ("cosine", "centred_cosine", "cka", "diversity", "entropy", "sink")},
    "rank": _of_row("head_rank"),
    "diagonal": lambda layer: [matrix.diagonal_mean for matrix in _matrices(layer)],
    "off_diagonal_rms": lambda layer: [matrix.off_diagonal_rms for matrix in _matrices(layer)],
    "distance": lambda layer: [matrix.distance for matrix in _matrices(layer) if matrix.distance is not None],
    "silhouette_p": lambda layer: [found.p for found in layer.clusters],
}
"""Figures of a layer by name, as docs/analyze.md defines them: one for the layer, or one for each matrix."""
