"""Curve files of other frameworks are read with their intended meaning, or refused with one accurate line."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kha_train.analysis.spikes import READ, read_curve, score_curve
from kha_train.cli.main import run
from kha_train.errors import KhaError
from kha_train.record import Record
from kha_train.stability.columns import NAMES
from kha_train.stability.columns import READ as FILES
from kha_train.stability.errors import CurveError
from kha_train.stability.events import Observation
from kha_train.stability.files import read_curve as read_file

Writer = Callable[[Sequence[Observation]], bytes]


@st.composite
def curves(draw: st.DrawFn) -> list[Observation]:
    """Points whose numbers every format can represent: 7 digits for Megatron's loss and rate, 3 decimals for its
    norm.
    """
    steps = sorted(draw(st.sets(st.integers(1, 10**6), min_size=1, max_size=12)))
    loss = st.integers(1, 20_000).map(lambda thousandths: thousandths / 1000) | st.just(math.nan)
    norm = st.integers(1, 9_999).map(lambda thousandths: thousandths / 1000)
    rate = st.integers(1, 9_999).map(lambda millionths: float(f"{millionths}e-6"))
    return [Observation(step, draw(loss), draw(norm), lr=draw(rate)) for step in steps]


def table(points: Sequence[Observation], delimiter: str = ",", names: str = "step,loss,grad_norm,lr") -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(names.split(","))
    writer.writerows((point.step, point.loss, point.grad_norm, point.lr) for point in points)
    return text.getvalue()


def with_decimal_commas(points: Sequence[Observation]) -> bytes:
    rows = [f"{p.step};{p.loss};{p.grad_norm};{p.lr:.6f}".replace(".", ",") for p in points]
    return "\n".join(["sep=;", "Step;Loss;Grad Norm;Learning Rate", *rows]).encode()


def with_foreign_columns(points: Sequence[Observation]) -> bytes:
    """With further columns, among them a note of more than the 131,072 characters that Python's reader accepts by
    default.
    """
    rows = [f'"zurück, {"x" * 140_000}",{p.step},{p.loss},,{p.grad_norm},{p.lr}' for p in points]
    return "\n".join(["größe,step,loss,leer,grad_norm,lr", *rows]).encode("latin-1")


def json_lines(points: Sequence[Observation], step: str, loss: str, norm: str, rate: str) -> str:
    """With a row of another kind before each, and no line break at the end."""
    rows = []
    for p in points:
        rows += [{step: p.step, "eval/loss": 1.5, loss: None}, {step: p.step, loss: p.loss, norm: p.grad_norm}]
        rows[-1][rate] = p.lr
    return "\n".join(json.dumps(row) for row in rows)


def with_text_for_numbers(points: Sequence[Observation]) -> bytes:
    words = {"nan": "NaN"}
    rows = [
        {"_step": f"{p.step}", "loss": words.get(str(p.loss), str(p.loss)), "grad_norm": str(p.grad_norm), "lr": p.lr}
        for p in points
    ]
    return "\r\n".join(json.dumps(row) for row in rows).encode()


def wandb_export(points: Sequence[Observation]) -> bytes:
    run = "kha - seed 0, small"
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    metrics = ("train/loss", "train/grad_norm", "train/learning_rate")
    writer.writerow(["Step", *(f"{run} - {name}{end}" for name in metrics for end in ("", "__MIN", "__MAX"))])
    for p in points:
        writer.writerow([p.step, *(value for number in p[1:3] for value in (number, -1, 99)), p.lr, -1, 99])
        writer.writerow([p.step + 1] + [""] * 9)
    return text.getvalue().encode()


def log_history(points: Sequence[Observation]) -> list[dict[str, float]]:
    rows = [
        {"epoch": p.step / 7, "grad_norm": p.grad_norm, "learning_rate": p.lr, "loss": p.loss, "step": p.step}
        for p in points
    ]
    last = {"epoch": 1.0, "step": points[-1].step + 1}
    return [*rows, {**last, "eval_loss": 3.5, "eval_runtime": 2.0}, {**last, "train_loss": 2.75, "train_runtime": 9.0}]


def trainer_state(points: Sequence[Observation]) -> bytes:
    state = {"best_metric": None, "epoch": 1.0, "global_step": 5, "log_history": log_history(points), "max_steps": 9}
    return json.dumps(state, indent=2).encode()


def megatron(points: Sequence[Observation]) -> bytes:
    lines = ["using world size: 8, data-parallel size: 8", "[before the start of training step] datetime: 2026-11-29"]
    for p in points:
        loss = "" if math.isnan(p.loss) else f" lm loss: {p.loss:.6E} | load_balancing_loss: 1.0E+00 |"
        lines += [
            (
                f" [2026-11-29 10:00:00] iteration {p.step:8d}/ 1000000 | consumed samples: {p.step * 8:12d} | "
                f"elapsed time per iteration (ms): 123.4 | learning rate: {p.lr:.6E} | global batch size: 8 |{loss} "
                f"loss scale: 1.0 | grad norm: {p.grad_norm:.3f} | number of skipped iterations:   0 | "
                f"number of nan iterations: {math.isnan(p.loss):3d} |"
            ),
            f" validation loss at iteration {p.step} | lm loss value: 9.0E+00 | lm loss PPL: 9.0E+01 | ",
        ]
    return "\n".join([*lines, " iteration 99999/ 1000000 | consumed samples: 1 | lm loss: 1.23"]).encode()


FORMATS: dict[str, Writer] = {
    "csv": lambda points: table(points).encode(),
    "csv_with_other_names": lambda points: table(points, names="Iteration,Train Loss,GRAD NORM,LR").encode(),
    "tsv": lambda points: table(points, "\t").encode(),
    "semicolons": lambda points: table(points, ";").encode(),
    "decimal_commas": with_decimal_commas,
    "spaces_as_numpy_writes_them": lambda points: f"# made by numpy\n# {table(points, ' ')}".encode(),
    "utf_8_with_a_mark": lambda points: table(points).encode("utf-8-sig"),
    "utf_16": lambda points: table(points).encode("utf-16"),
    "utf_16_without_a_mark": lambda points: table(points).encode("utf-16-be"),
    "latin_1_and_large_cells": with_foreign_columns,
    "json_lines": lambda points: json_lines(points, "step", "loss", "grad_norm", "lr").encode(),
    "json_lines_in_utf_16": lambda points: json_lines(points, "step", "loss", "grad_norm", "lr").encode("utf-16"),
    "wandb_history": lambda points: json_lines(
        points, "_step", "train/loss", "train/grad_norm", "train/learning_rate"
    ).encode(),
    "text_for_numbers": with_text_for_numbers,
    "wandb_export": wandb_export,
    "trainer_state": trainer_state,
    "log_history_alone": lambda points: json.dumps(log_history(points)).encode(),
    "megatron": megatron,
}


def seen_in(path: Path, content: bytes) -> list[Observation]:
    path.write_bytes(content)
    return list(read_curve(path).points)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(points=curves(), suffix=st.sampled_from(["txt", "csv", "log", "jsonl", "weird"]))
def test_the_same_curve_in_every_format_is_the_same_observations_whatever_the_suffix(
    name: str, tmp_path: Path, points: list[Observation], suffix: str
) -> None:
    # repr, because a NaN is equal to nothing.
    assert repr(seen_in(tmp_path / f"curve.{suffix}", FORMATS[name](points))) == repr(points)


@pytest.mark.parametrize("name", ["json_lines", "wandb_history", "trainer_state", "megatron"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(points=curves(), share=st.floats(0, 1))
def test_a_file_cut_anywhere_gives_true_points_or_is_refused(
    name: str, tmp_path: Path, points: list[Observation], share: float
) -> None:
    content = FORMATS[name](points)
    try:
        seen = seen_in(tmp_path / "curve", content[: round(share * len(content))])
    except KhaError:
        return
    # In a Megatron line the norm comes after the loss, so it may be the part that is missing.
    known = {(p.step, repr(p.loss)) for p in points}
    assert {(p.step, repr(p.loss)) for p in seen} <= known


WORDS = st.sampled_from(
    ['{"step": 1, "loss": ', "step,loss\n", "1,2.5", '"', "}", "\n", "[", " iteration 1/ 2 | lm loss: "]
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    content=st.binary(max_size=60)
    | st.lists(WORDS | st.text(max_size=8), max_size=8).map(lambda w: "".join(w).encode())
)
def test_any_bytes_are_a_curve_or_one_line(tmp_path: Path, content: bytes) -> None:
    try:
        assert seen_in(tmp_path / "curve", content)
    except KhaError as error:
        assert error.exit_code in (2, 4) and "\n" not in error.line() and "delete" not in error.line()


def test_a_copy_of_our_own_record_says_what_the_run_says(tmp_path: Path) -> None:
    record = Record.open(tmp_path / "run")
    record.begin_attempt(0)
    (tmp_path / "run" / "config.yaml").write_text("run: {}\n")
    for step in range(1, 201):
        loss = math.nan if step == 120 else 5.0 if step == 150 else 3.0
        place = {"samples_first": 8 * step, "samples_last": 8 * step + 7, "tokens": 1000 * step}
        record.step({"step": step, **place, "train/loss": loss, "train/grad_norm": 1.5, "train/lr": 0.25})
    record.close()
    (tmp_path / "elsewhere").mkdir()
    copies = [tmp_path / "elsewhere" / "metrics.jsonl", tmp_path / "renamed.csv", tmp_path / "run" / "copy.txt"]
    for copy in copies:
        copy.write_bytes((tmp_path / "run" / "metrics.jsonl").read_bytes())
    own = read_curve(tmp_path / "run")
    assert [event.start_step for event in score_curve(own).events] == [120, 150]
    for path in (*copies, tmp_path / "elsewhere"):
        curve = read_curve(path)
        assert curve.run_dir is None and repr(curve.points) == repr(own.points)


def spike_over(steps: Sequence[object]) -> str:
    losses = [6.0 if number == 300 else 3.0 for number in range(len(steps))]
    return "step,loss\n" + "\n".join(f"{step},{loss}" for step, loss in zip(steps, losses, strict=True))


def test_fractional_steps_are_refused_and_whole_ones_keep_the_spike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "curve.csv"
    path.write_text(spike_over([number / 100 for number in range(600)]))
    with pytest.raises(SystemExit) as ended:
        run(["spikes", str(path)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert "curve.csv:3 = 0.01: step is a fraction" in said and "over optimiser steps" in said
    path.write_text(spike_over([f"{number}.0" for number in range(600)]))
    with pytest.raises(SystemExit) as ended:
        run(["spikes", str(path), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert not ended.value.code and answer["summary"]["steps"] == 600
    assert [event["start_step"] for event in answer["events"]] == [300]


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"\x1f\x8b\x08\x00 a gzip", 2, ["gzip archive", READ]),
        (b"PAR1\x00\x00", 2, ["Parquet", READ]),
        (b"\x00\x01\x02\x03binary", 2, ["binary", READ]),
        (b"", 2, ["empty", READ]),
        (b"Dear all,\nstep by step\n", 2, ["Dear all,", "no step and no loss", READ]),
        (b"{'loss': 2.5, 'epoch': 0.1}\n", 2, ["{'loss': 2.5", "no step and no loss", READ]),
        (b"Wall time,Step,Value\n1,2,3\n", 2, ["Wall time,Step,Value", "no loss", READ]),
        (b"step,val_loss\n1,2\n", 2, ["step,val_loss", "no loss", READ]),
        (b"epoch,loss\n1,2\n", 2, ["epoch,loss", "no step", READ]),
        (b"1,3.5\n2,3.4\n", 2, ["holds numbers", "step,loss"]),
        (b"step,loss\n", 2, ["no step with a loss", READ]),
        (b"step,loss\n1,\n2,null\n", 2, ["no step with a loss", READ]),
        (b'{\n "model_type": "llama",\n "hidden_size": 8\n}\n', 2, ["model_type,hidden_size", "log_history", READ]),
        (b'{"epoch": 1, "log_history": [{"eval_loss": 2.0, "step": 1}]}', 2, ["eval_loss,step", "for loss", READ]),
        (b'{"log_history": [{"train_loss": 2.0, "step": 9}]}', 2, ["no column for loss", READ]),
        (b'{"log_history": [1, 2]}', 2, ["log_history", "not a list of JSON objects", READ]),
        (b'{"step": 1, "eval/loss": 2.0}\n', 2, ["step,eval/loss", "no column for loss", READ]),
        (b'{"id": "a", "kind": "stop", "step": 1, "attempt": 1, "loss": 3.0}\n', 2, ["events", "metrics.jsonl"]),
        (b'{"step": 1, "attempt": 1, "train/loss": 3.0, "discarded_reason": "x"}\n', 2, ["undid", "metrics.jsonl"]),
        (b'"Step","a - train/loss","b - train/loss"\n1,2,3\n', 2, ["several runs", "a, b", "one run per file"]),
        (b"step,loss,Loss\n1,2,3\n", 2, ["two columns hold the loss", "loss,Loss"]),
        (b"step,loss\n1,2\n,3\n", 4, ["curve:3", "without a step"]),
        (b"step,loss\n1,2\n2,x\n", 4, ["curve:3", "'x'", "loss is not a number"]),
        (b"step,loss\n1,2\n\n1_000,2\n", 4, ["curve:4", "'1_000'", "step is not a number"]),
        (b"step,loss\n1,2\n2,3,4\n", 4, ["curve:3", "3 cells under 2 headings"]),
        (b'step,loss,note\n1,2,a\n2,3,"b\n3,4,c\n', 4, ["curve:3", "row that begins here"]),
        (b"step;loss\n1,000;2,5\n", 4, ["curve:2", "'1,000'", "step is not a number"]),
        (b"step,loss,tokens\n1,2,0.5\n", 2, ["curve:2", "tokens is a fraction"]),
        (b"step,loss\nnan,2\n", 4, ["curve:2", "step is not a valid count"]),
        (b"step,loss\n1e300,2\n", 4, ["curve:2", "step is not a valid count"]),
        (b'{"step": true, "loss": 2}\n', 4, ["curve:1", "step is not a number"]),
        (b'{"step": 1, "loss": 2}\n{"step": 2, "los\n{"step": 3, "loss": 2}\n', 4, ["curve:2", "not JSON"]),
        (b'{"step": 1, "loss": 2}\n[2, 3]\n', 4, ["curve:2", "not a JSON object"]),
        (b'{"log_history": [{"step": 1, "loss":', 4, ["begins like JSON"]),
        ("step,loss\n1,2\n".encode("utf-16")[:-1], 4, ["not valid text in utf-16"]),
    ],
)  # fmt: skip
def test_a_refusal_names_what_was_seen_and_what_is_read(
    content: bytes, code: int, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "curve").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        run(["spikes", str(tmp_path / "curve")])
    said = capsys.readouterr().err
    assert ended.value.code == code and said.count("\n") == 1
    assert [word for word in words if word not in said] == [] and "delete" not in said


def test_only_kha_spikes_offers_to_read_a_run_directory() -> None:
    """The package spike-score reads files alone."""
    for content in (b"", b"Dear all,\n", b'{"step": 1, "attempt": 1, "kind": "start"}\n'):
        with pytest.raises(CurveError) as refused:
            read_file(content, "curve")
        assert "directory" not in str(refused.value)
    assert READ == f"a run directory, or {FILES}"


def test_a_directory_without_a_record_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(KhaError, match="has no metrics.jsonl") as caught:
        read_curve(tmp_path)
    assert caught.value.exit_code == 2 and READ in str(caught.value)


def test_an_optimiser_step_comes_before_the_row_count_of_wandb(tmp_path: Path) -> None:
    rows = [{"_step": 2 * step + 1, "train/global_step": step, "train/loss": 3.0} for step in (10, 20)]
    content = "\n".join(json.dumps(row) for row in [*rows, {"_step": 50, "train_loss": 2.0}]).encode()
    assert [point.step for point in seen_in(tmp_path / "curve", content)] == [10, 20]
    # Our own runs log `step`, and a restart moves the row count away from it.
    content = b'"Step","a - step","a - train/loss","a - loss"\n7,5,3.5,9\n8,6,3.25,9\n'
    assert [(point.step, point.loss) for point in seen_in(tmp_path / "curve", content)] == [(5, 3.5), (6, 3.25)]


def test_reading_large_cells_leaves_the_limit_of_the_process_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert len(seen_in(tmp_path / "curve", with_foreign_columns([Observation(1, 2.5)]))) == 1
    with pytest.raises(KhaError):
        seen_in(tmp_path / "curve", b"step,loss\n1,x\n")
    assert csv.field_size_limit() == before == 131_072


def test_a_megatron_iteration_without_a_loss_is_left_out_unless_it_was_not_finite(tmp_path: Path) -> None:
    lines = [
        "0:  iteration        1/      10 | lm loss: 3.500000E+00 | consumed tokens: 4096 | grad norm: 1.250 |",
        "0:  iteration        2/      10 | number of skipped iterations:   1 | number of nan iterations:   0 |",
        "0:  iteration        3/      10 | number of skipped iterations:   1 | number of nan iterations:   1 |",
    ]
    points = seen_in(tmp_path / "curve", "\n".join(lines).encode())
    assert repr(points) == repr([Observation(1, 3.5, 1.25, 4096), Observation(3, math.nan)])


def test_the_documentation_lists_every_name_that_is_read() -> None:
    text = (Path(__file__).parents[2] / "docs" / "stability.md").read_text()
    for aliases in list(NAMES.values())[:5]:
        assert ", ".join(f"`{name}`" for name in aliases) in text
