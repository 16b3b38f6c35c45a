"""Kernel PCA of what the attention heads of a trained layer give for the tokens of a probe batch."""

# N vectors: the outputs of all heads for some tokens   R components   H heads   W value head width

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kha_train.analysis.heads.analyze import checkpoints_of
from kha_train.analysis.heads.observe import Observer
from kha_train.analysis.heads.probe_rows import open_probe
from kha_train.analysis.kernel_pca.algorithms import gaussian
from kha_train.analysis.kernel_pca.trial import Problem, median_distance, solve
from kha_train.checkpoint.reader import open_verified
from kha_train.config.compose import load
from kha_train.decode.generate import materialise
from kha_train.distributed import World
from kha_train.errors import ConfigError, between


@dataclass(frozen=True)
class HeadComponents:
    """Of `layer` after `step` steps: the `problem`, solved by every method; of each exact component the share of the
    whole variance in feature space, and how much of the component's own variance lies between heads: 1 if it only
    tells heads apart, 0 if all heads have the same mean.
    """

    step: int
    layer: int
    heads: int
    problem: Problem
    shares: tuple[float, ...]
    between_heads: tuple[float, ...]


def head_components(
    run_dir: Path, layer: int, count: int, components: int, passes: int, seeds: int, advance: Callable[[int], None]
) -> HeadComponents:
    """Kernel PCA of about `count` outputs of the newest checkpoint of a run, of equally many for each head.

    `advance` is called for finished passes. Raises ConfigError for an unknown layer, CheckpointError for a
    damaged checkpoint, and as `checkpoints_of` and `open_probe`.
    """
    step, outputs_NHW = _outputs(run_dir, layer, count)
    heads = outputs_NHW.shape[1]
    chosen = np.random.default_rng(0).permutation(len(outputs_NHW))[: max(2, count // heads)]
    vectors_NW = outputs_NHW[chosen].reshape(-1, outputs_NHW.shape[2])
    problem = solve(vectors_NW, gaussian(median_distance(vectors_NW)), components, passes, seeds, advance)
    kernel_NN = problem.kernel.matrix()
    coordinates_NR = kernel_NN @ problem.exact_RN.T
    shares_R = np.array(problem.eigenvalues) / np.trace(kernel_NN)
    between_R = between_groups(coordinates_NR, np.tile(np.arange(heads), len(chosen)))
    return HeadComponents(step, layer, heads, problem, tuple(shares_R.tolist()), tuple(between_R.tolist()))


def between_groups(coordinates_NR: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """For each coordinate the share of its variance that lies between the means of groups, [R]."""
    apart_NR = coordinates_NR - coordinates_NR.mean(0)
    sums_R = np.zeros(apart_NR.shape[1])
    for group in np.unique(group_N):
        members_NR = apart_NR[group_N == group]
        sums_R += len(members_NR) * members_NR.mean(0) ** 2
    share_R: np.ndarray = sums_R / (apart_NR**2).sum(0)
    return share_R


def _outputs(run_dir: Path, layer: int, count: int) -> tuple[int, np.ndarray]:
    """The step, and the outputs [N, H, W] in float64. Raises ConfigError for an unknown layer."""
    config = load(run_dir / "config.yaml")
    if not 0 <= layer < config.model.layers:
        allowed = between(0, config.model.layers - 1)
        raise ConfigError("the model has no such layer", field="--layer", value=layer, allowed=allowed)
    step, path = checkpoints_of(run_dir)[0]
    probe = open_probe(config, count)
    with ExitStack() as held:
        decoder = materialise(config, open_verified(path, World.single(), held), torch.device("cpu"))
        return step, Observer(decoder.eval(), probe.batches, lambda: None).outputs(layer).double().numpy()
