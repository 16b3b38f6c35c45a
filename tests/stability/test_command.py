"""`kha spikes` on files of any framework and on run directories."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.synthetic import write_dataset
from kha_train.analysis.spikes import LossCurve, across_runs, score_curve
from kha_train.analysis.spikes_text import batch_numbers
from kha_train.cli.main import run
from kha_train.config.build import to_plain
from kha_train.config.compose import compose, dump
from kha_train.record import Record
from kha_train.stability.events import Observation

Kha = Callable[..., str]


@pytest.fixture
def kha(capsys: pytest.CaptureFixture[str]) -> Kha:
    """`kha(*arguments)`: what the command printed; it must end well."""

    def call(*arguments: str) -> str:
        try:
            run(["spikes", *arguments])
        except SystemExit as ended:
            assert not ended.code, capsys.readouterr().err
        return capsys.readouterr().out

    return call


@pytest.fixture
def csv_file(tmp_path: Path, calm) -> Path:
    """400 steps, a spike of three at 201, a NaN at 300, one step twice, and norms."""
    losses = [f"{value!r}" for value in calm(400)]
    losses[200:203] = ["5.0", "4.5", "4.0"]
    losses[299] = "nan"
    rows = [f"{step},{loss},{1 + 0.01 * (step % 7)}" for step, loss in enumerate(losses, start=1)]
    path = tmp_path / "curve.csv"
    path.write_text("\n".join(["step,loss,grad_norm", rows[0], *rows]) + "\n")
    return path


def test_a_csv_of_any_framework_is_scored(kha: Kha, csv_file: Path) -> None:
    answer = json.loads(kha(str(csv_file), "--json"))
    assert [(event["start_step"], event["width"], event["class"]) for event in answer["events"]] == [
        (201, 3, "narrow"),
        (300, 1, "narrow"),
    ]
    assert answer["events"][0].keys() >= {"start_step", "width", "height", "area", "class", "recovered"}
    assert answer["events"][0]["height"] == pytest.approx(2.0, abs=0.02)
    assert all(event["recovered"] for event in answer["events"])
    assert answer["scores"].keys() >= {"spike/olmo_loss_score", "spike/olmo_gnorm_score"}
    assert answer["rates"]["per_1k_steps"]["value"] == 5.0
    assert answer["rates"]["per_billion_tokens"]["value"] is None
    assert answer["summary"]["repeated_steps"] == 1


def test_the_table_and_the_picture_are_made(kha: Kha, csv_file: Path, tmp_path: Path) -> None:
    for suffix, head in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        said = kha(str(csv_file), "--plot", f"{tmp_path}/spikes.{suffix}")
        assert (tmp_path / f"spikes.{suffix}").read_bytes().startswith(head)
        assert "narrow" in said and "per_1k_steps" in said


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "PNG"])
def test_a_picture_replaces_an_earlier_one_and_nothing_else_unasked(
    kha: Kha, csv_file: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / f"spikes.{suffix}"
    other = shutil.copy(csv_file, tmp_path / "other.csv")
    for _ in range(2):
        kha(str(csv_file), "--plot", str(picture))
    ours = picture.read_bytes()
    note = b"<!-- " + ours[ours.index(b"kha-spikes ") :][:80]
    for content, curve in ((b"somebody's", csv_file), (note, csv_file), (ours, other)):
        picture.write_bytes(content)
        with pytest.raises(SystemExit) as ended:
            run(["spikes", str(curve), "--plot", str(picture)])
        assert ended.value.code == 2 and picture.read_bytes() == content
        assert "--overwrite" in capsys.readouterr().err
        kha(str(curve), "--plot", str(picture), "--overwrite")
        kha(str(curve), "--plot", str(picture))
        assert picture.read_bytes() != content


def test_shared_events_are_told_from_private_ones(kha: Kha, csv_file: Path, tmp_path: Path, calm) -> None:
    losses = calm(400, seed=1)
    losses[201] += 2.0
    losses[350] += 2.0
    other = tmp_path / "other.csv"
    other.write_text("step,loss,tokens\n" + "\n".join(f"{s},{x},{s}" for s, x in enumerate(losses, start=1)))
    answer = json.loads(kha(str(csv_file), str(other), "--json"))
    assert answer["shared"]["other.csv"] == {"shared": [202], "private": [351]}
    assert answer["shared"]["curve.csv"] == {"shared": [201], "private": [300]}
    assert answer["shared_by"] == "step"
    assert answer["pooled"]["spikes"] == 4 and answer["pooled"]["steps"] == 800
    assert (answer["pooled"]["tokens"], answer["pooled"]["runs_with_tokens"]) == (400, 1)
    assert answer["pooled"]["per_billion_tokens"]["value"] == pytest.approx(2e9 / 400)
    assert answer["tail_gap"]["other.csv"]["at"] == "step"
    assert "(matched by step)" in " ".join(kha(str(csv_file), str(other)).split())


@pytest.fixture
def alike(tmp_path: Path, calm) -> list[Path]:
    """Three curves of one file name, each with a spike of its own."""
    paths = [tmp_path / folder / "loss.csv" for folder in "abc"]
    for number, path in enumerate(paths):
        losses = calm(200, seed=number)
        losses[100 + 20 * number] += 2.0
        path.parent.mkdir()
        path.write_text("step,loss\n" + "\n".join(f"{s},{x!r}" for s, x in enumerate(losses, start=1)))
    return paths


def test_curves_of_one_file_name_all_stay_in_the_answer(kha: Kha, alike: list[Path]) -> None:
    answer = json.loads(kha(*map(str, alike), "--json"))
    labels = [f"loss.csv ({path})" for path in alike]
    assert [run["label"] for run in answer["runs"]] == labels
    assert [answer["shared"][label]["private"] for label in labels] == [[101], [121], [141]]
    assert answer["reference"] == labels[0] and list(answer["tail_gap"]) == labels[1:]
    said = kha(*map(str, alike))
    assert all("".join(label.split()) in "".join(said.split()) for label in labels)


def test_a_reference_is_told_from_curves_of_its_name_and_is_itself_where_it_is_one_of_them(
    kha: Kha, alike: list[Path]
) -> None:
    first, second, third = alike
    answer = json.loads(kha(str(first), "--reference", str(third), "--json"))
    assert answer["reference"] == f"loss.csv ({third})" and list(answer["tail_gap"]) == [f"loss.csv ({first})"]
    answer = json.loads(kha(str(first), str(second), "--reference", f"{first.parent}/../a/loss.csv", "--json"))
    assert answer["reference"] == f"loss.csv ({first})"
    assert answer["tail_gap"][f"loss.csv ({first})"]["gap"] == 0.0


@pytest.mark.parametrize("again", ["a/loss.csv", "b/../a/loss.csv"])
def test_a_curve_named_twice_is_refused(
    again: str, alike: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["spikes", str(alike[0]), f"{tmp_path}/{again}"])
    assert ended.value.code == 2 and "named twice" in capsys.readouterr().err


POINTS = tuple(Observation(step, 3.0) for step in range(1, 11))


@given(st.lists(st.tuples(st.sampled_from(["x", "x (p)", "x (q)"]), st.sampled_from("pqr")), min_size=2, max_size=6))
def test_nothing_across_runs_is_keyed_by_a_label_that_collides(named: list[tuple[str, str]]) -> None:
    reports = [score_curve(LossCurve(label, POINTS, frozenset(), path=Path(path))) for label, path in named]
    answer = across_runs(reports)
    labels = [run["label"] for run in answer["runs"]]
    distinct_curves = len({report.curve.place for report in reports})
    assert len(set(labels)) == len(answer["shared"]) == distinct_curves
    assert set(answer["shared"]) == set(labels) and set(answer["tail_gap"]) == set(labels[1:])


def blown_up() -> list[float]:
    """100 calm steps at 3, then 13, 103 and eighteen steps of 390."""
    return [3.0] * 100 + [13.0, 103.0] + [390.0] * 18


def write_curve(path: Path, losses: list[float]) -> str:
    path.write_text("step,loss\n" + "\n".join(f"{step},{loss!r}" for step, loss in enumerate(losses, start=1)))
    return str(path)


def test_a_run_that_blows_up_has_its_height_area_and_share_and_has_diverged(kha: Kha, tmp_path: Path) -> None:
    path = write_curve(tmp_path / "curve.csv", blown_up())
    answer = json.loads(kha(path, "--json"))
    (event,) = answer["events"]
    assert (event["start_step"], event["width"], event["class"], event["recovered"]) == (101, 20, "open", False)
    summary = answer["summary"]
    assert (summary["spikes"], summary["events_total"], summary["diverged"]) == (0, 1, True)
    assert answer["rates"]["per_1k_steps"]["value"] == 0.0
    # 390 - 3; (13 - 3) + (103 - 3) + 18 (390 - 3); 20 of 120 steps.
    assert (summary["max_height"], summary["area_total"]) == (387.0, 7076.0)
    assert summary["steps_in_spike_frac"] == 20 / 120
    assert summary["by_class"]["open"] == {"events": 1, "steps": 20, "area": 7076.0, "max_height": 387.0}
    assert [summary["by_class"][kind]["events"] for kind in ("narrow", "wide", "unrecovered")] == [0, 0, 0]
    assert "open at the end: 387 nats above 3" in kha(path, "--event", "1")
    said = kha(path)
    assert "diverged               yes" in said and "unrecovered_total      0" in said


def test_of_a_curve_too_short_for_the_detector_no_rate_is_told(kha: Kha, tmp_path: Path) -> None:
    """The detector judges from step 65 on: before, no spike is no finding, but a loss of nan is."""
    short, long = (write_curve(tmp_path / f"{steps}.csv", [3.0] * steps) for steps in (64, 65))
    broken = write_curve(tmp_path / "broken.csv", [3.0, math.nan, 3.0])
    answers = {path: json.loads(kha(path, "--json")) for path in (short, long, broken)}
    unknown = {"value": None, "low": None, "high": None}
    assert set(map(str, answers[short]["rates"].values())) == {str(unknown)}
    assert answers[short]["summary"]["steps_in_spike_frac"] is None
    for judged in (long, broken):
        assert answers[judged]["rates"]["per_1k_steps"]["value"] is not None
        assert answers[judged]["summary"]["steps_in_spike_frac"] is not None
    said = kha(short)
    assert "per_1k_steps                 -" in said and "nan" not in said
    pooled = json.loads(kha(short, long, "--json"))["pooled"]["per_1k_steps"]
    assert pooled["high"] == pytest.approx(3.689 / 0.065, rel=1e-3), "the steps nobody judged are no exposure"


def test_curves_without_a_common_step_have_no_tail_gap(kha: Kha, tmp_path: Path) -> None:
    one = write_curve(tmp_path / "one.csv", [3.0] * 3)
    other = write_curve(tmp_path / "other.csv", [math.nan] * 3)
    gap = json.loads(kha(one, other, "--json"))["tail_gap"]["other.csv"]
    assert gap == {"gap": None, "points": 0, "at": "step"}
    assert "tail gap to one.csv - nats" in kha(one, other)


HEALTHY = [3.0] * 150


@pytest.mark.parametrize(
    ("losses", "diverged", "classes"),
    [
        ([*HEALTHY, 4.0, *HEALTHY], False, ["narrow"]),
        # Twice the mean five steps in a row, then back: the guard has fired.
        ([*HEALTHY, *[6.5] * 5, *HEALTHY], True, ["narrow"]),
        ([*HEALTHY, *[6.5] * 4, *HEALTHY], False, ["narrow"]),
        # The last step, and nobody knows whether it would have recovered.
        ([*HEALTHY, 4.0], True, ["open"]),
        ([*HEALTHY, 4.0, 3.0, 3.0], True, ["open"]),
        ([*HEALTHY, 4.0, 3.0, 3.0, 3.0], False, ["narrow"]),
        ([*HEALTHY, *[5.0] * 2010], False, ["unrecovered"]),
        ([*HEALTHY, math.nan, math.nan], True, ["open"]),
    ],
)
def test_diverged_is_an_event_open_at_the_end_or_a_guard_that_fired(
    losses: list[float], diverged: bool, classes: list[str], kha: Kha, tmp_path: Path
) -> None:
    answer = json.loads(kha(write_curve(tmp_path / "curve.csv", losses), "--json"))
    assert answer["summary"]["diverged"] is diverged
    assert [event["class"] for event in answer["events"]] == classes


def test_curves_together_say_which_of_them_diverged(kha: Kha, tmp_path: Path) -> None:
    paths = [write_curve(tmp_path / "calm.csv", HEALTHY), write_curve(tmp_path / "lost.csv", blown_up())]
    pooled = json.loads(kha(*paths, "--json"))["pooled"]
    assert (pooled["spikes"], pooled["diverged"], pooled["diverged_runs"]) == (0, True, ["lost.csv"])
    assert "diverged: lost.csv" in kha(*paths)


@pytest.mark.parametrize("tokens", [None, 50])
def test_the_tail_gap_is_at_equal_steps_where_tokens_are_absent(
    tokens: int | None, kha: Kha, tmp_path: Path, calm
) -> None:
    first = tmp_path / "first.csv"
    first.write_text("step,loss\n" + "\n".join(f"{s},{x!r}" for s, x in enumerate(calm(100), start=1)))
    second = tmp_path / "second.csv"
    header, end = ("step,loss,tokens", f",{tokens}") if tokens else ("step,loss", "")
    rows = [f"{s},{x + 0.25!r}{end}" for s, x in enumerate(calm(100), start=1)]
    second.write_text("\n".join([header, *rows]))
    gaps = json.loads(kha(str(first), str(second), "--json"))["tail_gap"]
    assert gaps["second.csv"] == {"gap": pytest.approx(0.25), "points": 51, "at": "step"}
    same = json.loads(kha(str(second), str(first), "--reference", str(first), "--json"))["tail_gap"]
    assert same["first.csv"] == {"gap": 0.0, "points": 51, "at": "step"}


def test_a_curve_that_begins_late_is_not_charged_with_what_came_before(kha: Kha, tmp_path: Path, calm) -> None:
    path = tmp_path / "late.csv"
    losses = calm(200)
    losses[150] = 5.0
    rows = [f"{step},{loss!r},{step * 1000}" for step, loss in enumerate(losses, start=100_000)]
    path.write_text("\n".join(["step,loss,tokens", *rows]))
    answer = json.loads(kha(str(path), "--json"))
    assert (answer["summary"]["steps"], answer["summary"]["tokens"]) == (200, 200_000)
    assert answer["rates"]["per_billion_tokens"]["value"] == pytest.approx(1e9 / 200_000)


@pytest.mark.parametrize(
    ("content", "code", "word"),
    [("a,b\n1,2\n", 2, "step and loss"), ("step,loss\n1,x\n", 4, "curve.csv:2"), ("step,loss\n", 2, "no step")],
)
def test_a_file_that_is_no_curve_is_one_clear_line(
    content: str, code: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "curve.csv").write_text(content)
    with pytest.raises(SystemExit) as ended:
        run(["spikes", str(tmp_path / "curve.csv")])
    said = capsys.readouterr().err
    assert ended.value.code == code and word in said and said.count("\n") == 1


@pytest.mark.parametrize("option", [("--plot", "p.png"), ("--event", "1")])
def test_one_picture_or_event_of_several_curves_is_refused(
    option: tuple[str, str], csv_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["spikes", str(csv_file), str(csv_file), *option])
    assert ended.value.code == 2 and "one curve at a time" in capsys.readouterr().err


@pytest.fixture
def run_dir(tmp_path: Path, small: list[str], calm, observed) -> Path:
    """A run directory with one spike, at step 150, and the evidence of its opening."""
    write_dataset(tmp_path / "data", vocab_size=256, documents=60, seed=0)
    places = [f"data.{split}={tmp_path}/data/{split}" for split in ("train", "validation")]
    config = compose([*small, *places, f"run.dir={tmp_path}/run"])
    record = Record.open(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(dump(config))
    record.begin_attempt(0)
    losses = calm(200)
    losses[149] = 9.0
    for seen in observed(losses):
        record.step({**_line(seen), "train/loss": seen.loss})
    evidence = {"grad_norms": {"blocks.0": 7.0}, "max_logits": [3.0]}
    record.event("spike_opened", 150, loss=9.0, evidence=evidence)
    record.close()
    assert to_plain(config)["data"]["global_batch_size"] == 8
    return tmp_path / "run"


def _line(seen: Any) -> dict[str, Any]:
    place = {"samples_first": seen.samples_first, "samples_last": seen.samples_last}
    return {"step": seen.step, "tokens": seen.tokens, "train/grad_norm": seen.grad_norm, **place}


def test_an_event_is_shown_with_its_evidence_and_the_text_of_its_batch(kha: Kha, run_dir: Path) -> None:
    answer = json.loads(kha(str(run_dir), "--event", "1", "--json"))
    assert answer["event"]["start_step"] == 150
    assert answer["opened"]["evidence"]["grad_norms"] == {"blocks.0": 7.0}
    assert [text["sample"] for text in answer["texts"]] == list(range(8 * 149, 8 * 150))
    assert all(len(text["text"].split()) == 64 for text in answer["texts"]), "ids, for these shards have no tokenizer"
    shown = kha(str(run_dir), "--event", "1")
    assert "narrow event, steps 150 to 150" in shown and "blocks.0" in shown and "--- sample 1192" in shown
    assert [line["step"] for line in answer["around"]] == list(range(145, 156))


def test_a_rewound_and_a_surviving_event_at_one_step_show_their_own(kha: Kha, tmp_path: Path, calm, observed) -> None:
    record = Record.open(tmp_path / "run")
    record.begin_attempt(0)
    (tmp_path / "run" / "config.yaml").write_text("run: {}\n")
    curve = observed(calm(220))
    for seen in curve[:145]:
        record.step({**_line(seen), "train/loss": seen.loss})
    # Step 146 opens an event and closes it before the trouble of step 150; it is replayed as it was.
    for shift in (0, 80):
        for seen in curve[145 : 200 if shift else 152]:
            moved = shift if seen.step >= 150 else 0
            place = {name: getattr(seen, name) + moved for name in ("samples_first", "samples_last")}
            loss = 5.0 if seen.step in (146, 150) else seen.loss
            record.step({**_line(seen), **place, "train/loss": loss})
            if seen.step in (146, 150):
                record.event("spike_opened", seen.step, **place, evidence={"shift": moved})
        if not shift:
            record.rewind_to(140, "rewind 1 from step 152: a test")
            for seen in curve[140:145]:
                record.step({**_line(seen), "train/loss": seen.loss})
    record.close()
    run_dir = str(tmp_path / "run")
    told = [json.loads(kha(run_dir, "--event", str(number), "--json")) for number in (1, 2, 3)]
    assert [(one["event"]["start_step"], one["opened"]["evidence"]["shift"]) for one in told] == [
        (146, 0),
        (150, 80),
        (150, 0),
    ]
    steps = [[line["step"] for line in one["around"]] for one in told]
    losses = [{line["step"]: line["train/loss"] for line in one["around"]} for one in told]
    # Of the undone event the run had only three steps.
    assert steps == [list(range(141, 152)), list(range(145, 156)), list(range(145, 151))]
    assert [seen[150] for seen in losses[1:]] == [5.0, 5.0]
    answer = json.loads(kha(run_dir, "--json"))
    assert [event["rewound"] for event in answer["events"]] == [False, False, True]
    assert (answer["summary"]["steps"], answer["summary"]["tokens"]) == (203, 203_000), "150..152 were done twice"
    assert json.loads(kha(run_dir, "--no-rewound", "--json"))["summary"]["steps"] == 200


@pytest.mark.parametrize(("state", "diverged"), [("diverged", True), ("done", False)])
def test_a_run_that_ended_with_exit_code_5_has_diverged(
    state: str, diverged: bool, kha: Kha, tmp_path: Path, calm, observed
) -> None:
    record = Record.open(tmp_path / "run")
    record.begin_attempt(0)
    (tmp_path / "run" / "config.yaml").write_text("run: {}\n")
    for seen in observed(calm(80)):
        record.step({**_line(seen), "train/loss": seen.loss})
    record.close(state)
    assert json.loads(kha(str(tmp_path / "run"), "--json"))["summary"]["diverged"] is diverged


def test_a_divergence_that_a_rewind_undid_counts_as_its_events_do(kha: Kha, tmp_path: Path, observed) -> None:
    record = Record.open(tmp_path / "run")
    record.begin_attempt(0)
    (tmp_path / "run" / "config.yaml").write_text("run: {}\n")
    for seen in observed([3.0] * 150 + [9.0] * 5):
        record.step({**_line(seen), "train/loss": seen.loss})
    record.rewind_to(140, "rewind 1 from step 155: a test")
    for seen in observed([3.0] * 200)[140:]:
        place = {"samples_first": seen.samples_first + 800, "samples_last": seen.samples_last + 800}
        record.step({**_line(seen), **place, "train/loss": seen.loss})
    record.close()
    told = [json.loads(kha(str(tmp_path / "run"), *options, "--json")) for options in ((), ("--no-rewound",))]
    assert [(one["summary"]["diverged"], one["summary"]["max_height"]) for one in told] == [(True, 6.0), (False, 0.0)]
    assert told[0]["summary"]["spikes"] == 0 and told[0]["events"][0]["class"] == "unrecovered"


def test_what_a_restart_redoes_or_undoes_is_no_second_action(kha: Kha, tmp_path: Path, calm, observed) -> None:
    curve = observed(calm(30))

    def steps(record: Record, numbers: range, discarded: tuple[int, ...]) -> None:
        for seen in curve[numbers.start - 1 : numbers.stop - 1]:
            record.step({**_line(seen), "train/loss": seen.loss})
            if seen.step in discarded:
                record.event("step_discarded", seen.step, samples_first=seen.samples_first)

    record = Record.open(tmp_path / "run")
    record.begin_attempt(0)
    (tmp_path / "run" / "config.yaml").write_text("run: {}\n")
    steps(record, range(1, 21), (5, 15, 18))
    record.event("rewind", 20, window=[80, 96])
    record.close()
    record = Record.open(tmp_path / "run")
    record.begin_attempt(10)
    steps(record, range(11, 31), (15,))
    record.event("rewind", 20, window=[80, 96])
    record.event("rewind", 20, window=[96, 112])
    record.close()
    actions = json.loads(kha(str(tmp_path / "run"), "--json"))["actions"]
    assert (actions["step_discarded"], actions["rewind"]) == (2, 2)


def test_evidence_is_shown_even_when_the_data_is_gone(kha: Kha, run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("run: {}\n")
    answer = json.loads(kha(str(run_dir), "--event", "1", "--json"))
    assert answer["texts"] == [] and answer["no_texts"]
    assert answer["opened"]["evidence"]["max_logits"] == [3.0]


def test_a_batch_jumps_over_windows_made_before_it_and_not_over_its_own() -> None:
    assert batch_numbers(10, 4, [(12, 20)]).tolist() == [10, 11, 20, 21]
    assert batch_numbers(14, 4, [(12, 20)]).tolist() == [14, 15, 16, 17]


def test_a_planned_jump_is_left_out(kha: Kha, tmp_path: Path, calm) -> None:
    path = tmp_path / "jump.csv"
    losses = calm(200) + calm(200, seed=1, level=4.0)
    path.write_text("step,loss\n" + "\n".join(f"{s},{x}" for s, x in enumerate(losses, start=1)))
    assert json.loads(kha(str(path), "--json"))["summary"]["events_total"] == 1
    assert json.loads(kha(str(path), "--planned", "201", "--json"))["summary"]["events_total"] == 0


def test_nothing_in_the_json_is_beyond_json(kha: Kha, csv_file: Path) -> None:
    def refuse(word: str) -> float:
        raise AssertionError(word)

    answer = json.loads(kha(str(csv_file), "--json"), parse_constant=refuse)
    assert not math.isnan(answer["summary"]["max_height"])


def test_what_a_short_curve_cannot_tell_is_null_and_a_dash_and_no_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "curve.csv"
    for steps, judged in ((1000, False), (1001, True)):
        path.write_text("step,loss\n" + "\n".join(f"{s},{3 + s % 7 / 100}" for s in range(1, steps + 1)))
        for as_json in (True, False):
            with pytest.raises(SystemExit):
                run(["spikes", str(path), *(["--json"] if as_json else [])])
            said = capsys.readouterr().out
            if as_json:
                answer = json.loads(said)
                assert answer["scores"]["spike/olmo_loss_score"] == (0.0 if judged else None)
                assert answer["scores"]["spike/olmo_loss_up_score"] == (0.0 if judged else None)
                assert answer["scores"]["spike/olmo_gnorm_score"] is None, "the curve has no norms"
                assert answer["rates"]["per_billion_tokens"] == {"value": None, "low": None, "high": None}
            else:
                lines = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}
                assert lines["spike/olmo_loss_score"] == ["0" if judged else "-"]
                assert lines["per_billion_tokens"] == ["-"] and "nan" not in said
