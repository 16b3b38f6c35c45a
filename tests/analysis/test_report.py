"""The report says what the files of the runs say, as a script without shared code computes it."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kha_train.analysis.answer import answers
from kha_train.analysis.compare import compare_runs
from kha_train.analysis.heads.inspection import (
    SCHEMA,
    Inspection,
    LayerInspection,
    LearnedMatrix,
    ProbeRows,
    write_inspection,
)
from kha_train.analysis.report import difference, loss
from kha_train.analysis.report.context import RAW_POINTS, Context
from kha_train.analysis.report.page import report_html, sections_of, write_report
from kha_train.analysis.report.svg import tick_labels, ticks
from kha_train.cli.main import run
from tests.analysis.test_compare import Page, make_run

SEEDS = (0, 1, 2)
STEPS = 900
SPIKES = {
    "gqa": ((200, 400, 520, 640), (200, 330, 460, 700), (200, 300, 450, 600, 820)),
    "kha_mlp": ((200, 420), (210, 340, 460, 720), (150, 230, 310, 390, 470, 550, 630, 710, 790)),
}
"""Steps at which the runs of a seed spike. The spread of the second variant is wider than Poisson's interval."""


def spiky(variant: str, seed: int) -> list[float]:
    noise = np.random.default_rng([seed, len(variant)]).normal(scale=0.01, size=STEPS)
    losses = 2.0 + noise - (0.02 + 0.01 * seed) * (variant == "kha_mlp")
    for step in SPIKES[variant][seed]:
        losses[step - 1] += 6.0
    return losses.tolist()


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The runs of two variants with three seeds."""
    place = tmp_path_factory.mktemp("six")
    return {
        variant: [
            make_run(place / f"{variant}{seed}", spiky(variant, seed), variant=variant, seed=seed) for seed in SEEDS
        ]
        for variant in SPIKES
    }


def answer_of(*words: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        run(["compare", *map(str, words), "--json"])
    assert not ended.value.code
    return json.loads(capsys.readouterr().out)


def assert_interval(found: dict[str, float], expected: list[float]) -> None:
    """Equal but for the table of Student's t, which has three decimals."""
    mean, low, high = expected
    assert found["mean"] == pytest.approx(mean, rel=1e-9)
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=1e-4 * (high - low))


@pytest.fixture
def recomputed(six: dict[str, list[Path]]) -> dict[str, Any]:
    """The figures of the six runs, computed by a script in an interpreter that cannot see the package."""
    script = Path(__file__).with_name("recompute.py")
    command = [sys.executable, "-I", str(script), *map(str, six["gqa"]), "--", *map(str, six["kha_mlp"])]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=script.parent)
    return json.loads(ended.stdout)


def test_six_runs_computed_again_without_shared_code_give_the_same_json(
    six: dict[str, list[Path]], recomputed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer_of(*six["gqa"], *six["kha_mlp"], "--out", tmp_path / "out", capsys=capsys)
    for one in found["runs"]:
        expected = recomputed["runs"][one["path"]]
        shown = {**one, **one["cost"]}
        assert {key: shown[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    (over,) = found["across_seeds"]
    assert over["differences"] == pytest.approx(recomputed["differences"], rel=1e-9)
    assert_interval(over["interval"], recomputed["over_seeds"])
    (domain,) = [one for one in found["domains"] if one["figure"] == "loss"]
    assert domain["entries"] == "validation" and set(domain["steps"]) == {STEPS}
    assert domain["differences"] == pytest.approx(recomputed["validation_differences"], rel=1e-9)
    assert_interval(domain["interval"], recomputed["validation_over_seeds"])
    for events, pooled in zip(found["events"], recomputed["pooled"], strict=True):
        # Student's t, tabulated with three decimals, stands in an exponent here.
        assert events["rate"] == pytest.approx(pooled, rel=5e-4)
    (sentence,) = found["answer"]
    mean, low, high = recomputed["over_seeds"]
    told = f"{mean:+.4f} nats per token, 95 % over 3 seeds: {low:+.4f} to {high:+.4f}"
    below, p = recomputed["below_zero"], recomputed["sign_p"]
    split = f"sign test: {below} below zero, {3 - below} above, p {p:.2g} (cannot reach 0.05 with fewer than 6 seeds)"
    assert low < 0 < high
    assert sentence == f"kha_mlp against gqa: no difference in train loss that 3 seeds show, {told}; {split}."


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ((-0.10, -0.11, -0.12), "lower train loss, -0.1100 nats per token, 95 % over 3 seeds: -0.1348 to -0.0852"),
        ((0.10, 0.20), "no difference in train loss that 2 seeds show, +0.1500 nats"),
        ((0.10, 0.1002), "higher train loss, +0.1001 nats per token, 95 % over 2 seeds: +0.0988 to +0.1014"),
        ((0.10,), "train loss +0.1000 nats per token in one seed. 1 seed: not evidence."),
    ],
)
def test_the_answer_claims_what_the_interval_over_seeds_allows(
    offsets: tuple[float, ...], said: str, tmp_path: Path
) -> None:
    runs = [make_run(tmp_path / f"a{seed}", [3.0] * 40, seed=seed) for seed in range(len(offsets))]
    for seed, offset in enumerate(offsets):
        runs.append(make_run(tmp_path / f"b{seed}", [3.0 + offset] * 40, variant="mea", seed=seed))
    comparison = compare_runs(runs)
    (sentence,) = answers(comparison)
    assert sentence.startswith(f"mea against gqa: {said}")
    assert ("weak evidence" in sentence) == (len(offsets) == 2 and "higher" in said)
    assert sentence in report_html(comparison).replace("&#x27;", "'")


def test_the_report_is_a_page_a_document_pictures_and_numbers_that_agree(
    six: dict[str, list[Path]], tmp_path: Path
) -> None:
    comparison = compare_runs([*six["gqa"], *six["kha_mlp"]])
    page = write_report(comparison, tmp_path / "out")
    (sentence,) = answers(comparison)
    document = (tmp_path / "out" / "report.md").read_text()
    assert page.read_text() == report_html(comparison) and sentence in page.read_text()
    assert f"**{sentence}**".replace("_", "\\_") in document
    names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    linked = [part.split(")")[0] for part in document.split("(figures/")[1:]]
    assert set(linked) == names, "the document links to every file, and to no other"
    assert {f"loss-{axis}.svg" for axis in ("steps", "tokens", "hours")} < names
    with (tmp_path / "out" / "figures" / "difference.csv").open() as file:
        rows = list(csv.DictReader(file))
    means = {row["series"]: float(row["value"]) for row in rows if row["kind"] == "mean"}
    (over,) = comparison.across_seeds
    assert list(means.values()) == pytest.approx(over.differences, rel=1e-8)
    marks = [row for row in rows if row["kind"] == "line"]
    assert {float(row["tokens"]) / float(row["steps"]) for row in marks} == {32.0}


def test_the_events_of_a_run_are_marked_on_its_curve_over_every_axis(
    six: dict[str, list[Path]], tmp_path: Path
) -> None:
    write_report(compare_runs([six["gqa"][0], six["kha_mlp"][0]]), tmp_path)
    with (tmp_path / "figures" / "loss.csv").open() as file:
        marked = [row for row in csv.DictReader(file) if row["kind"] == "spike"]
    by_run = {
        name: [int(row["steps"]) for row in marked if row["series"].startswith(name)] for name in ("gqa", "kha_mlp")
    }
    assert by_run == {variant: list(steps[0]) for variant, steps in SPIKES.items()}
    assert all(float(row["value"]) > 7 for row in marked)
    for axis in ("steps", "tokens", "hours"):
        assert (tmp_path / "figures" / f"loss-{axis}.svg").read_text().count("<title>") == 1 + len(marked)


def test_a_run_that_blew_up_is_called_diverged_wherever_its_spikes_stand(tmp_path: Path) -> None:
    calm = make_run(tmp_path / "a", [3.0] * 400)
    lost = make_run(tmp_path / "b", [*([3.0] * 100), *([900.0] * 300)], variant="mea")
    dead = make_run(tmp_path / "c", [*([3.0] * 200), *([math.nan] * 200)], variant="mha")
    comparison = compare_runs([calm, lost, dead])
    (_, mea, mha) = comparison.events
    assert (mea.diverged, mha.diverged) == (("mea-s0",), ("mha-s0",)) and mea.rate["value"] is None
    said = answers(comparison)
    assert "1 of 1 mea runs diverged (mea-s0)" in said[0] and "1 of 1 mha runs diverged (mha-s0)" in said[1]
    page = report_html(comparison)
    assert page.count("<td>diverged (spikes before: 0)</td>") == 4, "in the table of events and in that of the run"
    assert "mha-s0 diverged or did not recover." in page
    # The mean of a pair leaves out what is not finite, so a run that died looks calm there: no emphasis.
    assert "<b>" not in page


def test_an_unfair_pair_is_marked_in_every_form_and_emphasised_in_none(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(scale=0.01, size=(2, 900))
    paths = [make_run(tmp_path / "a", list(3 + noise[0]))]
    paths.append(make_run(tmp_path / "b", list(2 + noise[1]), variant="kha_mlp", lr=2e-3))
    comparison = compare_runs(paths)
    write_report(comparison, tmp_path / "out")
    page, document = (tmp_path / "out" / "index.html").read_text(), (tmp_path / "out" / "report.md").read_text()
    (pair,) = comparison.pairs
    assert pair.interval is not None
    shown = f"{pair.interval.mean:+.4f}"
    assert f'<span class="number">{shown}</span>' in page and "<b>" not in page
    assert shown in document and f"**{shown}**" not in document
    for text in (page, document, (tmp_path / "out" / "figures" / "difference-steps.svg").read_text()):
        assert "unfair" in text or "not a fair pair" in text
    assert answers(comparison) == ("kha_mlp against gqa: no fair pair with finite losses, so nothing can be said.",)


def test_more_than_eight_runs_are_drawn_by_variant(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path / f"{variant}{seed}", [3.0 + 0.1 * seed] * 40, variant=variant, seed=seed)
        for variant in ("gqa", "mea", "mha")
        for seed in SEEDS
    ]
    write_report(compare_runs(paths), tmp_path / "out")
    with (tmp_path / "out" / "figures" / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["series"] for row in rows if row["kind"] == "line"} == {
        f"{variant}, mean of 3 runs" for variant in ("gqa", "mea", "mha")
    }
    last = [row for row in rows if row["kind"] == "band"][-1]
    assert [float(last[key]) for key in ("value", "low", "high")] == pytest.approx([3.1, 3.0, 3.2])
    page = Page((tmp_path / "out" / "index.html").read_text())
    assert page.tags.count("details") > 4, "tables of single runs and pairs are closed at first"
    assert page.tags.count("b") == 2, "the numbers over seeds alone are emphasised"


def test_diverged_and_repeated_runs_do_not_bend_the_curves_of_a_variant(tmp_path: Path) -> None:
    seeds = (0, 1, 2, 2)
    paths = []
    for variant, offset in (("gqa", 0.0), ("mea", 0.1), ("mha", 0.2)):
        for number, seed in enumerate(seeds):
            losses = [3.0 + offset + 0.01 * seed] * 200
            if (variant, number) == ("mea", 1) or variant == "mha":
                losses[100:] = [900.0] * 100
            paths.append(make_run(tmp_path / f"{variant}{number}", losses, variant=variant, seed=seed))
    write_report(compare_runs(paths), tmp_path / "out")
    rows = {
        name: list(csv.DictReader((tmp_path / "out" / "figures" / f"{name}.csv").open()))
        for name in ("loss", "difference-seeds")
    }
    mea = [row for row in rows["loss"] if row["series"] == "mea, mean of 3 runs, 1 diverged left out"]
    assert float(mea[-1]["value"]) == pytest.approx(3.1 + (0.0 + 0.02 + 0.02) / 3)
    assert "mean of 4 runs" in {
        row["series"].partition(", ")[2] for row in rows["loss"] if row["series"].startswith("mha")
    }
    assert {row["series"] for row in rows["difference-seeds"] if row["series"].startswith("mea, mean")} == {
        "mea, mean of 3 seeds"
    }
    ticks_shown = re.findall(
        r'text-anchor="end">([\d.k]+)<', (tmp_path / "out" / "figures" / "loss-steps.svg").read_text()
    )
    assert all(float(label) < 4 for label in ticks_shown if label), "the axis follows the runs that did not diverge"


def test_files_of_another_report_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_run(tmp_path / "a", [3.0] * 20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        run(["compare", str(one), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and (tmp_path / "out" / "report.md").read_text() == "mine"
    assert "report.md" in capsys.readouterr().err and not (tmp_path / "out" / "index.html").exists()
    (tmp_path / "out" / "report.md").unlink()
    (tmp_path / "out" / "figures").mkdir()
    for name in ("loss-steps.svg", "loss.csv"):
        mine = tmp_path / "out" / "figures" / name
        mine.write_text("mine")
        with pytest.raises(SystemExit) as ended:
            run(["compare", str(one), "--out", str(tmp_path / "out")])
        assert ended.value.code == 2 and mine.read_text() == "mine" and name in capsys.readouterr().err
        mine.unlink()
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            run(["compare", str(one), "--out", str(tmp_path / "out")])
        assert not ended.value.code, "its own files are replaced"
    figures = tmp_path / "out" / "figures"
    for name in ("loss-steps.svg", "loss.csv"):
        shutil.copy(figures / name, figures / f"gone-{name}")
    for name in ("notes.txt", "mine.svg", "mine.csv"):
        (figures / name).write_text("mine")
    with pytest.raises(SystemExit) as ended:
        run(["compare", str(one), "--out", str(tmp_path / "out"), "--overwrite"])
    left = {path.name for path in figures.iterdir()}
    assert not ended.value.code and {"loss.csv", "notes.txt", "mine.svg", "mine.csv"} <= left
    assert not {name for name in left if name.startswith("gone")}, "figures that the report no longer has"


def test_a_spike_does_not_stretch_the_axis_of_the_second_half(tmp_path: Path) -> None:
    losses = spiky("gqa", 0)
    context = Context(compare_runs([make_run(tmp_path / "a", losses)]))
    section = loss.section(context)
    marks = [one for one in section.figures()[1].series if one.kind == "spike" and len(one.y_N)]
    assert max(one.y_N.max() for one in marks) > 7.0
    shown = section.figures()[1].y_range
    smoothed = context.smoothed[0][STEPS // 2 :]
    assert shown is not None and shown[1] < smoothed.max() + 0.1 * np.ptp(smoothed)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 200.0, ["0", "50", "100", "150", "200"]),
        (-0.011, 0.012, ["-0.010", "-0.005", "0.000", "0.005", "0.010"]),
        (0.0, 240_000.0, ["0k", "50k", "100k", "150k", "200k"]),
        (2.19, 2.21, ["2.190", "2.195", "2.200", "2.205", "2.210"]),
        (0.0, 3.2e15, ["0P", "1P", "2P", "3P"]),
    ],
)
def test_ticks_are_round_and_their_labels_differ(low: float, high: float, expected: list[str]) -> None:
    labels = tick_labels(ticks(low, high))
    assert labels == expected and len(set(labels)) == len(labels)


def inspected(step: int, shift: float) -> Inspection:
    """A result of `kha analyze` with one matrix in each of two layers, apart from the identity by `shift`."""
    values = ((1.0 + shift, 0.0), (-shift, 1.0))
    matrix = LearnedMatrix("maps.v", "within", 1.0, 2**0.5 * shift, 1.0, 1.0, 0.0, 0.0, (1.0, 1.0), values)
    layers = tuple(LayerInspection(number, None, None, None, (), (matrix,), ()) for number in (0, 1))
    probe = ProbeRows("data.validation", "c0ffee", "d1", 1, 8, 1, 8)
    return Inspection(SCHEMA, step, "m", "0", "gqa", "knocking_linear", 4, 2, probe, 3.0, layers, {})


def test_learned_matrices_are_shown_less_the_identity_at_the_checkpoints_that_were_analysed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, [3.0] * 40, variant=name) for name in ("gqa", "kha_linear", "mea")]
    for step, shift in ((20, 0.25), (40, 0.5)):
        write_inspection(runs[1], inspected(step, shift))
    write_inspection(runs[2], inspected(40, 0.1)).write_text("{")
    page = write_report(compare_runs(runs), tmp_path / "out").read_text()
    with (tmp_path / "out" / "figures" / "matrices-1-0.csv").open() as file:
        cells = {(row["matrix"], row["row"], row["column"]): float(row["value"]) for row in csv.DictReader(file)}
    assert len(cells) == 2 * 2 * 4
    assert cells["layer 1, step 40", "0", "0"] == 0.5 and cells["layer 1, step 40", "1", "1"] == 0.0
    assert cells["layer 0, step 20", "1", "0"] == -0.25
    with (tmp_path / "out" / "figures" / "heads-matrix_distance.csv").open() as file:
        curve = {float(row["steps"]): float(row["value"]) for row in csv.DictReader(file)}
    assert curve == pytest.approx({20.0: 2**0.5 * 0.25, 40.0: 2**0.5 * 0.5}, rel=1e-8)
    assert "not done for gqa-s0, mea-s0." in page
    assert re.search(r"mea-s0: .*step-00000040\.json", page), "a damaged result is named and stops nothing"
    write_inspection(runs[0], inspected(40, math.nan))
    page = write_report(compare_runs(runs), tmp_path / "out").read_text()
    assert "full at 0." in page and "full at nan" not in page, "numbers that are not finite set no scale"


def test_figures_by_layer_are_the_means_of_the_last_quarter_of_the_sampled_steps(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a", [3.0] * 40)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"moe/maxvio_by_layer": [line["step"], 2.0], "moe/dead_fraction_by_layer": [0.0, 0.0]}
        line |= {"mine/odd_by_layer": "no list"}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(compare_runs([run_dir]), tmp_path / "out").read_text()
    with (tmp_path / "out" / "figures" / "moe-maxvio-layers.csv").open() as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == [35.5, 2.0]
    assert "moe/dead_fraction is 0 in every layer of every run" in page and "mine/odd" not in page


def test_runs_ahead_of_their_references_are_compared_as_far_as_both_go(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{variant}{seed}", [3.0] * steps, variant=variant, seed=seed)
        for variant, steps in (("gqa", 40), ("mea", 50))
        for seed in (0, 1)
    ]
    write_report(compare_runs(runs), tmp_path / "out")
    with (tmp_path / "out" / "figures" / "difference-seeds.csv").open() as file:
        assert max(float(row["steps"]) for row in csv.DictReader(file)) == 40


@pytest.mark.parametrize("seeds", [1, 5], ids=["by run", "by variant"])
def test_no_curve_has_more_points_than_can_be_seen(seeds: int, tmp_path: Path) -> None:
    """The page of a long run stays small."""
    losses = [3.0 + 0.01 * (step % 7) for step in range(4500)]
    runs = [
        make_run(tmp_path / f"{variant}{seed}", losses, variant=variant, seed=seed)
        for variant in ("gqa", "mea")
        for seed in range(seeds)
    ]
    figures = [figure for section in sections_of(Context(compare_runs(runs))) for figure in section.figures()]
    assert {"loss", "validation-0"} <= {figure.name for figure in figures}
    assert max(len(one.y_N) for figure in figures for one in figure.series) <= RAW_POINTS


def test_the_axis_of_a_difference_holds_zero_however_far_the_curves_lie(tmp_path: Path) -> None:
    higher = [3.0 + 0.01 * (step % 7) for step in range(900)]
    runs = [make_run(tmp_path / "a", higher), make_run(tmp_path / "b", [x - 0.5 for x in higher], variant="mea")]
    section = difference.section(Context(compare_runs(runs)))
    assert section is not None
    low, high = section.figures()[0].y_range or (0.0, 0.0)
    assert low < -0.4 and 0 < high
