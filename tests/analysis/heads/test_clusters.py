"""Groups of composed heads, and how surprising they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kha_train.analysis.heads.analyze import _clusters
from kha_train.analysis.heads.clusters import between_groups, clusters_of, grouped, shuffled, silhouette
from kha_train.analysis.heads.matrices import learned_matrix


def test_the_silhouette_is_that_of_its_definition() -> None:
    """Points 0, 1, 5, 6, 20 on a line; groups {0, 1}, {5, 6}, {20}."""
    points = np.array([0.0, 1.0, 5.0, 6.0, 20.0])
    distance = np.abs(points[:, None] - points)
    expected = [(5.5 - 1) / 5.5, (4.5 - 1) / 4.5, (4.5 - 1) / 4.5, (5.5 - 1) / 5.5, 0.0]
    assert silhouette(distance, np.array([0, 0, 1, 1, 2])) == pytest.approx(sum(expected) / 5)


def test_heads_of_one_composition_are_one_group_and_no_shuffle_comes_near() -> None:
    """Eight heads made of two pairs of patterns; silenced, those of one pattern cost more."""
    drawn = np.random.default_rng(3)
    patterns = drawn.normal(size=(8, 2))
    members = np.array([0, 1, 1, 0, 0, 1, 0, 1])
    values = patterns[:, members] + 0.05 * drawn.normal(size=(8, 8))
    importance = np.where(members == 0, 1.0, 3.0) + 0.01 * drawn.normal(size=8)
    found = clusters_of("compose", values, importance)
    assert found.labels == tuple(members) and found.silhouette > 0.9 and found.p == 1 / 200
    # 70 ways to choose four heads of eight, of which two are this one: a shuffle finds it once in 35.
    assert found.importance_share > 0.99 and 0.005 <= found.importance_p < 0.1
    assert clusters_of("compose", values, importance) == found
    alone = clusters_of("compose", values, None)
    assert (alone.importance_share, alone.importance_p) == (None, None) and alone.labels == found.labels


def test_heads_near_themselves_without_a_pattern_are_no_groups() -> None:
    """Of the identity with small noise about one in twenty reaches p 0.05; here it is 20 matrices."""
    drawn = np.random.default_rng(5)
    p = [clusters_of("compose", np.eye(6) + 0.1 * drawn.normal(size=(6, 6)), None).p for _ in range(20)]
    assert sum(one <= 0.05 for one in p) <= 3 and 0.25 < np.mean(p) < 0.75
    assert clusters_of("compose", np.eye(6), None).p == 1.0


def test_merging_takes_the_mean_distance_of_all_pairs() -> None:
    """At angles 0, 10, 30, 90 and 100 degrees: the pairs merge first, then 30 joins {0, 10}."""
    angles = np.radians([0.0, 10.0, 30.0, 90.0, 100.0])
    labels, score = grouped(np.stack([np.cos(angles), np.sin(angles)]))
    assert labels.tolist() == [0, 0, 0, 1, 1] and score > 0.8


def test_a_shuffle_moves_coefficients_within_their_column_and_keeps_the_diagonal() -> None:
    drawn = np.random.default_rng(0)
    square, oblong = drawn.normal(size=(6, 6)), drawn.normal(size=(6, 3))
    mixed = shuffled(square, np.random.default_rng(1))
    assert np.array_equal(np.sort(mixed, axis=0), np.sort(square, axis=0)) and not np.array_equal(mixed, square)
    assert np.array_equal(mixed.diagonal(), square.diagonal())
    assert np.array_equal(np.sort(shuffled(oblong, drawn), axis=0), np.sort(oblong, axis=0))


def test_the_variance_between_groups_is_its_share_of_the_whole() -> None:
    """Values 1, 3 and 7, 9: the means 2 and 8 lie 3 from 5, so 36 of 40."""
    assert between_groups(np.array([1.0, 7.0, 3.0, 9.0]), np.array([0, 1, 0, 1])) == pytest.approx(36 / 40)
    assert between_groups(np.ones(4), np.array([0, 1, 0, 1])) == 0.0


def test_a_loss_that_is_not_finite_says_nothing_about_the_importance_of_heads() -> None:
    matrix = learned_matrix("compositions", "across", torch.eye(4) + torch.arange(16.0).view(4, 4) / 50, None)
    found = _clusters(matrix, (0.1, math.nan, 0.2, 0.3))
    assert found is not None and found.importance_share is None and found.importance_p is None
    known = _clusters(matrix, (0.1, 0.4, 0.2, 0.3))
    assert known is not None and known.importance_p is not None and known.p == found.p
