"""Plants causes of spikes in real tiny runs, and replays each spike.

    poisoned rows     four rows of one batch hold ids that the data has nowhere else
    bad data window   the same in every batch of six steps
    rate jump         the run is restarted with a far higher learning rate
    bf16 router       the run is restarted with `moe.router_precision=bf16`; the rows of its router share a large
                      vector, beside which bf16 does not resolve what tells experts apart
    huge values       the run branches off a checkpoint in which one matrix of one layer is far too large
    two causes        the same, and the first batch after it is poisoned: no single change removes the event

All runs are trained in this process, one after another.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kha_train.analysis.causes import Verdict
from kha_train.analysis.runs import load_run
from kha_train.checkpoint.reader import Checkpoint, check_sizes, directory_of
from kha_train.checkpoint.rewrite import rewritten
from kha_train.config.compose import compose
from kha_train.data.format.manifest import TokenizerEntry
from kha_train.data.format.writer import prepare, publish_dataset, write_shard
from kha_train.data.sources import open_samples
from kha_train.errors import ConfigError
from kha_train.operate.arms import ARMS
from kha_train.operate.causes import Replaying, event_of, place_of, replay_event
from kha_train.operate.stretch import in_this_process
from kha_train.stability.events import SpikeEvent
from kha_train.train.run import train
from kha_train.variants.optimizer import MASTER

ROWS, LENGTH, BATCH = 2048, 32, 8
USUAL_IDS, IDS = 64, 128
"""Ids below `USUAL_IDS` are in the data; those above only in poisoned rows."""
BEGIN, POISONED, WINDOW, STEPS = 180, 190, range(215, 221), 230
"""The step after which a run is restarted or branched, those whose data are bad, and the length of runs."""
BAD_ROWS = 4
"""Poisoned rows of a bad batch: with three of them one of the four seeds has no event (z = 7.7)."""
SETTINGS = (
    "attention=gqa", f"run.steps={STEPS}", "engine.device=cpu", "engine.name=plain", f"model.vocab_size={IDS}",
    f"model.seq_len={LENGTH}", "model.layers=2", "model.hidden_size=32", "model.query_heads=1", "model.kv_heads=1",
    "model.head_dim=4", "moe.experts=4", "moe.top_k=1", "moe.renormalize=false", "moe.score=softmax",
    "moe.shared_experts=0", "moe.expert_width=32", f"data.global_batch_size={BATCH}",
    f"engine.micro_batch_size={BATCH}", "optim.lr=0.005", "optim.schedule.name=wsd", "optim.schedule.decay=0.1",
    f"checkpoint.every_steps={BEGIN // 3}", "checkpoint.keep_last=9", "checkpoint.ring_steps=4", "validation.rows=8",
    "stability.probe_every=0", "telemetry.wandb.mode=disabled", "telemetry.peak_tflops=0.1", "telemetry.console=quiet",
)  # fmt: skip
REPLAYED, WITHIN = 8, 6
"""Steps of an event that are replayed, and those after its cause within which it begins."""
HUGE = "blocks.1.feed_forward.experts.down"
"""The matrix that is planted too large."""


@dataclass(frozen=True)
class Plant:
    """A planted cause: its kind, how the run is made (directory for its files, seed -> run directory), the step at
    which the event begins at the earliest, and the family and the accusation that a right verdict begins with."""

    kind: str
    make: Callable[[Path, int], Path]
    after: int
    family: str
    accuses: str


def write_data(directory: Path, seed: int, poisoned: Sequence[int] = ()) -> None:
    """Documents of one row each, in which an id follows from the one before by a random table, which experts have to
    learn; those of the rows `poisoned` are random ids of their own."""
    drawn = np.random.default_rng(seed)
    following = drawn.permutation(np.arange(1, USUAL_IDS))
    for name, rows in (("train", ROWS), ("validation", 16)):
        strange = drawn.integers(USUAL_IDS, IDS, (rows, LENGTH))
        ids = drawn.integers(1, USUAL_IDS, (rows, LENGTH))
        surprising = drawn.random((rows, LENGTH)) < 0.02
        for place in range(1, LENGTH):
            ids[:, place] = np.where(surprising[:, place], ids[:, place], following[ids[:, place - 1] - 1])
        if name == "train":
            ids[list(poisoned)] = strange[list(poisoned)]
        ids[:, -1] = 0
        prepare(directory / name)
        documents = ((row, LENGTH - 1) for row in ids)
        shard = write_shard(directory / name, 0, documents, vocab_size=IDS, dtype="uint16")
        tokenizer = TokenizerEntry("planted", IDS, "0" * 64, None, {"eos": 0}, (0, *[1] * (IDS - 1)))
        publish_dataset(directory / name, [shard], tokenizer, dtype="uint16", corpus={})


def settings(data: Path, run_dir: Path, seed: int, *further: str) -> list[str]:
    """The overrides of a planted run."""
    places = [f"data.train={data}/train", f"data.validation={data}/validation", f"run.dir={run_dir}"]
    return [*SETTINGS, f"run.seed={seed}", *places, *further]


def _clean(place: Path, seed: int) -> Path:
    """A run without a spike, saved after step `BEGIN`; made once for each seed."""
    run_dir = place / "clean"
    if not run_dir.exists():
        write_data(place / "data", seed)
        train(compose(settings(place / "data", run_dir, seed)), until=BEGIN)
    return run_dir


def bad_data(place: Path, seed: int) -> Path:
    """A run with `BAD_ROWS` bad rows in the batch of step `POISONED`, and in those of `WINDOW`."""
    run_dir = place / "bad"
    if not run_dir.exists():
        train(compose(settings(poisoned_data(place / "bad data", seed, POISONED, *WINDOW), run_dir, seed)))
    return run_dir


def poisoned_data(data: Path, seed: int, *steps: int) -> Path:
    """Data whose batches of `steps` have `BAD_ROWS` bad rows."""
    write_data(data, seed)
    samples = open_samples(compose(settings(data, data / "nowhere", seed)))
    firsts = [BATCH * (step - 1) for step in steps]
    numbers = np.concatenate([np.arange(first, first + BAD_ROWS) for first in firsts])
    write_data(data, seed, samples.locate(numbers)[1].tolist())
    return data


def rate_jump(place: Path, seed: int) -> Path:
    """The clean run, restarted after `BEGIN` at 30 times the rate."""
    run_dir = place / "jump"
    shutil.copytree(_clean(place, seed), run_dir)
    train(
        compose(settings(place / "data", run_dir, seed, "optim.lr=0.15", "resume.allow_changes=[optim]")),
        until=BEGIN + 20,
    )
    return run_dir


def bf16_router(place: Path, seed: int) -> Path:
    """A run whose router's rows share a large vector, restarted in bf16 after `BEGIN`."""
    begin, run_dir = place / "router begin", place / "router"
    _clean(place, seed)
    train(compose(settings(place / "data", begin, seed)), until=1)

    def shared(name: str, kind: str, values_P: torch.Tensor) -> torch.Tensor:
        if kind != MASTER or not name.endswith("router.weight"):
            return values_P
        common = torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 300
        return values_P + common.repeat(len(values_P) // 32)

    copy = rewritten(_checkpoint(begin), place / "router state", shared)
    branch = settings(place / "data", run_dir, seed, f"run.branch_from='{copy}'")
    train(compose(branch), until=BEGIN)
    train(
        compose([*branch, "moe.router_precision=bf16", "resume.allow_changes=[moe.router_precision]"]), until=BEGIN + 20
    )
    return run_dir


def huge_values(place: Path, seed: int) -> Path:
    """A branch of the clean run after `BEGIN`, in which the matrix `HUGE` is 100 times as large."""
    return _with_huge_values(_clean(place, seed), place / "data", place / "huge", seed)


def two_causes(place: Path, seed: int) -> Path:
    """As `huge_values`, and the batch of the branch's first step has bad rows."""
    data, begin = poisoned_data(place / "two data", seed, BEGIN + 1), place / "two begin"
    train(compose(settings(data, begin, seed)), until=BEGIN)
    return _with_huge_values(begin, data, place / "two", seed)


def _with_huge_values(parent: Path, data: Path, run_dir: Path, seed: int) -> Path:
    def huge(name: str, kind: str, values_P: torch.Tensor) -> torch.Tensor:
        return values_P * 100 if kind == MASTER and name == HUGE else values_P

    copy = rewritten(_checkpoint(parent), run_dir.with_name(f"{run_dir.name} state"), huge)
    train(compose(settings(data, run_dir, seed, f"run.branch_from='{copy}'")), until=BEGIN + 20)
    return run_dir


def _checkpoint(run_dir: Path) -> Checkpoint:
    directory = directory_of(run_dir)
    return Checkpoint(directory, check_sizes(directory))


PLANTS = (
    Plant("poisoned rows", bad_data, POISONED, "data", f"the batch of step {POISONED}"),
    Plant("bad data window", bad_data, WINDOW[0], "data", f"the data of steps {WINDOW[0]} to {WINDOW[-1]}"),
    Plant("rate jump", rate_jump, BEGIN + 1, "rate", "the learning rate"),
    Plant("bf16 router", bf16_router, BEGIN + 1, "router precision", "the router's precision"),
    Plant("huge values", huge_values, BEGIN + 1, "scale", f"huge values in {HUGE}"),
)

NO_SINGLE_CAUSE = Plant("two causes", two_causes, BEGIN + 1, "", "no single cause: none of")


def planted_event(plant: Plant, place: Path, seed: int) -> tuple[Path, SpikeEvent]:
    """Train the run of `plant`; its directory and the event. Raises ConfigError when it did not spike."""
    place.mkdir(parents=True, exist_ok=True)
    run_dir = plant.make(place, seed)
    run = load_run(run_dir)
    for step in range(plant.after, plant.after + WITHIN):
        with suppress(ConfigError):
            return run_dir, event_of(run, None, step)
    raise ConfigError(f"no event within {WITHIN} steps of step {plant.after}", field="plant", value=plant.kind)


def replayed(plant: Plant, place: Path, seed: int) -> Verdict:
    """The verdict on the event of `plant`, with every arm."""
    run_dir, event = planted_event(plant, place, seed)
    run = load_run(run_dir)
    how = Replaying(
        tuple(ARMS), place_of(run, event), lambda text: None, lambda *given: nullcontext(lambda done: None), 2,
        REPLAYED, in_this_process,
    )  # fmt: skip
    return replay_event(run, event, how)
