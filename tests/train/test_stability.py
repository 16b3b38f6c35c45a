"""Bad steps and bad data in real runs: they leave no trace, and all ranks decide alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train.analysis.spikes import read_curve, score_curve
from kha_train.record import read_discarded, read_events, read_metrics
from kha_train.stability.events import Observation
from kha_train.stability.monitor import Monitor

pytestmark = [pytest.mark.slow, pytest.mark.minutes]

WORKER = Path(__file__).with_name("stability_worker.py")
ROWS = 8
STEPS = 215
Runs = tuple[Path, dict[str, list[Any]]]
POISONED = [(1, "skip"), (2, "skip"), (3, "skip"), (1, "observe")]
BAD = (191, 202)
"""First and last step whose batches are bad."""


@pytest.fixture(scope="module")
def tiny(small: list[str]) -> list[str]:
    """Overrides for steps of a few milliseconds."""
    return [*small, "model.layers=1", "model.seq_len=32", "attention=kha_mlp", "engine.micro_batch_size=2"]


@pytest.fixture(scope="module")
def poisoned(tiny: list[str], run_ranks: Callable[..., list[Any]]) -> list[dict[str, Any]]:
    """What two ranks answered about a NaN gradient on one of them, by stage and policy."""
    cases = {
        f"zero{stage} {policy}": [*tiny, f"engine=zero{stage}", f"stability={policy}"] for stage, policy in POISONED
    }
    return run_ranks(WORKER, 2, act="poisoned", cases=cases)


@pytest.mark.parametrize(("stage", "policy"), POISONED)
def test_a_nan_gradient_on_one_of_two_ranks_leaves_no_trace(
    stage: int, policy: str, poisoned: list[dict[str, Any]]
) -> None:
    for answer in poisoned:
        found = answer[f"zero{stage} {policy}"]
        assert not found["applied"]
        assert math.isfinite(found["loss"]) and not math.isfinite(found["norm"])
        assert found["changed"] == []
        assert found["losses equal"] and found["end states differ in"] == []
        assert found["moved"]


@pytest.fixture(scope="module")
def probed(tiny: list[str], run_ranks: Callable[..., list[Any]]) -> list[dict[str, Any]]:
    """What two ranks answered about probed steps, by stage and precision."""
    cases = {f"zero{stage}": [*tiny, f"engine=zero{stage}"] for stage in (1, 2, 3)}
    cases["bf16"] = [*tiny, "engine.precision=bf16"]
    return run_ranks(WORKER, 2, act="probed", cases=cases)


@pytest.mark.parametrize("case", ["zero1", "zero2", "zero3", "bf16"])
def test_a_step_that_was_looked_into_is_bit_identical_to_one_that_was_not(
    case: str, probed: list[dict[str, Any]]
) -> None:
    first, second = (answer[case] for answer in probed)
    assert first["differ"] == second["differ"] == []
    assert first["evidence"] == second["evidence"], "the evidence is the same on every rank"


@pytest.mark.parametrize("case", ["zero1", "zero2", "zero3", "bf16"])
def test_the_evidence_adds_up(case: str, probed: list[dict[str, Any]]) -> None:
    evidence = probed[0][case]["evidence"]
    total = math.sqrt(sum(norm**2 for norm in evidence["grad_norms"].values()))
    assert total == pytest.approx(probed[0][case]["norm"], rel=1e-4)
    assert set(evidence["grad_norms"]) == {"vectors", "blocks.0", "outside layers"}
    assert len(evidence["max_logits"]) == len(evidence["router"]) == 1
    assert evidence["max_logits"][0] > 0
    matrices = {name.split(".")[-2]: entry for name, entry in evidence["interactions"].items()}
    assert set(matrices) == {"up", "gate", "down"}
    assert matrices["up"]["norm"] == pytest.approx(math.sqrt(32), rel=0.1)
    assert 0 < matrices["up"]["from_identity"] < 1


def histories(tiny: list[str]) -> tuple[list[str], list[str], list[int]]:
    """Settings of a run that observes and of one that rewinds, and the samples that are noise: from step 191 to 202."""
    common = [*tiny, f"run.steps={STEPS}", "checkpoint.every_steps=60", "validation.every_steps=0", "engine=zero2"]
    rewinding = [
        *common,
        "stability=rewind",
        "stability.rewind.after=4",
        "stability.rewind.margin=10",
        f"stability.rewind.window={BAD[1] - BAD[0] + 1}",
    ]
    return common, rewinding, [ROWS * (BAD[0] - 1), ROWS * BAD[1]]


@pytest.fixture(scope="module")
def runs(tiny: list[str], run_ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs over data that is noise from step 191 to 202: rewinding, never having met it, only observing
    (stopped inside the spike); their directory, and what the ranks answered."""
    folder = tmp_path_factory.mktemp("rewind")
    common, rewinding, bad = histories(tiny)
    nothing: list[int] = []
    cases = {
        "rewinding": [(rewinding, bad, nothing, 0)],
        "without": [(common, nothing, bad, 0)],
        "observing": [(common, bad, nothing, 195), (common, bad, nothing, 0)],
    }
    answers: dict[str, list[Any]] = {}
    for name, starts in cases.items():
        for overrides, bad_samples, skip, stop_at in starts:
            there = [*overrides, f"run.dir={folder}/{name}", "telemetry.wandb.mode=offline"]
            how = {"overrides": there, "bad": bad_samples, "skip": skip, "stop_at": stop_at}
            answers.setdefault(name, []).append(run_ranks(WORKER, 2, run=how))
    return folder, answers


def test_a_bad_data_window_is_rewound_and_exactly_that_window_left_out(runs: Runs) -> None:
    folder, answers = runs
    lines = read_metrics(folder / "rewinding")
    clean = [ROWS * step for step in range(BAD[0] - 1)] + [ROWS * step for step in range(BAD[1], STEPS + 12)]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["samples_first"] for line in lines] == clean
    assert all(answer["finished"] for answer in answers["rewinding"][0])


def test_a_rewound_run_equals_one_that_never_met_the_window(runs: Runs) -> None:
    _, answers = runs
    for rewound, without in zip(answers["rewinding"][0], answers["without"][0], strict=True):
        assert rewound["digest"] == without["digest"]


def test_ranks_that_share_experts_rewind_to_the_run_that_never_met_the_window(
    tiny: list[str], run_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    common, rewinding, bad = histories([*tiny, "engine.expert_parallel=2"])
    met = {"overrides": [*rewinding, f"run.dir={tmp_path}/met"], "bad": bad, "skip": [], "stop_at": 0}
    never = {"overrides": [*common, f"run.dir={tmp_path}/never"], "bad": [], "skip": bad, "stop_at": 0}
    rewound, without = (run_ranks(WORKER, 2, run=how) for how in (met, never))
    assert [event["kind"] for event in read_events(tmp_path / "met")].count("rewind") == 1
    assert rewound == without and rewound[0]["digest"] != rewound[1]["digest"]


def test_the_record_shows_the_rewind_and_keeps_the_undone_lines(runs: Runs) -> None:
    folder, _ = runs
    (event,) = (event for event in read_events(folder / "rewinding") if event["kind"] == "rewind")
    assert (event["step"], event["to_step"], event["trouble_step"]) == (194, 180, BAD[0])
    assert event["window"] == [ROWS * (BAD[0] - 1), ROWS * BAD[1]]
    undone = read_discarded(folder / "rewinding")
    assert [line["step"] for line in undone] == list(range(181, 195))
    assert all(line["discarded_reason"].startswith("rewind 1 from step 194") for line in undone)
    survived = {line["step"]: line["train/loss"] for line in read_metrics(folder / "rewinding")}
    assert all(line["train/loss"] == survived[line["step"]] for line in undone if line["step"] < BAD[0])


def test_spike_counts_include_rewound_events_unless_told_otherwise(runs: Runs) -> None:
    curve = read_curve(runs[0] / "rewinding")
    assert [event.start_step for event in score_curve(curve).rewound] == [BAD[0]]
    assert score_curve(curve).to_dict()["summary"]["events_total"] == 1
    assert score_curve(curve, include_rewound=False).to_dict()["summary"]["events_total"] == 0


def test_observe_changes_nothing_and_sees_the_spike(runs: Runs) -> None:
    folder, answers = runs
    lines = read_metrics(folder / "observing")
    assert [line["samples_first"] for line in lines] == [ROWS * step for step in range(STEPS)]
    assert not any(line["train/skipped"] for line in lines)
    events = score_curve(read_curve(folder / "observing")).events
    assert events[0].start_step == BAD[0]
    opened = [event for event in read_events(folder / "observing") if event["kind"] == "spike_opened"]
    assert opened[0]["step"] == BAD[0] and set(opened[0]["evidence"]) >= {"grad_norms", "max_logits", "router"}
    stopped, resumed = answers["observing"]
    assert not any(answer["finished"] for answer in stopped) and all(answer["finished"] for answer in resumed)


@pytest.mark.parametrize("name", ["observing", "rewinding"])
def test_online_equals_offline_exactly(name: str, runs: Runs) -> None:
    """Also over a stop inside an open event (`observing`) and after a rewind (`rewinding`)."""
    monitor, events = Monitor(), []
    for line in read_metrics(runs[0] / name):
        place = (line["samples_first"], line["samples_last"])
        numbers = (line["train/loss"], line["train/grad_norm"], line["tokens"], line["train/lr"])
        verdict = monitor.update(Observation(line["step"], *numbers, *place))
        told = {key: value for key, value in line.items() if key in verdict.metrics or key.startswith("spike/")}
        assert told == verdict.metrics
        events += [verdict.closed.to_dict()] if verdict.closed else []
    closed = [event for event in read_events(runs[0] / name) if event["kind"] == "spike_closed"]
    assert [{key: event[key] for key in events[0]} for event in closed] == events if events else not closed


def test_w_and_b_has_every_step_as_it_was_computed_and_what_was_done_about_it(
    runs: Runs, wandb_rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    (path,) = (runs[0] / "rewinding" / "wandb").glob("offline-run-*/*.wandb")
    rows = wandb_rows(path)
    assert [row["step"] for row in rows] == [*range(1, 195), *range(181, STEPS + 1)]
    assert [row["_step"] for row in rows] == list(range(1, len(rows) + 1))
    for kind in ("rewind", "spike_opened", "checkpoint_saved"):
        told = [event for event in read_events(runs[0] / "rewinding") if event["kind"] == kind]
        marks = [row["step"] for row in rows if f"events/{kind}" in row]
        # A save is told when it stands, some steps later.
        assert marks == [event["step"] for event in told] or kind == "checkpoint_saved" and len(marks) == len(told)
    marked = [row["train/loss_in_spike"] for row in rows if "train/loss_in_spike" in row]
    assert marked == [row["train/loss"] for row in rows if row["spike/open"]] and len(marked) >= 4


def test_a_resumed_run_goes_on_in_w_and_b_where_it_stopped(
    runs: Runs, wandb_rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    first, second = sorted((runs[0] / "observing" / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name, "one id"
    rows = wandb_rows(first) + wandb_rows(second)
    assert [(row["step"], row["_step"]) for row in rows] == [(step, step) for step in range(1, STEPS + 1)]
