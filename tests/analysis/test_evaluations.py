"""Named validation sets and tasks in a comparison: each under its own name, never unmarked beside other rows."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kha_train.analysis import evaluations as evaluations_module
from kha_train.analysis.compare import Comparison, compare_runs
from kha_train.analysis.ending import end_of
from kha_train.analysis.report.page import report_html
from kha_train.analysis.runs import load_run
from kha_train.analysis.table import print_comparison
from kha_train.config.build import to_plain
from kha_train.config.compose import compose, dump
from kha_train.errors import DataError
from kha_train.record import Record
from kha_train.telemetry.terminal import LiteralConsole

CODE = {"task": "bits_per_byte", "content_id": "cc" * 32, "rows": 8}
CONTEXT = {"task": "context", "content_id": "aa" * 32, "rows": 4, "borders": [1, 4]}


def write_run(
    path: Path, lines: Mapping[int, Mapping[str, Any]], facts: Mapping[str, Any], variant: str = "gqa"
) -> Path:
    """A run of 20 steps that validated at every tenth and has `lines` more; `facts` are those of its tasks."""
    tasks, sets = (
        "evaluation.tasks=[{name: context, every_steps: 4}]",
        "validation.sets=[{name: code, path: shards/code}]",
    )
    config = compose([f"attention={variant}", f"run.dir={path}", "validation.every_steps=10", tasks, sets])
    record = Record.open(path)
    known = {"data_content_id": "c0ffee", "validation_content_id": "aa" * 32, "validation_rows": 4}
    record.begin_attempt(0, facts={**known, **({"evaluations": facts} if facts else {})}, config=to_plain(config))
    for step in range(1, 21):
        line = {"step": step, "samples_first": 4 * step, "samples_last": 4 * step + 3, "train/loss": 3.0}
        line |= {"validation/loss": 3.0, "validation/bits_per_byte": 1.5} if step % 10 == 0 else {}
        record.step({**line, **lines.get(step, {})})
    record.close("done")
    (path / "config.yaml").write_text(dump(config))
    return path


def measured(code: float, context: float) -> dict[int, dict[str, float]]:
    """Entries of two sets and a task, the last ones as named."""
    figures = {"evaluation/context/loss_from_1": context, "evaluation/context/loss_from_4": context - 1}
    later = {"validation/code/loss": code, "validation/code/bits_per_byte": code / 2}
    return {4: {key: 9.0 for key in figures}, 10: {key: 9.0 for key in later}, 20: {**later, **figures}}


def answered(*runs: Path) -> tuple[Comparison, dict[str, Any], str, str]:
    comparison = compare_runs(list(runs))
    console = LiteralConsole(width=300, record=True, file=io.StringIO())
    print_comparison(comparison, console)
    plain = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    return comparison, plain, console.export_text(), report_html(comparison)


def test_sets_and_tasks_stand_by_name_with_the_last_figure_of_every_run(tmp_path: Path) -> None:
    facts = {"validation/code": CODE, "evaluation/context": CONTEXT}
    one = write_run(tmp_path / "a", measured(2.0, 5.0), facts)
    two = write_run(tmp_path / "b", measured(2.5, math.nan), facts, variant="kha_mlp")
    comparison, plain, table, page = answered(one, two)
    assert list(plain["evaluations"]) == ["validation/code", "evaluation/context"]
    assert plain["evaluations"]["validation/code"]["figures"] == {"loss": [2.0, 2.5], "bits_per_byte": [1.0, 1.25]}
    # As of validation, the last finite figure counts: at step 20 the second run had none.
    assert plain["evaluations"]["evaluation/context"]["figures"] == {
        "loss_from_1": [5.0, 9.0],
        "loss_from_4": [4.0, 9.0],
    }
    assert plain["pairs"][0]["caveats"] == []
    for shown in (table, page):
        assert (
            "validation/code/bits_per_byte" in shown and "1.2500" in shown and "evaluation/context/loss_from_4" in shown
        )
        assert "[A]" not in shown
        assert "Every validation/code at the end scored the same rows: content id cccccccccccc, 8 rows of" in shown
    assert "Validation: code" in page
    series = comparison.runs[0].evaluations
    assert series["evaluation/context"]["loss_from_1"].steps_N.tolist() == [4, 20]
    assert series["validation/code"]["loss"].values_N.tolist() == [9.0, 2.0]


def test_other_rows_under_one_name_are_marked_and_those_of_a_set_are_a_caveat(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", measured(2.0, 5.0), {"validation/code": CODE, "evaluation/context": CONTEXT})
    changed = {"validation/code": CODE | {"rows": 9}, "evaluation/context": CONTEXT | {"borders": [1, 8]}}
    two = write_run(tmp_path / "b", measured(2.5, 6.0), changed, variant="kha_mlp")
    _, plain, table, page = answered(one, two)
    (pair,) = plain["pairs"]
    (caveat,) = pair["caveats"]
    assert caveat.startswith("different validation sets named code from step 10 on (content id cccccccccccc, 8 rows of")
    for entries in ("validation/code", "evaluation/context"):
        assert plain["evaluations"][entries]["marks"] == ["A", "B"]
        assert "figures cannot be compared" in plain["evaluations"][entries]["words"]
    for shown in (table, page):
        assert "2.0000 [A]" in shown and "2.5000 [B]" in shown and "5.0000 [A]" in shown and "6.0000 [B]" in shown
    assert [run["validation_mark"] for run in plain["runs"]] == ["", ""], "the set of all runs is the same"


def test_a_run_without_them_reads_no_line_again_and_stands_beside_one_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write_run(tmp_path / "a", measured(2.0, 5.0), {"validation/code": CODE})
    two = write_run(tmp_path / "b", {}, {}, variant="kha_mlp")
    _, plain, table, _ = answered(one, two)
    assert plain["evaluations"]["validation/code"]["figures"]["loss"] == [2.0, None]
    assert plain["evaluations"]["validation/code"]["marks"] == ["", ""] and plain["pairs"][0]["caveats"] == []
    assert "evaluation/context" not in table, "nobody declared it"
    monkeypatch.setattr(evaluations_module, "_candidates", lambda *given: pytest.fail("it looked for lines"))
    assert load_run(two).evaluations == {}


def test_the_end_of_a_run_tells_of_each(tmp_path: Path) -> None:
    ending = end_of(write_run(tmp_path / "a", measured(2.0, 5.0), {"validation/code": CODE}))
    assert dict(ending.rows(20))["validation/code"] == "loss 2.0000, bits_per_byte 1.0000"
    assert ending.summary()["final/validation/code/bits_per_byte"] == 1.0


@pytest.mark.parametrize("value", ["much", None, True, [1.0], pytest.param(10**400, id="huge")])
def test_an_entry_that_is_no_number_is_damage_that_is_named(value: Any, tmp_path: Path) -> None:
    lines = {20: {"validation/code/loss": value}}
    run = write_run(tmp_path / "a", lines, {"validation/code": CODE})
    with pytest.raises(DataError, match="step 20 validation/code/loss"):
        load_run(run)


def test_an_interval_beyond_every_step_is_never_due(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", measured(2.0, 5.0), {"evaluation/context": CONTEXT})
    saved = json.loads((run / "run.json").read_text())
    (task,) = saved["attempts"][0]["config"]["whole"]["evaluation"]["tasks"]
    task["every_steps"] = 10**30
    (run / "run.json").write_text(json.dumps(saved))
    assert load_run(run).evaluations["evaluation/context"]["loss_from_1"].steps_N.tolist() == [20]


def test_names_and_meanings_of_a_foreign_record_are_shown_literally(tmp_path: Path) -> None:
    name = 'validation/[red]"><script>alert(1)</script>\x1b[31m'
    run = write_run(tmp_path / "a", {20: {f"{name}/bits_per_byte": 2.0}}, {name: CODE})
    saved = json.loads((run / "run.json").read_text())
    declared = {"unit": "bits/byte", "meaning": "[red]<script>\x1b[31m", "timing": False, "mirrored": True}
    saved["metrics"] = {f"{name}/bits_per_byte": declared}
    (run / "run.json").write_text(json.dumps(saved))
    _, plain, table, page = answered(run)
    assert plain["evaluations"][name]["figures"] == {"bits_per_byte": [2.0]}
    assert "<script" not in page and "\x1b" not in page and "\x1b" not in table
    assert table.count("[red]") == 2 and page.count("<figure") == 4


def test_the_end_of_a_run_tells_the_last_finite_figure_of_each(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", measured(2.0, math.nan), {"evaluation/context": CONTEXT})
    assert dict(end_of(run).rows(20))["evaluation/context"] == "loss_from_1 9.0000, loss_from_4 9.0000"
