"""A comparison reports the record, states the strength of the evidence, and proves which data were read."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kha_train.analysis.compare import compare_runs, data_proof, loss_difference, partners
from kha_train.analysis.figures import MAX_POINTS, thin
from kha_train.analysis.report.page import report_html
from kha_train.analysis.statistics import MIN_BLOCKS
from kha_train.cli.compare import compare
from kha_train.cli.main import run
from kha_train.errors import ConfigError
from kha_train.record import Record, columns_twin


def make_run(path: Path, losses: list[float], *, variant: str = "gqa", seed: int = 0, **changes: Any) -> Path:
    """A run directory as training leaves it, with the given train loss at every step."""
    record = Record.open(path)
    facts = {"data_content_id": changes.get("content", "c0ffee"), "parameters": {"total": 1000, "active": 300}}
    record.begin_attempt(0, facts=facts | ({"peak": changes["peak"]} if "peak" in changes else {}))
    config = {"run": {"dir": str(path), "name": f"{variant}-s{seed}", "seed": seed}, "attention": {"name": variant}}
    config |= {"model": {"seq_len": changes.get("seq_len", 8)}}
    config |= {"data": {"isolate_documents": True, **changes.get("data", {})}}
    config |= {"optim": {"lr": changes.get("lr", 1e-3)}, "engine": {"zero_stage": changes.get("zero_stage", 1)}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    shift = changes.get("shift_from", len(losses))
    for step, loss in enumerate(losses, 1):
        first = 4 * (step - 1) + (100 if step > shift else 0)
        line = {"step": step, "samples_first": first, "samples_last": first + 3, "tokens": 32 * step}
        line |= {"train/mfu": 0.1} if "peak" in changes else {}
        line |= {"train/loss": loss, "train/skipped": int(not math.isfinite(loss)), "train/step_seconds": step / 10}
        if changes.get("validate", True) and step % 10 == 0:
            line |= {"validation/loss": loss + 0.1, "validation/bits_per_byte": (loss + 0.1) / 2}
        record.step(line)
    record.close("done")
    return path


def falling(count: int, offset: float = 0.0) -> list[float]:
    return [4.0 * math.exp(-step / 30) + 2.0 + offset for step in range(count)]


def test_the_figures_of_a_run_are_those_of_their_definitions(tmp_path: Path) -> None:
    losses = falling(40)
    comparison = compare_runs([make_run(tmp_path / "a", losses)])
    results = comparison.summaries[0].results
    assert results["steps"] == 40
    assert results["tokens"] == 32 * 40
    assert results["final_loss"] == pytest.approx(sum(losses[-4:]) / 4)
    assert results["validation_loss"] == losses[-1] + 0.1
    assert results["bits_per_byte"] == (losses[-1] + 0.1) / 2
    assert results["step_seconds"] == pytest.approx(2.05)
    assert (results["parameters"], results["active_parameters"]) == (1000, 300)
    assert results["mfu"] is None


def test_one_seed_is_called_no_evidence_and_two_are_called_weak(tmp_path: Path) -> None:
    runs = {
        (variant, seed): make_run(tmp_path / f"{variant}{seed}", falling(20), variant=variant, seed=seed)
        for variant in ("gqa", "kha_mlp")
        for seed in (0, 1, 2)
    }

    def said(*keys: tuple[str, int]) -> str:
        return compare_runs([runs[key] for key in keys]).evidence

    assert said(("gqa", 0)) == "one run: nothing to compare"
    assert said(("gqa", 0), ("gqa", 1)) == "a variant without a fair pair: not evidence"
    assert said(("gqa", 0), ("kha_mlp", 0)) == "1 seed: not evidence"
    assert said(("gqa", 0), ("gqa", 1), ("kha_mlp", 0)) == "1 seed: not evidence"
    two = [(variant, seed) for variant in ("gqa", "kha_mlp") for seed in (0, 1)]
    assert said(*two) == "fewer than 3 seeds: weak evidence"
    assert said(*runs) == "3 seeds of every variant"
    runs["kha_mlp", 2] = make_run(tmp_path / "unfair", falling(20), variant="kha_mlp", seed=2, content="other")
    assert said(*runs) == "fewer than 3 seeds: weak evidence"
    assert said(("gqa", 2), ("kha_mlp", 2)) == "a variant without a fair pair: not evidence"


def test_every_run_is_paired_with_the_reference_run_of_its_seed(tmp_path: Path) -> None:
    order = [("gqa", 1), ("kha_mlp", 0), ("gqa", 0), ("kha_mlp", 1), ("kha_linear", 7)]
    paths = [make_run(tmp_path / f"{v}{s}", falling(20), variant=v, seed=s) for v, s in order]
    assert partners(compare_runs(paths).runs) == [(2, 1), (0, 3), (0, 4)]
    same_variant = compare_runs([paths[0], paths[2]])
    assert partners(same_variant.runs) == [(0, 1)]
    assert not same_variant.pairs[0].same_seed


def test_runs_of_one_attention_that_differ_otherwise_are_variants_of_their_own(tmp_path: Path) -> None:
    """But not runs that differ only in the seed, or in how a step is executed."""
    grid = [(variant, lr, seed) for variant, lr in (("gqa", 1e-3), ("gqa", 2e-3), ("mha", 1e-3)) for seed in (0, 1)]
    paths = [
        make_run(tmp_path / f"{variant}{lr}{seed}", falling(20), variant=variant, lr=lr, seed=seed, zero_stage=1 + seed)
        for variant, lr, seed in grid
    ]
    comparison = compare_runs(paths)
    slow, fast = "gqa optim.lr=0.001", "gqa optim.lr=0.002"
    assert [run.variant for run in comparison.runs] == [slow, slow, fast, fast, "mha", "mha"]
    assert [(pair.reference, pair.other) for pair in comparison.pairs] == [(0, 2), (1, 3), (0, 4), (1, 5)]
    assert comparison.evidence == "a variant without a fair pair: not evidence"


def test_a_pair_that_differs_in_more_than_its_variant_is_called_unfair(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", falling(600))
    fair = make_run(tmp_path / "fair", falling(600), variant="kha_mlp", zero_stage=2)
    hotter = make_run(tmp_path / "hotter", falling(600), variant="kha_mlp", lr=2e-3)
    reseeded = make_run(tmp_path / "reseeded", falling(600), variant="kha_mlp", seed=1)
    comparison = compare_runs([base, fair, hotter, reseeded])
    assert [pair.confounders for pair in comparison.pairs] == [(), ("optim.lr (0.001 and 0.002)",), ()]
    caveats = [pair.caveats for pair in comparison.pairs]
    assert [len(found) for found in caveats] == [0, 1, 1] and "different seeds" in caveats[2][0]
    assert ["NOT A FAIR PAIR" in comparison.sentence(pair) for pair in comparison.pairs] == [False, True, True]
    page = report_html(comparison)
    assert page.count("not a fair pair: ") == 2 and page.count("<b>") == 1


def test_seeds_together_have_a_student_interval_from_fair_pairs_alone(tmp_path: Path) -> None:
    offsets = (-0.2, -0.1, 0.3)
    runs = [make_run(tmp_path / f"a{seed}", falling(40), seed=seed) for seed in range(4)]
    for seed, offset in enumerate(offsets):
        runs.append(make_run(tmp_path / f"b{seed}", falling(40, offset), variant="kha_mlp", seed=seed))
    runs.append(make_run(tmp_path / "b3", falling(40, 9.0), variant="kha_mlp", seed=3, lr=2e-3))
    (found,) = compare_runs(runs).across_seeds
    assert found.differences == pytest.approx(offsets) and found.interval is not None
    # The t with 2 degrees of freedom has the closed form F^-1(p) = (2p - 1) sqrt(2 / (4 p (1 - p))).
    t = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))
    half = t * np.std(offsets, ddof=1) / math.sqrt(3)
    assert (found.interval.low, found.interval.high) == pytest.approx((-half, half), rel=1e-3)


def test_the_losses_before_any_update_are_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", falling(20)), make_run(tmp_path / "b", falling(20, 0.5), variant="kha_mlp")]
    comparison = compare_runs(runs)
    assert comparison.pairs[0].first_gap == pytest.approx(0.5)
    assert "in step 1, their losses differ by +0.5" in report_html(comparison)


def test_spikes_and_what_was_done_about_them_are_in_the_honesty_table(tmp_path: Path) -> None:
    losses = [3.0 + 0.01 * (step % 3) for step in range(200)]
    losses[150] = 9.0
    run = make_run(tmp_path / "a", losses)
    record = Record.open(run)
    record.event("rewind", 150, to_step=100, window=[0, 4], reason="a spike")
    record.close()
    honesty = compare_runs([run]).summaries[0].honesty
    assert (honesty["spikes"], honesty["unrecovered"], honesty["rewinds"], honesty["zclip"]) == (1, 0, 1, 0)


def test_a_run_that_diverged_says_so_beside_its_spikes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calm = make_run(tmp_path / "a", [3.0] * 120)
    lost = make_run(tmp_path / "b", [3.0] * 100 + [13.0, 103.0] + [390.0] * 18, variant="kha_mlp")
    ended = make_run(tmp_path / "c", [3.0] * 120, seed=1)
    record = Record.open(ended)
    record.begin_attempt(120)
    record.close("diverged")
    compare([calm, lost, ended], out=tmp_path / "report", as_json=True)
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["spikes"], run["diverged"], run["open"], run["unrecovered"]) for run in runs] == [
        (0, False, 0, 0),
        (0, True, 1, 0),
        (0, True, 0, 0),
    ]
    compare([calm, lost, ended], out=tmp_path / "report")
    assert re.search(r"diverged +no +yes +yes", capsys.readouterr().out)
    assert "<td>no</td><td>yes</td><td>yes</td>" in (tmp_path / "report" / "index.html").read_text()


def test_a_name_that_looks_like_a_label_with_its_path_collides_with_none(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name, falling(20)) for name in "abc"]
    config = yaml.safe_load((paths[2] / "config.yaml").read_text())
    config["run"]["name"] = f"gqa-s0 ({paths[0]})"
    (paths[2] / "config.yaml").write_text(yaml.safe_dump(config))
    labels = [run.label for run in compare_runs(paths).runs]
    assert labels == [f"gqa-s0 ({paths[0]}) 2", f"gqa-s0 ({paths[1]})", f"gqa-s0 ({paths[0]})"]


def test_the_paired_difference_is_that_of_the_last_half_of_the_common_steps(tmp_path: Path) -> None:
    reference = make_run(tmp_path / "a", falling(700))
    other = make_run(tmp_path / "b", falling(600, offset=-0.25), variant="kha_mlp")
    pair = compare_runs([reference, other]).pairs[0]
    assert (pair.first_step, pair.last_step) == (301, 600)
    assert pair.interval is not None
    assert pair.interval.count == 300
    assert pair.interval.mean == pytest.approx(-0.25)
    assert pair.interval.low == pytest.approx(-0.25)
    assert pair.interval.high == pytest.approx(-0.25)


def test_nan_losses_are_counted_and_kept_out_of_every_mean(tmp_path: Path) -> None:
    losses = falling(40)
    broken = [*losses[:35], math.nan, math.inf, *losses[37:]]
    paths = [make_run(tmp_path / "a", losses), make_run(tmp_path / "b", broken, variant="kha_mlp")]
    comparison = compare_runs(paths)
    assert comparison.summaries[1].honesty["nonfinite"] == 2
    assert comparison.summaries[1].honesty["skipped"] == 2
    assert comparison.summaries[1].results["final_loss"] == pytest.approx(sum(losses[37:]) / 3)
    steps, difference = loss_difference(*comparison.runs)
    assert list(steps[np.isnan(difference)]) == [36, 37]
    (pair,) = comparison.pairs
    assert pair.difference is not None and pair.difference.count == 18
    assert pair.difference.mean == pytest.approx(0.0)
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_a_run_that_never_was_finite_is_reported_without_an_end(tmp_path: Path) -> None:
    nothing = make_run(tmp_path / "b", [math.nan] * 30, variant="kha_mlp", validate=False)
    comparison = compare_runs([make_run(tmp_path / "a", falling(30)), nothing])
    assert comparison.summaries[1].results["final_loss"] is None
    assert comparison.pairs[0].difference is None and comparison.pairs[0].interval is None
    assert "has a finite loss in both" in comparison.sentence(comparison.pairs[0])
    assert "<svg" in report_html(comparison)


@pytest.mark.parametrize(
    ("changes", "same", "words"),
    [
        ({}, True, "each of the 30 common steps up to step 30"),
        ({"seed": 1}, False, "run.seed is 0 and 1"),
        ({"content": "decade"}, False, "different data: content ids c0ffee and decade"),
        ({"content": None}, False, "not proven"),
        ({"seq_len": 16}, False, "model.seq_len is 8 and 16"),
        ({"shift_from": 12}, False, "different samples from step 13 on"),
        ({"data": {"isolate_documents": False}}, False, "data.isolate_documents is True and False"),
        ({"data": {"packing": "best_fit"}}, False, "data.packing is concat and best_fit"),
        ({"data": {"shuffle": "block"}}, False, "data.shuffle is global and block"),
        ({"data": {"sources": [{"name": "a", "path": "x", "weight": 1.0}]}}, False, "data.sources is"),
        ({"data": {"phases": [{"start_sample": 8, "weights": [1.0, 2.0]}]}}, False, "data.phases is"),
    ],
)
def test_the_same_data_are_claimed_only_when_proven(tmp_path: Path, changes: dict, same: bool, words: str) -> None:
    reference = make_run(tmp_path / "a", falling(40))
    other = make_run(tmp_path / "b", falling(30), variant="kha_mlp", **changes)
    found, text = data_proof(*compare_runs([reference, other]).runs)
    assert found is same
    assert words in text


def test_a_source_that_lies_elsewhere_is_the_same_source(tmp_path: Path) -> None:
    sources = [{"sources": [{"name": "a", "path": place, "weight": 1.0}]} for place in ("here", "there")]
    paths = [make_run(tmp_path / "a", falling(40), data=sources[0])]
    paths += [make_run(tmp_path / "b", falling(40), variant="kha_mlp", data=sources[1])]
    (pair,) = compare_runs(paths).pairs
    assert pair.same_data and pair.caveats == ()


def test_what_a_resume_may_change_is_no_confounder_but_another_start_is(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "a", falling(40)), make_run(tmp_path / "b", falling(40), variant="kha_mlp")]
    settings = yaml.safe_load((paths[1] / "config.yaml").read_text())
    settings["data"] |= {"cache_dir": "/elsewhere", "cache_gib": 7.0}
    settings |= {"profile": {"first_step": 3}, "run": settings["run"] | {"init_from": "runs/other/checkpoints/9"}}
    (paths[1] / "config.yaml").write_text(yaml.safe_dump(settings))
    assert compare_runs(paths).pairs[0].confounders == ("run.init_from ( and runs/other/checkpoints/9)",)


def test_only_settings_that_differ_are_listed(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "a", falling(9)), make_run(tmp_path / "b", falling(9), variant="mha", seq_len=16)]
    assert compare_runs(paths).differences == {"attention.name": ("gqa", "mha"), "model.seq_len": (8, 16)}


def test_restarts_and_discarded_lines_are_in_the_honesty_table(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", falling(20))
    record = Record.open(path)
    record.begin_attempt(15)
    record.step({"step": 16, "train/loss": 1.0})
    record._lock.close()
    summary = compare_runs([path]).summaries[0]
    assert summary.honesty["attempts"] == 2
    assert summary.honesty["lost"] == 1
    assert summary.honesty["discarded"] == 5
    assert summary.end_state == "running"


def test_what_is_no_run_is_refused_with_the_runs_nearby(tmp_path: Path) -> None:
    make_run(tmp_path / "good", falling(5))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no such run directory.*good"):
        compare_runs([tmp_path / "missing"])
    with pytest.raises(ConfigError, match="no step was recorded here"):
        compare_runs([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="named twice"):
        compare_runs([tmp_path / "good", tmp_path / "x" / ".." / "good"])
    with pytest.raises(ConfigError, match="no run directory"):
        compare_runs([])
    (tmp_path / "good" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        compare_runs([tmp_path / "good"])


def test_runs_of_one_name_are_told_apart_by_their_directory(tmp_path: Path) -> None:
    comparison = compare_runs([make_run(tmp_path / name, falling(5)) for name in ("a", "b")])
    assert len({run.label for run in comparison.runs}) == 2


@given(st.integers(1, 6000), st.integers(0, 100))
def test_thinning_a_curve_keeps_its_extremes_and_its_order(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=count)
    values[:: max(2, seed)] = np.nan
    x, y = thin(np.arange(count), values)
    assert len(x) <= MAX_POINTS
    assert (np.diff(x) > 0).all()
    if np.isfinite(values).any():
        assert (np.nanmax(y), np.nanmin(y)) == (np.nanmax(values), np.nanmin(values))


class Page(HTMLParser):
    """Collects what a page would fetch, its ids and its open tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []
        self.fetched += [str(values[name]) for name in ("src", "data", "action") if values.get(name)]
        self.links += [str(values["href"])] if values.get("href") else []


def test_the_report_is_one_file_that_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "a", falling(40)), make_run(tmp_path / "b", falling(40, -0.1), variant="kha_mlp")]
    text = report_html(compare_runs(paths))
    page = Page(text)
    assert page.fetched == []
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert "script" not in page.tags
    assert page.tags.count("figure") == 4
    assert not re.search(r"url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "1 seed: not evidence" in text
    assert not re.search(r"#0a0[0-9a-f]{3}", text)


def test_the_same_runs_give_the_same_report_byte_for_byte(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "a", falling(40)), make_run(tmp_path / "b", falling(40, -0.1), variant="kha_mlp")]
    assert report_html(compare_runs(paths)) == report_html(compare_runs(paths))


def test_names_from_a_configuration_cannot_become_markup(tmp_path: Path) -> None:
    evil = make_run(tmp_path / "a", falling(20), variant="<img src=x onerror=alert(1)>")
    page = Page(report_html(compare_runs([evil])))
    assert "img" not in page.tags
    assert page.fetched == []


def test_a_single_run_without_validation_has_a_report_too(tmp_path: Path) -> None:
    text = report_html(compare_runs([make_run(tmp_path / "a", [3.0], validate=False)]))
    assert "nothing to compare" in text
    assert Page(text).tags.count("figure") == 1


def test_the_command_prints_the_table_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = [make_run(tmp_path / "a", falling(600)), make_run(tmp_path / "b", falling(600, -0.1), variant="kha_mlp")]
    compare(paths, tmp_path / "out", as_json=False)
    text = " ".join(capsys.readouterr().out.split())
    assert "kha_mlp-s0 - gqa-s0: -0.1000 [-0.1000, -0.1000] nats per token over steps 301-600" in text
    assert "1 seed: not evidence" in text
    assert (tmp_path / "out" / "index.html").exists()
    compare(paths, tmp_path / "out", as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["pairs"][0]["interval"]["mean"] == pytest.approx(-0.1)
    assert answer["pairs"][0]["difference"]["interval"] == answer["pairs"][0]["interval"]
    assert [run["label"] for run in answer["runs"]] == ["gqa-s0", "kha_mlp-s0"]


@pytest.mark.parametrize(("steps", "blocks"), [(2, "1 block"), (200, "3 blocks")])
def test_a_short_pair_has_a_mean_and_no_interval_and_nothing_is_claimed_of_it(
    steps: int, blocks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        make_run(tmp_path / "a", falling(steps)),
        make_run(tmp_path / "b", falling(steps, -1.0), variant="kha_mlp"),
    ]
    compare(paths, tmp_path / "out", as_json=True)
    (pair,) = json.loads(capsys.readouterr().out)["pairs"]
    words = f"no interval: {blocks}, {MIN_BLOCKS} needed"
    assert pair["interval"] is None and pair["no_interval"] == words
    assert pair["difference"]["mean"] == pytest.approx(-1.0)
    compare(paths, tmp_path / "out")
    shown = " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "out" / "index.html").read_text()
    for text in (shown, pair["sentence"], page):
        assert "no claim" in text and words in text and "-1.0000" in text
        assert "95 % interval" not in text and "kha_mlp-s0 has the lower loss" not in text


def test_a_pair_whose_difference_wanders_has_no_interval_however_many_its_steps(tmp_path: Path) -> None:
    wandering = np.cumsum(np.random.default_rng(0).normal(scale=0.01, size=800))
    base = falling(800)
    paths = [make_run(tmp_path / "a", base), make_run(tmp_path / "b", list(base + wandering), variant="kha_mlp")]
    comparison = compare_runs(paths)
    (pair,) = comparison.pairs
    assert pair.interval is None and pair.difference is not None and pair.difference.block > 20
    assert "no claim" in comparison.sentence(pair) and f"{MIN_BLOCKS} needed" in report_html(comparison)


def test_pairs_without_an_interval_count_for_the_interval_over_seeds(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{name}{seed}", falling(8, offset * seed), variant=name, seed=seed)
        for name, offset in (("gqa", 0.0), ("kha_mlp", 0.1))
        for seed in (1, 2, 3)
    ]
    comparison = compare_runs(runs)
    (found,) = comparison.across_seeds
    assert found.differences == pytest.approx((0.1, 0.2, 0.3)) and found.interval is not None
    assert all(pair.interval is None for pair in comparison.pairs)
    assert comparison.seeds_sentence(found).endswith(f"(Student); {found.sign_test.words}")
    assert (found.sign_test.above, found.sign_test.p) == (3, 0.25)
    alone = compare_runs([runs[0], runs[3]])
    assert alone.seeds_sentence(alone.across_seeds[0]).endswith("over 1 seed: no interval: 1 seed, 2 needed")


def test_a_run_too_short_for_the_detector_has_no_number_of_spikes(tmp_path: Path) -> None:
    short, long = (make_run(tmp_path / str(steps), falling(steps)) for steps in (20, 200))
    comparison = compare_runs([short, long])
    assert [summary.honesty["spikes"] for summary in comparison.summaries] == [None, 0]


def test_shares_of_different_peaks_are_not_compared(tmp_path: Path) -> None:
    names = {"a": "2 TFLOP/s a rank (measured)", "b": "3 TFLOP/s a rank (measured)", "c": "2 TFLOP/s a rank (measured)"}
    a, b, c = (make_run(tmp_path / name, falling(20), peak=peak) for name, peak in names.items())
    same, other = compare_runs([a, c]), compare_runs([a, b])
    assert [summary.results["mfu"] for summary in same.summaries] == [0.1, 0.1] and not same.notes()
    assert [run["mfu"] for run in other.to_dict()["runs"]] == [None, None]
    assert "MFU is not shown" in other.notes()[-1] and "3 TFLOP/s" in report_html(other)


def test_a_page_is_replaced_by_one_of_the_same_runs_and_by_no_other_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        make_run(tmp_path / name, falling(20), variant="gqa" if name == "a" else "mha")
    page = tmp_path / "report" / "index.html"

    def compare(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            run(["compare", *arguments])
        return int(ended.value.code or 0)

    assert compare("a", "b") == 0
    first = page.read_text()
    assert compare("b", str(tmp_path / "a")) == 0 and page.read_text() != first
    kept = page.read_text()
    assert compare("a", "c") == compare("a", "b", "c") == 2 and page.read_text() == kept
    assert "--out" in (said := capsys.readouterr().err) and "--overwrite" in said
    assert compare("a", "c", "--out", "other") == 0 and compare("a", "c", "--force") == 0
    page.write_text("<p>mine</p>")
    assert compare("a", "c") == 2 and page.read_text() == "<p>mine</p>"
    page.write_text(quoted := f"# The page begins\n{first}")
    assert compare("a", "b") == 2 and page.read_text() == quoted


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_file_is_never_written_over(tmp_path: Path, make: Callable[[Path], None]) -> None:
    run_dir = make_run(tmp_path / "a", falling(20))
    (tmp_path / "report").mkdir()
    make(tmp_path / "report" / "index.html")
    for further in ([], ["--overwrite"]):
        with pytest.raises(SystemExit) as ended:
            run(["compare", str(run_dir), "--out", str(tmp_path / "report"), *further])
        assert ended.value.code == 2


def test_a_comparison_made_again_parses_no_line_and_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [make_run(tmp_path / name, falling(400, offset), variant=name) for name, offset in (("a", 0), ("b", 0.1))]
    plain = report_html(compare_runs(paths))
    monkeypatch.setattr(columns_twin, "WORTH", 0)
    assert report_html(compare_runs(paths)) == plain
    parsed: list[bytes] = []
    monkeypatch.setattr(columns_twin, "objects", lambda path, content, number: parsed.append(content))
    assert report_html(compare_runs(paths)) == plain and not parsed


def test_the_page_of_long_runs_is_short(tmp_path: Path) -> None:
    losses = (2 + 0.1 * np.random.default_rng(0).normal(size=8000)).tolist()
    text = report_html(compare_runs([make_run(tmp_path / name, losses, variant=name) for name in "ab"]))
    # 2,500,000 characters when every point is drawn.
    assert len(text) < 600_000


def test_a_damaged_run_is_passed_over_where_two_are_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, damaged, two = (make_run(tmp_path / name, falling(40)) for name in ("a", "damaged", "b"))
    (damaged / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')

    def answer(*words: str | Path) -> tuple[int | None, str, str]:
        with pytest.raises(SystemExit) as ended:
            run(["compare", *map(str, words), "--out", str(tmp_path / "report")])
        code = ended.value.code
        return (code if isinstance(code, int) else None, *capsys.readouterr())

    code, out, err = answer(one, damaged, two, "--json")
    found = json.loads(out)
    assert code == 4 and [each["path"] for each in found["runs"]] == [str(one), str(two)]
    (told,) = found["passed_over"]
    assert told.startswith(f"{damaged}: ") and "metrics.jsonl:2" in told
    assert f"note: skipped: {told}" in err and "data error: " in err
    assert f"Skipped: {damaged}: " in (tmp_path / "report" / "index.html").read_text()
    code, out, err = answer(one, damaged, two)
    assert code == 4 and "report: " in out and "skipped" in err
    code, out, err = answer(one, damaged, "--overwrite")
    assert code == 4 and not out and "metrics.jsonl:2" in err and "skipped" not in err


def test_a_place_that_cannot_be_written_is_answered_with_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, *args: Any, **named: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    one = make_run(tmp_path / "a", falling(10))
    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(SystemExit) as ended:
        run(["compare", str(one), "--out", str(tmp_path / "report")])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "Read-only file system" in err and "--out DIRECTORY" in err
