"""`kha spikes` on files of any framework and on run directories."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.synthetic import write_dataset
from kha_train.analysis.spikes_text import batch_numbers
from kha_train.cli.main import run
from kha_train.config.build import to_plain
from kha_train.config.compose import compose, dump
from kha_train.record import Record

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
    assert "at the same step" in kha(str(csv_file), str(other))


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
