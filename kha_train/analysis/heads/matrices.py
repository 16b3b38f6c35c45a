"""Figures of the matrices through which heads exchange information: how far from the identity, how much off the
diagonal, their singular values.
"""

# R, C rows and columns

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from kha_train.analysis.heads.inspection import Acts, LearnedMatrix
from kha_train.model.attention.projection import Matrix
from kha_train.model.decoder import Decoder
from kha_train.model.init import Initial, interaction_identities

DIGITS = 4
"""Significant digits of the saved values."""
_IN_LAYER = re.compile(r"blocks\.(\d+)\.attention\.(.+?)(?:\.weight)?")


def learned_matrices(decoder: Decoder) -> Iterator[tuple[int, LearnedMatrix]]:
    """Each matrix that a variant declares as one through which heads exchange information, trained or not, with its
    layer. A vector is no matrix.
    """
    for name, identity in interaction_identities(decoder).items():
        place = _IN_LAYER.fullmatch(name)
        assert place is not None, f"{name} lies in no attention"
        prefix, _, local = name.rpartition(".")
        owner = decoder.get_submodule(prefix)
        acts: Acts = "across" if isinstance(owner, Matrix) and owner.across else "within"
        stored = getattr(owner, local).detach()
        if stored.dim() > 1:
            yield from ((int(place[1]), one) for one in numbered(place[2], acts, stored, _diagonal(identity)))


def numbered(name: str, acts: Acts, stored: Tensor, identity: float | None) -> Iterator[LearnedMatrix]:
    """The figures of one matrix or, of more than two dimensions, of each matrix of a stack, numbered in its name."""
    if stored.dim() == 2:
        yield learned_matrix(name, acts, stored, identity)
        return
    for number, values_RC in enumerate(stored.flatten(0, -3)):
        yield learned_matrix(f"{name}[{number}]", acts, values_RC, identity)


def learned_matrix(name: str, acts: Acts, stored_RC: Tensor, identity: float | None) -> LearnedMatrix:
    """The figures of one matrix, computed in float64."""
    values_RC = stored_RC.double()
    rows, columns = values_RC.shape
    diagonal = values_RC.diagonal()
    on, off = float(diagonal.square().sum()), float((values_RC.square().sum() - diagonal.square().sum()).clamp(min=0.0))
    square, elsewhere = rows == columns, rows * columns - len(diagonal)
    distance = None
    if identity is not None:
        distance = float((values_RC - identity * torch.eye(rows, columns, dtype=torch.float64)).norm())
    is_finite = bool(torch.isfinite(values_RC).all())
    return LearnedMatrix(
        name,
        acts,
        identity,
        distance,
        float(diagonal.mean()),
        on / (on + off) if square and on + off else None,
        (off / on) ** 0.5 if square and on else None,
        (off / elsewhere) ** 0.5 if elsewhere else 0.0,
        tuple(torch.linalg.svdvals(values_RC).tolist()) if is_finite else (),
        [[float(f"{value:.{DIGITS}g}") for value in row] for row in values_RC.tolist()],
    )


def _diagonal(identity: Initial | None) -> float | None:
    """The value on the diagonal of the matrix that leaves heads unchanged."""
    return None if identity is None else float(identity.draw((1, 1), torch.Generator()).item())
