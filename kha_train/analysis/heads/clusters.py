"""Groups of composed heads: agglomerative clustering of their compositions, against matrices of shuffled coefficients.

A composition o = sum of heads i times M[i, o] is column o of its matrix. Two composed heads are as far apart as 1 minus
the cosine of their columns; groups merge by average distance. The number of groups, 2 to all but one, is that with the
largest mean silhouette (Rousseeuw 1987), in the shuffled matrices too, so that the choice is part of the test.
"""

# H composed heads   R components   G groups

from __future__ import annotations

import numpy as np

from kha_train.analysis.heads.inspection import Clusters

FEWEST_HEADS = 4
"""Fewer heads have no two groups of more than one head."""
SHUFFLES = 199
"""Shuffled matrices, which make p a multiple of 1 / 200."""


def clusters_of(name: str, values_RH: np.ndarray, importance_H: np.ndarray | None) -> Clusters:
    """The groups of the heads that `values_RH` composes, and how much of the variance of `importance_H` lies between
    them. The same input gives the same p: the shuffles are seeded.
    """
    drawn = np.random.default_rng(0)
    labels_H, silhouette = grouped(values_RH)
    null = [grouped(shuffled(values_RH, drawn))[1] for _ in range(SHUFFLES)]
    labels = tuple(labels_H.tolist())
    if importance_H is None:
        return Clusters(name, labels, silhouette, _share_reaching(null, silhouette), None, None)
    share = between_groups(importance_H, labels_H)
    by_chance = [between_groups(importance_H, drawn.permutation(labels_H)) for _ in range(SHUFFLES)]
    reached = _share_reaching(null, silhouette), share, _share_reaching(by_chance, share)
    return Clusters(name, labels, silhouette, *reached)


def grouped(values_RH: np.ndarray) -> tuple[np.ndarray, float]:
    """The label of each head, numbered by first appearance, and the mean silhouette of the best number of groups."""
    distance_HH = _distances(values_RH)
    best, best_labels_H = -np.inf, np.zeros(len(distance_HH), dtype=np.int64)
    for labels_H in _merged(distance_HH):
        found = silhouette(distance_HH, labels_H)
        if found > best:
            best, best_labels_H = found, labels_H
    _, numbered_H = np.unique(best_labels_H, return_inverse=True)
    return numbered_H, best


def silhouette(distance_HH: np.ndarray, labels_H: np.ndarray) -> float:
    """The mean over heads of (b - a) / max(a, b): a is the mean distance to the others of its group, b that to the
    nearest other group. A head alone counts 0.
    """
    member_HG = labels_H[:, None] == np.unique(labels_H)
    sums_HG, sizes_G = distance_HH @ member_HG, member_HG.sum(axis=0)
    own = np.where(member_HG, sums_HG, 0.0).sum(axis=1) / np.maximum(member_HG @ sizes_G - 1, 1)
    other = np.where(member_HG, np.inf, sums_HG / sizes_G).min(axis=1)
    largest = np.maximum(own, other)
    alone = member_HG @ sizes_G == 1
    scores = np.divide(other - own, largest, out=np.zeros_like(own), where=(largest > 0) & ~alone)
    return float(scores.mean())


def shuffled(values_RH: np.ndarray, drawn: np.random.Generator) -> np.ndarray:
    """Each column with its coefficients in another order. The diagonal of a square matrix stays: heads that are mostly
    themselves are no sign of groups.
    """
    rows, columns = values_RH.shape
    mixed_RH = values_RH.copy()
    for column in range(columns):
        others = np.arange(rows) != column if rows == columns else np.ones(rows, dtype=bool)
        mixed_RH[others, column] = drawn.permutation(values_RH[others, column])
    return mixed_RH


def between_groups(values_H: np.ndarray, labels_H: np.ndarray) -> float:
    """The share of the variance of `values_H` between the groups; 0 where there is no variance."""
    apart_H = values_H - values_H.mean()
    total = float(apart_H @ apart_H)
    sizes = np.bincount(labels_H)
    sums = np.bincount(labels_H, weights=apart_H)
    return float((sums**2 / np.maximum(sizes, 1)).sum() / total) if total else 0.0


def _merged(distance_HH: np.ndarray) -> list[np.ndarray]:
    """The labels after each merge of the two nearest groups, as long as there are two groups."""
    heads = len(distance_HH)
    labels_H, sizes = np.arange(heads), np.ones(heads)
    apart_HH = distance_HH + np.diag(np.full(heads, np.inf))
    found = []
    for _ in range(heads - 2):
        first, second = divmod(int(apart_HH.argmin()), heads)
        weights = sizes[first], sizes[second]
        joined_H = (weights[0] * apart_HH[first] + weights[1] * apart_HH[second]) / sum(weights)
        joined_H[first] = np.inf
        apart_HH[first], apart_HH[:, first] = joined_H, joined_H
        apart_HH[second], apart_HH[:, second] = np.inf, np.inf
        sizes[first] += sizes[second]
        labels_H = np.where(labels_H == second, first, labels_H)
        found.append(labels_H)
    return found


def _distances(values_RH: np.ndarray) -> np.ndarray:
    """1 - cosine of every pair of columns; 1 for a column of zeros."""
    norms_H = np.linalg.norm(values_RH, axis=0)
    unit_RH = np.divide(values_RH, norms_H, out=np.zeros_like(values_RH), where=norms_H > 0)
    distance_HH: np.ndarray = np.maximum(1.0 - unit_RH.T @ unit_RH, 0.0)
    np.fill_diagonal(distance_HH, 0.0)
    return distance_HH


def _share_reaching(null: list[float], found: float) -> float:
    """The share of `null` and of the finding itself that is as large."""
    return (1 + sum(one >= found - 1e-12 for one in null)) / (1 + len(null))
