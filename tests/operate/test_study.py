"""A study from its first run to its result: what it trains, what it costs, and that it goes on after any stop."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kha_train.analysis.heads.inspection import read_inspections
from kha_train.analysis.studies import ScaledStudy, load_study, study_names
from kha_train.analysis.study_outcomes import Outcome
from kha_train.cli.main import run
from kha_train.config.compose import compose
from kha_train.errors import ConfigError, DivergedError, KhaError
from kha_train.estimate.counts import flops_per_token
from kha_train.export.compress_scan import scan
from kha_train.operate import datasets, slurm
from kha_train.operate import study as running
from kha_train.operate.datasets import SMALL_TASKS, make_dataset
from kha_train.operate.slurm import JobOptions
from kha_train.operate.study import (
    Progress,
    StudyPlan,
    finished_runs,
    plan_study,
    run_here,
    submit_study,
    write_results,
)
from kha_train.operate.study_costs import study_costs
from kha_train.operate.sweep import Point
from kha_train.record import Marker, has_marker, read_run
from kha_train.train.run import train

ROOT = Path(__file__).resolve().parents[2]
TEXT = """
question: Which is lower?
source: a test
reference: base
arms:
  - {{name: base, overrides: [attention=gqa]}}
  - {{name: mlp, overrides: [attention=kha_mlp]}}
measures: [{{kind: train_loss}}, {{kind: steps_to, threshold: 9.0}}]
rate_measure: train_loss
cpu: {{steps: {steps}, rates: [1.0e-3, 1.0e-2], seeds: [0, 1], rate_seeds: [7], overrides: {overrides}}}
paper:
  steps: {steps}
  rates: [1.0e-3]
  seeds: [0]
  measures: [{{kind: heads, entry: diversity}}, {{kind: heads, entry: diagonal}}, {{kind: train_loss}}]
"""
Trained = list[str]


@pytest.fixture
def mine(tmp_path: Path, small: list[str]) -> Callable[..., Path]:
    """`mine(steps)`: the file of a study of two arms on small models."""

    def write(steps: int = 6, *further: str) -> Path:
        overrides = [*small, "model.layers=1", "engine.name=plain", "engine.device=cpu", *further]
        (tmp_path / "mine.yaml").write_text(TEXT.format(steps=steps, overrides=json.dumps(overrides)))
        return tmp_path / "mine.yaml"

    return write


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """The labels of points in the order in which they were trained, in this process instead of one each."""
    labels: Trained = []

    def here(directory: Path, points: Sequence[Point], processes: int, watch: Any, parallel: int) -> list[Point]:
        failed = []
        for number, point in enumerate(points):
            watch([point], points[number + 1 :])
            labels.append(point.label)
            try:
                train(compose(point.overrides))
            except KhaError:
                failed.append(point)
        return failed

    monkeypatch.setattr(running, "run_points", here)
    return labels


def planned(file: Path, scale: str = "cpu", *overrides: str) -> StudyPlan:
    return plan_study(load_study(str(file), scale), file.parent / "studies" / f"mine-{scale}", overrides)


def done(plan: StudyPlan, watch: Callable[[Progress], None] = lambda progress: None) -> running.StudyResult:
    return run_here(plan, processes=1, parallel=1, retry_failed=False, watch=watch)


def test_a_study_trains_the_choice_of_rates_then_the_best_and_nothing_twice(
    mine: Callable[..., Path], trained: Trained
) -> None:
    seen: list[Progress] = []
    plan = planned(mine())
    result = done(plan, seen.append)
    assert trained[:4] == ["base-lr0.001-s7", "base-lr0.01-s7", "mlp-lr0.001-s7", "mlp-lr0.01-s7"]
    best = {name: f"{name}-lr{arm.chosen.rate:g}" for name, arm in result.arms.items() if arm.chosen}
    assert trained[4:] == [f"{best[arm]}-s{seed}" for arm in ("base", "mlp") for seed in (0, 1)]
    losses = {name: arm.by_rate for name, arm in result.arms.items()}
    for name, arm in result.arms.items():
        assert arm.chosen and losses[name][arm.chosen.rate][7] == min(rate[7] for rate in losses[name].values())
    assert [(one.finished, one.needed) for one in seen] == [(count, 8) for count in range(8)]
    assert seen[0].seconds_left() is None and (seen[-1].seconds_left() or 0) > 0
    assert seen[-1].work_left == pytest.approx(plan.points[_trial(plan, trained[-1])].flops)

    again = done(planned(mine()))
    assert len(trained) == 8 and again.to_dict() == result.to_dict()
    written = write_results(plan, again)
    answer = json.loads((plan.directory / "result.json").read_text())
    assert answer["complete"] and answer["sentence"] == result.sentence and len(answer["study_sha256"]) == 64
    assert answer["arms"]["mlp"]["seeds"] == [0, 1] and answer["given"] == []
    # A uniform guess among 256 ids is 5.5 nats, so the first mean of five steps is below the threshold.
    assert answer["arms"]["mlp"]["values"]["steps_to_9"] == {"0": 5.0, "1": 5.0}
    assert all(path.is_file() for path in written) and (plan.directory / "report" / "base" / "index.html") in written


def _trial(plan: StudyPlan, label: str) -> Any:
    return next(trial for trial, point in plan.points.items() if point.label == label)


@pytest.mark.slow
def test_a_study_without_its_own_rate_seeds_trains_all_and_a_reference_once(
    mine: Callable[..., Path], trained: Trained, small: list[str]
) -> None:
    plan = planned(mine(2), "paper", *small, "model.layers=1", "engine.name=plain", "engine.device=cpu")
    result = done(plan)
    assert trained == ["base-lr0.001-s0", "mlp-lr0.001-s0"]
    assert result.sentence == "1 seed: not evidence." and "one learning rate" in result.how_chosen
    assert {name: list(arm.by_rate[1e-3]) for name, arm in result.arms.items()} == {"base": [0], "mlp": [0]}
    for label, arm in zip(trained, result.arms.values(), strict=True):
        (found,) = read_inspections(plan.directory / label)
        assert arm.mean("heads_diversity") == pytest.approx(found.layers[0].weights.diversity)
        diagonals = [
            matrix.diagonal_mean for matrix in found.layers[0].matrices if matrix.name.endswith(("up", "down"))
        ]
        assert arm.mean("heads_diagonal") == pytest.approx(sum(diagonals) / 2 if diagonals else None)


@pytest.mark.slow
def test_a_run_that_diverged_is_a_result_and_a_run_that_failed_ends_the_study(
    mine: Callable[..., Path], trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(mine(30))
    real = train

    def lose(config: Any) -> None:
        """Every run of `mlp` diverges at 1e-2; that of `base` at 1e-3 cannot start."""
        if config.run.name == "base-lr0.001-s7" and len(trained) < 5:
            raise KhaError("the disk is gone")
        if "mlp-lr0.01" in config.run.name:
            with pytest.raises(DivergedError):
                real(compose([*plan.points[_trial(plan, config.run.name)].overrides, "model.init_std=1e38"]))
            raise KhaError("diverged")
        real(config)

    # The run that diverges has a setting of its own.
    monkeypatch.setattr(running, "check_against_runs", lambda points: None)
    monkeypatch.setitem(globals(), "train", lose)
    with pytest.raises(KhaError, match="base-lr0.001-s7"):
        done(plan)
    assert len(trained) == 4, "the others of the round are trained"
    result = done(plan)
    assert trained[4:] == ["base-lr0.001-s7", *trained[5:]] and "mlp-lr0.01-s7" not in trained[4:]
    assert result.arms["mlp"].chosen and result.arms["mlp"].chosen.rate == 1e-3
    assert result.arms["mlp"].by_rate[1e-2] == {7: math.inf} and result.arms["mlp"].diverged_by_rate[1e-2] == 1


@pytest.mark.slow
def test_on_slurm_the_command_submits_the_choice_of_rates_then_the_compared_runs_then_nothing(
    mine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays: list[list[str]] = []

    def submitted(directory: Path, points: Sequence[Point], options: JobOptions) -> str:
        """The job array, finished at once."""
        arrays.append([point.label for point in points])
        for point in points:
            train(compose(point.overrides))
        return str(len(arrays))

    monkeypatch.setattr(slurm, "submit", submitted)
    plan = planned(mine(2))
    for round_of in range(3):
        result, started = submit_study(plan, JobOptions(), retry_failed=False)
        assert (started is None) == (round_of == 2)
    assert [len(labels) for labels in arrays] == [4, 4] and not set(arrays[0]) & set(arrays[1])
    assert not result.missing and {point["label"] for point in json.loads(
        (plan.directory / "sweep.json").read_text())["points"]} == {*arrays[0], *arrays[1]}  # fmt: skip


@pytest.mark.slow
def test_a_directory_of_another_study_is_refused(mine: Callable[..., Path], trained: Trained, small: list[str]) -> None:
    plain = [*small, "engine.name=plain", "engine.device=cpu"]
    done(planned(mine(2), "paper", *plain))
    with pytest.raises(ConfigError, match="weight_decay"):
        finished_runs(planned(mine(2), "paper", *plain, "optim.weight_decay=0"))
    with pytest.raises(ConfigError, match="is set by the study"):
        planned(mine(2), "cpu", "optim.lr=1")
    with pytest.raises(ConfigError, match="multiples of"):
        run_here(planned(mine(2)), 3, 1, False, lambda progress: None)


def test_costs_are_arithmetic_before_a_run_and_measured_after_some(mine: Callable[..., Path]) -> None:
    cluster = ("cluster=h100_1x1", "cluster.price_per_hour=3600", "engine.precision=fp32")
    plan = planned(mine(6), "cpu", *cluster)
    before = study_costs(plan, {})
    config = compose(plan.points[_trial(plan, "mlp-lr0.001-s0")].overrides)
    tokens = 6 * config.data.global_batch_size * config.model.seq_len
    seconds = tokens * flops_per_token(config).mfu / (989e12 * config.cluster.mfu)
    (run_of_mlp,) = (one for one in before.runs if one.label == "mlp-lr0.001-s0")
    assert (run_of_mlp.tokens, run_of_mlp.finished) == (tokens, False)
    assert run_of_mlp.seconds == pytest.approx(seconds) and run_of_mlp.cost == pytest.approx(seconds)
    assert len(before.runs) == 8 and before.seconds() == pytest.approx(sum(one.seconds or 0 for one in before.runs))
    assert "assumption" in before.basis and "989" in before.basis
    found = {
        trial: Outcome("", {"train_loss": trial.rate, "steps_to_9": 1.0}, False, seconds, None, None)
        for trial, seconds in zip(plan.scaled.rate_trials(), (1.0, 3.0, 10.0, 20.0), strict=True)
    }
    after = study_costs(plan, found)
    assert "finished runs of this study (4)" in after.basis
    seconds_of = {one.label: one.seconds for one in after.runs if not one.finished}
    assert seconds_of == pytest.approx(dict.fromkeys(("base-lr0.001-s0", "base-lr0.001-s1"), 2.0)
                                       | dict.fromkeys(("mlp-lr0.001-s0", "mlp-lr0.001-s1"), 15.0))  # fmt: skip
    assert after.seconds(finished=False) == pytest.approx(34.0)


def one_run_an_arm(scaled: ScaledStudy) -> ScaledStudy:
    """The study with its first rate and seed alone: neither changes the model, its memory or its batch."""
    first = replace(scaled.scale, rates=scaled.scale.rates[:1], seeds=scaled.scale.seeds[:1], rate_seeds=())
    return replace(scaled, study=replace(scaled.study, **{scaled.scale_name: first}))


def test_every_arm_of_a_study_passes_the_plan_on_the_machine_it_names(tmp_path: Path) -> None:
    """Of every study: `test_every_arm_of_every_study_passes_the_plan_on_the_machine_it_names`."""
    check_plans(one_run_an_arm(load_study("strength", "paper")), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["copy", "tasks"])
def test_the_entries_that_a_study_measures_are_in_its_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {task: replace(order, documents=80, validation_documents=40) for task, order in SMALL_TASKS.items()}
    monkeypatch.setattr(datasets, "SMALL_TASKS", few)
    scaled = one_run_an_arm(load_study(name, "cpu"))
    make_dataset(scaled.scale.dataset, tmp_path, lambda text: None)
    plan = plan_study(scaled, tmp_path / name, ["run.steps=1", "validation.rows=8", "data.global_batch_size=8",
                                                "engine.micro_batch_size=8"])  # fmt: skip
    trial, point = next(iter(plan.points.items()))
    train(compose(point.overrides))
    measured = finished_runs(plan)[trial].values
    entries = [measure.entry for measure in scaled.measures if measure.kind == "entry"]
    assert len(entries) == {"copy": 1, "tasks": 4}[name]
    assert all(0.0 <= (measured[entry] or 0.0) <= 1.0 and measured[entry] is not None for entry in entries)


@pytest.mark.slow
@pytest.mark.parametrize("name", study_names())
def test_every_arm_of_every_study_passes_the_plan_on_the_machine_it_names(name: str, tmp_path: Path) -> None:
    for scale in load_study(name, "cpu").study.scales:
        check_plans(one_run_an_arm(load_study(name, scale)), tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", study_names())
def test_every_run_of_every_study_passes_the_plan_on_the_machine_it_names(name: str, tmp_path: Path) -> None:
    for scale in load_study(name, "cpu").study.scales:
        check_plans(load_study(name, scale), tmp_path)


def check_plans(scaled: ScaledStudy, directory: Path) -> None:
    plan = plan_study(scaled, directory / scaled.scale_name)
    costs = study_costs(plan, {})
    assert {fit.arm for fit in costs.fits} == scaled.arms.keys()
    known = None if scaled.computes else True
    assert [(fit.arm, fit.needs) for fit in costs.fits if fit.needs or fit.fits is not known] == []
    assert costs.seconds()
    if not scaled.computes:
        assert (costs.cost() is not None) == (scaled.scale_name != "cpu")
        assert bool(scaled.scale.needs) == (scaled.scale.dataset == "own")


@pytest.mark.slow
def test_a_study_stopped_by_a_signal_and_then_killed_goes_on_to_its_report(
    mine: Callable[..., Path], tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    file = mine(40, "checkpoint.every_steps=5")
    command = [sys.executable, "-c", "from kha_train.cli.main import run; run()", "study", "run", str(file)]
    command += ["--local", f"--dir={tmp_path / 'studies'}", "--parallel=2", "--json"]
    runs = tmp_path / "studies" / "mine-cpu"

    def begin() -> subprocess.Popen[str]:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=clean_environment, text=True, cwd=ROOT, **streams)

    def until(count: int) -> None:
        for _ in range(1200):
            if len(list(runs.glob("*/metrics.jsonl"))) >= count:
                return
            time.sleep(0.05)
        raise AssertionError(f"{count} runs did not begin")

    first = begin()
    until(2)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 130 and "the same command continues" in said
    stopped = [path.parent for path in runs.glob("*/metrics.jsonl")]
    assert all(has_marker(path, Marker.REQUEUE) or has_marker(path, Marker.DONE) for path in stopped)

    second = begin()
    until(len(stopped) + 1)
    second.kill()
    second.communicate(timeout=60)
    third = begin()
    out, said = third.communicate(timeout=500)
    assert third.returncode == 0, said
    answer = json.loads(out)
    assert answer["complete"] and [Path(path).is_file() for path in answer["written"]] == [True] * 3
    attempts = {path.parent.name: len(read_run(path.parent)["attempts"]) for path in runs.glob("*/run.json")}
    assert len(attempts) == 8 and max(attempts.values()) >= 2 and min(attempts.values()) == 1


@pytest.mark.slow
def test_the_commands_list_show_and_report(
    mine: Callable[..., Path], trained: Trained, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def kha(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            run(["study", *arguments])
        assert not ended.value.code
        return capsys.readouterr().out

    place = f"--dir={tmp_path / 'studies'}"
    short = ("--scale=paper", *small, "model.layers=1", "engine.name=plain", "engine.device=cpu")
    assert all(name in kha("list") for name in study_names())
    shown = kha("show", str(mine(4)), place)
    for word in ("Which is lower?", "against base", "the choice of its rate", "in all: 8 runs", "time is based on"):
        assert word in shown
    assert not (tmp_path / "studies").exists(), "showing writes nothing"
    assert "4 runs missing: no statement" in kha("report", str(mine(4)), place)
    said = kha("run", str(mine(4)), *short, "--local", place)
    assert len(trained) == 2 and "1 seed: not evidence." in said and "report:" in said
    answer = json.loads(kha("report", str(mine(4)), *short, place, "--json"))
    assert answer["complete"] and answer["evidence"] == "1 seed: not evidence"
    assert json.loads(kha("show", str(mine(4)), *short, place, "--json"))["total"]["finished"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_a_model_that_a_study_scores_as_it_is_keeps_its_weights_and_its_selection_biases(scale: str) -> None:
    """A step moves the biases by `moe.bias_update_rate`, however small the learning rate is."""
    scaled, kept = load_study("compression", scale), []
    for name, arm in scaled.arms.items():
        if max(scaled.scale.rates_of(name)) <= 1e-9:
            before = scaled.arms[arm.compresses.arm].overrides if arm.compresses else ()
            config = compose([*scaled.scale.overrides, *before, *arm.overrides])
            assert (config.run.steps, config.moe.bias_update_rate) == (1, 0.0), name
            kept.append(name)
    assert len(kept) == {"cpu": 18, "paper": 1}[scale]


COMPRESSING = """
question: What does compression cost?
source: a test
reference: base
arms:
  - {{name: less_on, compresses: {{arm: base, layers: all, kv_heads: 1}}, overrides: [run.steps=3]}}
  - {{name: less, compresses: {{arm: base, layers: all, kv_heads: 1}}, overrides: [run.steps=1]}}
  - {{name: base, overrides: [attention=gqa, model.kv_heads=2, model.query_heads=2]}}
measures: [{{kind: validation_loss}}]
cpu:
  steps: 4
  rates: [1.0e-2]
  arm_rates: [{{arm: less, rates: [1.0e-12]}}]
  seeds: [3]
  overrides: {overrides}
paper: {{steps: 4, rates: [1.0e-2], seeds: [3]}}
"""


@pytest.mark.slow
def test_arms_begin_with_the_compressed_model_of_another_arms_run_of_their_seed(
    small: list[str], tmp_path: Path, trained: Trained
) -> None:
    overrides = [*small, "engine.name=plain", "engine.device=cpu", "moe.bias_update_rate=0"]
    (tmp_path / "less.yaml").write_text(COMPRESSING.format(overrides=json.dumps(overrides)))
    plan = planned(tmp_path / "less.yaml")
    result = done(plan)
    assert trained == ["base-lr0.01-s3", "less_on-lr0.01-s3", "less-lr1e-12-s3"]
    losses = {name: arm.values["validation_loss"][3] for name, arm in result.arms.items()}
    base = Path(plan.points[_trial(plan, "base-lr0.01-s3")].run_dir)
    scanned = scan(base, (1,), 8, lambda what, total: nullcontext(lambda amount: None))
    (everything,) = (point for point in scanned.points if point.layers == "all")
    assert losses["less"] == pytest.approx(everything.scores["validation/loss"], rel=1e-6)
    assert losses["base"] == pytest.approx(scanned.whole.scores["validation/loss"], rel=1e-6)
    assert losses["less_on"] != pytest.approx(losses["less"], rel=1e-4)
    assert [path.name for path in (plan.directory / "compressed").iterdir()] == ["base-all-h1-s3"]
    assert done(planned(tmp_path / "less.yaml")).to_dict() == result.to_dict() and len(trained) == 3
    for label in ("base-lr0.01-s3", "less-lr1e-12-s3"):
        shutil.rmtree(plan.directory / label)
    with pytest.raises(ConfigError, match="was compressed from an earlier run"):
        done(planned(tmp_path / "less.yaml"))
