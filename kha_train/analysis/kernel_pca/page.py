"""The page of `kha kernel-pca`, and its numbers as plain values."""

# N passes   M vectors   D coordinates

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kha_train.analysis.kernel_pca.digits import SIDE
from kha_train.analysis.kernel_pca.heads import HeadComponents
from kha_train.analysis.kernel_pca.trial import Denoised, Problem, Trial
from kha_train.analysis.report.content import Axis, Figure, Maps, Row, Section, Series, Style, Table, Text
from kha_train.analysis.report.html import page

AXES = (Axis("passes", "passes over all vectors"), Axis("seconds", "seconds of the steps"))
FRAME = Axis("frame", "frame")
ACROSS, SHOWN, FRAMES = 4, 16, 120
"""Digits in a row, digits and frames that the page shows."""
NAMES = {
    "constant": "constant gain",
    "t": "KHA/t",
    "et": "KHA/et",
    "et_normalised": "KHA/et normalised",
    "smd": "stochastic meta-descent",
}


def write_page(trial: Trial, path: Path, mark: str) -> None:
    """Write the page, with `mark` in its head. Raises OSError when it cannot be written."""
    sections = (_convergence(trial.digits), _clusters(trial), _images(trial.images), _walk(trial.walk))
    meta = f'<meta name="generator" content="{mark}">'
    title = "Kernel PCA: exact, and by the Kernel Hebbian Algorithm"
    seeds = len(next(iter(trial.digits.streamed.values())).errors)
    path.write_text(page(title, meta, f"seeds: {seeds}", sections, AXES), encoding="utf-8")


def write_heads_page(found: HeadComponents, path: Path, mark: str) -> None:
    """Write the page about head outputs, with `mark` in its head. Raises OSError when it cannot be written."""
    rows = tuple(
        Row(str(number), (f"{share:.3f}", f"{between:.3f}"))
        for number, (share, between) in enumerate(zip(found.shares, found.between_heads, strict=True), start=1)
    )
    words = (
        f"{len(found.problem.kernel)} outputs of {found.heads} heads of layer {found.layer} after {found.step} steps. "
        "Share of the variance in feature space, and how much of the component's variance lies between heads."
    )
    table = Table(("component", "share", "between heads"), rows)
    sections = (Section("components", "Components", (Text(words), table)), _convergence(found.problem))
    meta = f'<meta name="generator" content="{mark}">'
    seeds = len(next(iter(found.problem.streamed.values())).errors)
    text = page("Kernel PCA of head outputs", meta, f"seeds: {seeds}", sections, AXES)
    path.write_text(text, encoding="utf-8")


def plain_heads(found: HeadComponents) -> dict[str, Any]:
    """The numbers of the page about head outputs, for JSON."""
    about = {"step": found.step, "layer": found.layer, "heads": found.heads, "vectors": len(found.problem.kernel)}
    by_component = {"shares": list(found.shares), "between_heads": list(found.between_heads)}
    return {**about, **by_component, **_problem(found.problem)}


def plain(trial: Trial) -> dict[str, Any]:
    """The numbers, means over seeds, for JSON."""
    return {
        "digits": _problem(trial.digits),
        "affinity": _problem(trial.affinity),
        "purity": dict(trial.purity),
        "denoised_digits": trial.images.errors(),
        "denoised_walk": trial.walk.errors(),
    }


def table_of(problem: Problem) -> Table:
    """Methods by gain, excess error and time."""
    last = next(iter(problem.streamed.values()))
    shown = [number for number in (1, 5, 10, 20, 40) if number < len(last.errors[0])] + [len(last.errors[0])]
    head = ("method", "eta0", *(f"pass {number}" for number in shown), "seconds")
    rows = []
    for name, one in problem.streamed.items():
        errors_N, seconds_N = np.mean(one.errors, axis=0), np.mean(one.seconds, axis=0)
        edge = " (edge of the grid)" if one.at_edge else ""
        values = [f"{errors_N[number - 1]:.1e}" for number in shown]
        rows.append(Row(NAMES[name], (f"{one.eta0:g}{edge}", *values, f"{seconds_N[-1]:.2f}")))
    rows.append(Row("exact (eigh)", ("", *["0"] * len(shown), f"{problem.exact_seconds:.2f}")))
    return Table(head, tuple(rows))


def _problem(problem: Problem) -> dict[str, Any]:
    methods = {
        name: {
            "eta0": one.eta0,
            "at_edge": one.at_edge,
            "excess_by_pass": np.mean(one.errors, axis=0).tolist(),
            "seconds_by_pass": np.mean(one.seconds, axis=0).tolist(),
        }
        for name, one in problem.streamed.items()
    }
    return {"eigenvalues": list(problem.eigenvalues), "exact_seconds": problem.exact_seconds, "methods": methods}


def _convergence(problem: Problem) -> Section:
    series = []
    for number, (name, one) in enumerate(problem.streamed.items()):
        errors_N, seconds_N = np.mean(one.errors, axis=0), np.mean(one.seconds, axis=0)
        x = {"passes": np.arange(1.0, len(errors_N) + 1), "seconds": seconds_N}
        logs_N = np.log10(np.maximum(errors_N, 1e-16))
        series.append(Series(NAMES[name], Style(number, number), "line", x, logs_N))
    words = "Excess is (error - least error) / least error, error being the squared distance of all reconstructions."
    figure = Figure("excess", "Excess reconstruction error", words, "log10 of the excess", AXES, tuple(series))
    return Section("convergence", "Reconstruction error", (table_of(problem), figure))


def _clusters(trial: Trial) -> Section:
    rows = tuple(Row(NAMES.get(name, name), (f"{value:.3f}",)) for name, value in trial.purity.items())
    words = "k-means on the components of the normalised affinity; the share of digits that agree with their group."
    blocks = (Text(words), Table(("method", "purity"), rows), table_of(trial.affinity))
    return Section("clusters", "Spectral clustering of digits", blocks)


def _images(images: Denoised) -> Section:
    blocks = [_errors(images)]
    chosen = {"clean": images.clean_MD, "noisy": images.noisy_MD, **images.found}
    grids = tuple((NAMES.get(name, name), _grid(one_MD[:SHOWN])) for name, one_MD in chosen.items())
    words = "Held-out digits with normal noise of deviation 0.3 on every pixel from 0 to 1; blue is ink."
    return Section("denoising", "De-noising digits", (*blocks, Maps("digits", "Digits", words, 1.0, grids)))


def _walk(walk: Denoised) -> Section:
    chosen = {"clean": walk.clean_MD, "noisy": walk.noisy_MD, **walk.found}
    kept = [name for name in ("noisy", "clean", "linear PCA", "exact", "smd") if name in chosen]
    x = {FRAME.key: np.arange(float(min(FRAMES, len(walk.clean_MD))))}
    series = tuple(
        Series(NAMES.get(name, name), Style(number, number), "line", x, chosen[name][: len(x[FRAME.key]), 5])
        for number, name in enumerate(kept)
    )
    words = "Markers of two legs with normal noise of deviation 0.05; the components are those of the noisy frames."
    figure = Figure("ankle", "Height of an ankle", words, "height", (FRAME,), series)
    return Section("walk", "De-noising a synthetic walk", (_errors(walk), figure))


def _errors(found: Denoised) -> Table:
    rows = tuple(Row(NAMES.get(name, name), (f"{value:.5f}",)) for name, value in found.errors().items())
    return Table(("method", "mean squared error"), rows)


def _grid(images_MD: np.ndarray) -> np.ndarray:
    """`ACROSS` images in each row, with free pixels between them."""
    images = np.pad(images_MD.reshape(-1, SIDE, SIDE), ((0, 0), (0, 1), (0, 1)))
    return np.concatenate([np.concatenate(list(row), axis=1) for row in images.reshape(-1, ACROSS, *images.shape[1:])])
