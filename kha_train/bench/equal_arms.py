"""A/A comparisons of real runs: how often the interval over seeds finds a difference between equal arms.

Both sides of a comparison are one variant with the same seeds; only the order of their data differs (`data.seed`). So
every difference is chance, and a 95 % interval may leave zero outside in about one comparison of twenty. The runs are
as small as a mixture of experts can be, and are trained in this process, one after another.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.synthetic import write_dataset
from kha_train.analysis.runs import load_run
from kha_train.analysis.statistics import over_seeds
from kha_train.bench.intervals import binomial_tail
from kha_train.config.compose import compose, quoted
from kha_train.errors import ConfigError
from kha_train.record import Marker, has_marker

SEEDS, STEPS = 3, 40
SETTINGS = (
    "attention=gqa", f"run.steps={STEPS}", "engine.device=cpu", "engine.name=plain", "model.vocab_size=256",
    "model.seq_len=64", "model.layers=2", "model.hidden_size=32", "model.head_dim=8", "moe.expert_width=32",
    "data.global_batch_size=4", "optim.lr=0.01", "checkpoint.every_steps=1000", "validation.rows=8",
    "telemetry.wandb.mode=disabled", "telemetry.peak_tflops=0.1", "telemetry.console=quiet",
)  # fmt: skip
FALSE_SHARE, LIKELY = 0.05, 0.98
"""The share of false differences that 95 % intervals allow, and the probability with which the number allowed is not
exceeded.
"""


def measure(out: Path, seed: int, comparisons: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Train `comparisons` x 2 x 3 runs in `out`, and give for each comparison the differences and their interval.

    Raises ConfigError when `out` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError("not an empty directory", field="--runs", value=str(out), fix="name a new directory")
    write_dataset(out / "data", vocab_size=256, documents=300, seed=seed)
    found = []
    for number in range(comparisons):
        say(f"comparison {number + 1} of {comparisons}")
        found.append(_compare(out, [seed + SEEDS * number + one for one in range(SEEDS)]))
    outside = sum(one["outside"] for one in found)
    allowed = next(k for k in range(comparisons + 1) if binomial_tail(k, comparisons, FALSE_SHARE) >= LIKELY)
    return {
        "seed": seed,
        "steps": STEPS,
        "settings": list(SETTINGS),
        "comparisons": found,
        "outside": outside,
        "allowed": allowed,
        "holds": outside <= allowed,
    }


def _compare(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    differences = [_late_loss(out, seed, 2 * seed + 1) - _late_loss(out, seed, 2 * seed) for seed in seeds]
    interval = over_seeds(differences)
    assert interval is not None
    outside = interval.excludes_zero
    bounds = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {"seeds": list(seeds), "differences": differences, **bounds, "outside": outside}


def _late_loss(out: Path, seed: int, data_seed: int) -> float:
    """The mean loss over the last half of the steps of a new run."""
    from kha_train.train.run import train

    run_dir = out / f"seed-{seed}-data-{data_seed}"
    paths = (
        ("run.dir", run_dir),
        ("data.train", out / "data" / "train"),
        ("data.validation", out / "data" / "validation"),
    )
    places = [f"{key}={quoted(str(path))}" for key, path in paths]
    with redirect_stdout(io.StringIO()):
        train(compose([*SETTINGS, f"run.seed={seed}", f"data.seed={data_seed}", *places]))
    assert has_marker(run_dir, Marker.DONE)
    return float(np.mean(load_run(run_dir).column("train/loss")[STEPS // 2 :]))


def format_measured(found: Mapping[str, Any]) -> str:
    """The protocol and every comparison, as Markdown."""
    rows = [
        f"| {one['seeds'][0]} to {one['seeds'][-1]} | {one['mean']:+.4f} | {one['low']:+.4f} to {one['high']:+.4f} | "
        f"{'zero outside' if one['outside'] else ''} |"
        for one in found["comparisons"]
    ]
    heading = (
        f"A/A: {len(rows)} comparisons of equal arms, {SEEDS} seeds a side, {found['steps']} steps a run, differing in "
        "data.seed alone"
    )
    end = f"\n{found['outside']} of {len(rows)} intervals leave zero outside; at most {found['allowed']} are allowed"
    table = ["\n| seeds | difference, nats per token | 95 % interval | |", "|---|---|---|---|", *rows]
    return "\n".join([heading, *table, end])
