"""Synthetic records look as if the trainer had written them: they are read, scored and continued like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kha_train.analysis.spikes import read_curve, score_curve
from kha_train.bench.made_record import MORE, UNDONE, Template
from kha_train.config.compose import compose
from kha_train.operate.status import run_status
from kha_train.record import read_discarded, read_events, read_metrics, read_run
from kha_train.record.columns_twin import TWIN_FILE
from kha_train.record.totals import load_totals, totals_of
from kha_train.train.run import train

STEPS = 7010


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return Template(tmp_path_factory.mktemp("template"))


@pytest.mark.slow
def test_a_made_run_is_scored_as_its_own_lines_say_and_goes_on(
    tmp_path: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = template.make(tmp_path / "run", STEPS)
    last = read_metrics(made.run_dir)[-1]
    report = score_curve(read_curve(made.run_dir))
    assert last["spike/narrow_total"] == 1 == report.summary["narrow_total"]
    assert [event["kind"] for event in read_events(made.run_dir)].count("spike_closed") == 1
    assert 1400 < (made.run_dir / "metrics.jsonl").stat().st_size / STEPS < 1800

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("the end judges the curve again")

    twin = made.run_dir / TWIN_FILE
    twin.unlink()
    monkeypatch.setattr("kha_train.train.saving.COLUMNS_EVERY", 2**20)
    with monkeypatch.context() as patched:
        patched.setattr("kha_train.analysis.spikes.find_events", refuse)
        outcome = train(compose(made.overrides))
    assert outcome.finished and outcome.step == STEPS + MORE
    assert twin.exists()
    told = read_run(made.run_dir)["spikes"]
    assert json.dumps(told) == json.dumps(score_curve(read_curve(made.run_dir)).summary)
    lines = read_metrics(made.run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + MORE + 1))
    assert lines[-1]["spike/narrow_total"] == 1 and lines[-1]["spike/open"] == 0


@pytest.mark.slow
def test_a_long_made_run_was_killed_and_has_undone_lines(
    tmp_path: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kha_train.bench.made_record.RESTART_EVERY", 100)
    made = template.make(tmp_path / "run", 250)
    assert [line["attempt"] for line in read_metrics(made.run_dir)] == [1] * 100 + [2] * 100 + [3] * 50
    assert [line["step"] for line in read_discarded(made.run_dir)][: UNDONE + 1] == [*range(101, 101 + UNDONE), 201]
    assert load_totals(made.run_dir) == totals_of(made.run_dir)
    status = run_status(made.run_dir)
    assert (status.step, status.state, status.attempts, status.checkpoint) == (250, "requeue", 3, 250)
    assert [attempt["state"] for attempt in json.loads((made.run_dir / "run.json").read_text())["attempts"]] == [
        "lost",
        "lost",
        "requeued",
    ]
