"""Studies as data, and results computed by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from kha_train.analysis.studies import ScaledStudy, Trial, load_study, study_names
from kha_train.analysis.study_outcomes import Outcome
from kha_train.analysis.study_page import printed, study_page
from kha_train.analysis.study_results import StudyResult, choose_rates, judge
from kha_train.cli.output import strict
from kha_train.config.compose import shipped
from kha_train.errors import ConfigError

TEXT = """
question: Which is lower?
source: a test
reference: base
arms:
  - {name: base, overrides: [attention=gqa]}
  - {name: mlp, overrides: [attention=kha_mlp]}
measures: [{kind: train_loss}, {kind: spikes}]
published: [{what: a table, arm: mlp, value: 1.5}]
cpu: {steps: 2, rates: [0.1, 0.2, 0.4], seeds: [0, 1, 2], rate_seeds: [7]}
paper: {steps: 9, rates: [0.1, 0.2], seeds: [0, 1, 2]}
"""


@pytest.fixture
def scaled(tmp_path: Path) -> ScaledStudy:
    return written(tmp_path, TEXT)


def written(folder: Path, text: str, scale: str = "cpu") -> ScaledStudy:
    (folder / "mine.yaml").write_text(text)
    return load_study(str(folder / "mine.yaml"), scale)


def outcome(loss: float | None, spikes: float = 0.0, diverged: bool = False) -> Outcome:
    values = {"train_loss": math.inf, "spikes": math.inf} if diverged else {"train_loss": loss, "spikes": spikes}
    return Outcome("run", values, diverged, 1.0, "abc", "data")


def by_rate(losses: dict[str, list[float]]) -> dict[Trial, Outcome]:
    """The runs that choose rates, from the loss at every rate."""
    rates = (0.1, 0.2, 0.4)
    return {
        Trial(arm, rate, 7, "rate"): outcome(loss, diverged=math.isinf(loss))
        for arm, values in losses.items()
        for rate, loss in zip(rates, values, strict=True)
    }


def compared(arm: str, rate: float, losses: list[float]) -> dict[Trial, Outcome]:
    return {Trial(arm, rate, seed): outcome(loss, diverged=math.isinf(loss)) for seed, loss in enumerate(losses)}


def judged(scaled: ScaledStudy, base: list[float], mlp: list[float]) -> StudyResult:
    chosen = by_rate({"base": [3.0, 2.0, 4.0], "mlp": [3.0, 2.5, 2.4]})
    return judge(scaled, chosen | compared("base", 0.2, base) | compared("mlp", 0.4, mlp))


def test_every_shipped_study_is_read_at_each_of_its_scales_and_its_published_arms_exist_on_paper() -> None:
    assert {"copy", "position", "kv_heads", "bases", "ladder"} <= set(study_names())
    for name in study_names():
        scales = load_study(name, "cpu").study.scales
        for scale in scales:
            found = load_study(name, scale)
            assert found.arms and found.study.question.endswith("?") and found.sha256
            assert any(arm.reference for arm in found.arms.values()), name
            assert found.computes or ("engine.device=cpu" in found.scale.overrides) == (scale == "cpu"), name
        named = {arm for one in found.study.published for arm in (one.arm, one.better_than) if arm}
        named |= {arm.stands_for for arm in found.study.arms if arm.stands_for}
        assert named <= (load_study(name, "paper").arms.keys() if "paper" in scales else set()), name
        assert found.study.yardstick in ("", *study_names())


def test_three_studies_fit_into_minutes_of_one_gpu() -> None:
    assert {name for name in study_names() if "h200_15min" in load_study(name, "cpu").study.scales} == {
        "overhead",
        "position",
        "stability",
    }


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ("reference: base", "reference: bass", "no arm 'bass'"),
        ("name: mlp", "name: base", "one name"),
        ("name: mlp", "name: a/b", "not a name"),
        ("rate_seeds: [7]", "rate_seeds: [2]", "each seed"),
        ("rates: [0.1, 0.2, 0.4]", "rates: []", "rate"),
        ("rate_seeds: [7]", "rate_seeds: [7], arm_rates: [{arm: mlp, rates: []}]", "at least one rate"),
        ("kind: spikes", "kind: loss_law", "needs `tokens`"),
        ("seeds: [0, 1, 2], rate", "seeds: [], rate", "seed"),
        ("steps: 2,", "steps: 2, stepps: 3,", "stepps"),
        ("kind: spikes", "kind: entry", "entry"),
        ("reference: base\n", "reference: base\ngains: [{arm: mlp, other: base}]\n", "'base' of `gains`"),
        ("reference: base\n", "reference: base\ngains: [{arm: mlpp, other: mlp}]\n", "'mlpp' of `gains`"),
        ("kind: spikes", "kind: heads, entry: size", "cosine"),
        ("reference: base", "rate_measure: steps", "no measure 'steps'"),
        ("question: Which", "questoin: Which", "questoin"),
        ("value: 1.5}", "value: 1.5, better_than: base}", "published"),
        ("arm: mlp, value: 1.5}", "arm: mlp}", "published"),
        ("reference: base", "trials: kernel_pca", "kernel_pca has no train_loss"),
        ("name: mlp,", "name: mlp, compresses: {arm: bass, layers: all, kv_heads: 1},", "begins with 'bass'"),
        ("name: mlp,", "name: mlp, compresses: {arm: base, layers: all, kv_heads: 1},", "at one rate"),
    ],
)
def test_a_study_that_is_wrong_is_refused_with_the_reason(tmp_path: Path, before: str, after: str, word: str) -> None:
    assert before in TEXT
    with pytest.raises(ConfigError, match=word):
        written(tmp_path, TEXT.replace(before, after, 1))


def test_an_arm_may_have_rates_of_its_own(tmp_path: Path) -> None:
    scaled = written(
        tmp_path, TEXT.replace("rate_seeds: [7]", "rate_seeds: [7], arm_rates: [{arm: mlp, rates: [2, 1]}]")
    )
    assert {(trial.arm, trial.rate) for trial in scaled.rate_trials()} == {
        ("base", 0.1), ("base", 0.2), ("base", 0.4), ("mlp", 1.0), ("mlp", 2.0),
    }  # fmt: skip


def test_an_unknown_study_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="copy"):
        load_study("copi", "cpu")
    with pytest.raises(ConfigError, match="cpu, paper"):
        load_study("copy", "gpu")


def test_the_best_rate_has_the_fewest_failures_then_the_best_mean(scaled: ScaledStudy) -> None:
    chosen = choose_rates(scaled, by_rate({"base": [3.0, 2.0, 4.0], "mlp": [3.0, 2.9, math.inf]}))
    assert chosen is not None
    assert (chosen["base"].rate, chosen["base"].at_edge) == (0.2, False)
    assert (chosen["mlp"].rate, chosen["mlp"].at_edge) == (0.2, False)
    edge = choose_rates(scaled, by_rate({"base": [3.0, 2.0, 4.0], "mlp": [3.0, 2.5, 2.4]}))
    assert edge is not None and (edge["mlp"].rate, edge["mlp"].at_edge) == (0.4, True)
    assert choose_rates(scaled, by_rate({"base": [3.0, 2.0, 4.0]})) is None, "not while a run is missing"


def test_the_rate_is_chosen_on_other_runs_and_only_the_compared_ones_at_it_are_needed(scaled: ScaledStudy) -> None:
    nothing = judge(scaled, {})
    assert set(nothing.missing) == set(scaled.rate_trials()) and "no statement" in nothing.sentence
    half = judge(scaled, by_rate({"base": [3.0, 2.0, 4.0], "mlp": [3.0, 2.5, 2.4]}))
    assert set(half.missing) == {
        *(Trial("base", 0.2, seed) for seed in range(3)),
        *(Trial("mlp", 0.4, seed) for seed in range(3)),
    }
    assert "seeds 7, which no comparison uses" in half.how_chosen


def test_another_measure_than_that_of_the_sentence_may_choose_the_rates(tmp_path: Path) -> None:
    text = TEXT.replace("[{kind: train_loss}, {kind: spikes}]", "[{kind: spikes}, {kind: train_loss}]")
    tried = by_rate({"base": [3.0, 2.0, 4.0], "mlp": [3.0, 2.5, 2.4]})
    by_spikes = choose_rates(written(tmp_path, text), tried)
    assert by_spikes is not None and by_spikes["base"].rate == 0.1, "of equal means the lowest"
    scaled = written(tmp_path, f"{text}rate_measure: train_loss\n")
    by_loss = choose_rates(scaled, tried)
    assert by_loss is not None and by_loss["base"].rate == 0.2
    result = judge(scaled, tried | compared("base", 0.2, [2.0] * 3) | compared("mlp", 0.4, [1.0] * 3))
    assert result.arms["mlp"].by_rate[0.4] == {7: 2.4} and "spikes" in result.sentence


def test_differences_are_paired_by_seed_with_the_interval_of_student(scaled: ScaledStudy) -> None:
    """Differences -0.3, -0.1, -0.2: mean -0.2, deviation 0.1, half 4.303 x 0.1 / sqrt(3) = 0.24843."""
    result = judged(scaled, [2.0, 2.1, 2.2], [1.7, 2.0, 2.0])
    (loss, _) = result.compared
    assert loss.interval is not None and not loss.differs
    assert [loss.interval.mean, loss.interval.low, loss.interval.high] == pytest.approx(
        [-0.2, -0.44843, 0.04843], abs=1e-4
    )
    assert (loss.better, loss.worse, loss.sign_test) == (3, 0, 0.25)
    assert "3 seeds" in result.sentence and "no difference in train_loss is shown for mlp - base" in result.sentence
    clear = judged(scaled, [2.0, 2.1, 2.2], [1.8, 1.9, 2.001])
    assert clear.compared[0].differs and "mlp - base, train_loss: -0.19" in clear.sentence
    assert "nothing about the order" in clear.sentence


def test_a_run_that_diverged_is_the_worst_of_every_measure(scaled: ScaledStudy) -> None:
    result = judged(scaled, [2.0, 2.1, 2.2], [1.0, 1.0, math.inf])
    loss, spikes = result.compared
    assert loss.interval is None and (loss.better, loss.worse) == (2, 1)
    assert (spikes.better, spikes.worse) == (0, 1), "no spike was counted in it, and it does not win by that"
    assert "1 of 3 runs diverged" in "; ".join(result.caveats()) and "not all are finite" in result.sentence
    answer = json.loads(json.dumps(strict(result.to_dict())))
    assert answer["arms"]["mlp"]["diverged"] == 1 and answer["arms"]["mlp"]["values"]["spikes"]["2"] == "inf"


def test_one_seed_is_no_evidence_and_two_are_weak(tmp_path: Path) -> None:
    for seeds, words in (("[0]", "1 seed: not evidence."), ("[0, 1]", "2 seeds: weak evidence")):
        scaled = written(tmp_path, TEXT.replace("[0, 1, 2], rate", f"{seeds}, rate"))
        count = seeds.count(",") + 1
        result = judged(scaled, [2.0, 2.1][:count], [1.0, 1.1][:count])
        assert result.sentence.startswith(words) and (count == 2 or result.sentence == words)


def test_rates_chosen_on_the_compared_runs_are_said_to_be(tmp_path: Path) -> None:
    scaled = written(tmp_path, TEXT, "paper")
    losses = {("base", 0.1): 2.0, ("base", 0.2): 3.0, ("mlp", 0.1): 2.5, ("mlp", 0.2): 1.0}
    result = judge(scaled, {t: outcome(losses[t.arm, t.rate] + 0.01 * t.seed) for t in scaled.compared_trials()})
    assert not result.missing and "flatters" in result.how_chosen
    assert {name: arm.chosen.rate for name, arm in result.arms.items() if arm.chosen} == {"base": 0.1, "mlp": 0.2}
    assert result.arms["mlp"].mean("train_loss") == pytest.approx(1.01)
    assert "nothing about the order" not in result.sentence
    one = written(tmp_path, TEXT.replace("rates: [0.1, 0.2], seeds", "rates: [0.1], seeds"), "paper")
    assert "one learning rate" in judge(one, {}).how_chosen


def test_a_printed_figure_stands_beside_every_arm_that_stands_for_its_arm(tmp_path: Path) -> None:
    text = TEXT.replace("name: mlp,", "name: mlp, stands_for: mlp_6b,").replace("arm: mlp, value", "arm: mlp_6b, value")
    result = judged(written(tmp_path, text), [2.0, 2.1, 2.2], [1.8, 1.9, 2.0])
    assert [result.ours(one) for one in result.scaled.study.published] == ["mlp: train_loss 1.9 [1.652, 2.148]"]


def test_only_a_study_of_printed_figures_says_that_its_scale_is_small(tmp_path: Path) -> None:
    text = "".join(
        line for line in TEXT.splitlines(keepends=True) if "value: 1.5" not in line and "published" not in line
    )
    result = judged(written(tmp_path, text), [2.0, 2.1, 2.2], [1.8, 1.9, 2.001])
    assert "small scale" not in result.sentence


def test_two_differences_are_compared_with_each_other_seed_by_seed(tmp_path: Path) -> None:
    """(mlp - base) is -0.2, -0.1, -0.3 and (gate - base) 0.1, 0.1, 0.1: between them -0.3, -0.2, -0.4, so mean -0.3,
    deviation 0.1, half 4.303 x 0.1 / sqrt(3) = 0.24843. Neither difference of mlp nor that of gate decides it."""
    arm = "  - {name: mlp, overrides: [attention=kha_mlp]}\n"
    text = TEXT.replace(arm, f"{arm}{arm.replace('mlp', 'gate')}gains: [{{arm: mlp, other: gate}}]\n", 1)
    scaled = written(tmp_path, text)
    chosen = by_rate({name: [3.0, 2.0, 4.0] for name in ("base", "mlp", "gate")})
    losses = {"base": [2.0, 2.1, 2.2], "mlp": [1.8, 2.0, 1.9], "gate": [2.1, 2.2, 2.3]}
    result = judge(
        scaled, chosen | {k: v for name, values in losses.items() for k, v in compared(name, 0.2, values).items()}
    )
    (loss, spikes) = result.gains
    assert loss.interval is not None and loss.differs
    assert [loss.interval.mean, loss.interval.low, loss.interval.high] == pytest.approx(
        [-0.3, -0.54843, -0.05157], abs=1e-4
    )
    assert (loss.better, loss.worse, spikes.interval) == (3, 0, None)
    assert "(mlp - base) - (gate - base), train_loss: -0.3 [-0.5484, -0.05157] over 3 seeds" in result.sentence
    assert result.to_dict()["gains"][0]["differences"] == pytest.approx({0: -0.3, 1: -0.2, 2: -0.4})


def test_two_runs_that_diverged_make_no_difference_of_zero_among_gains(tmp_path: Path) -> None:
    arm = "  - {name: mlp, overrides: [attention=kha_mlp]}\n"
    scaled = written(
        tmp_path, TEXT.replace(arm, f"{arm}{arm.replace('mlp', 'gate')}gains: [{{arm: mlp, other: gate}}]\n", 1)
    )
    losses = {"base": [2.0, math.inf, 2.2], "mlp": [1.8, math.inf, 1.9], "gate": [2.1, 2.2, 2.3]}
    tried = by_rate({name: [3.0, 2.0, 4.0] for name in losses})
    for name, values in losses.items():
        tried |= compared(name, 0.2, values)
    (loss, _) = judge(scaled, tried).gains
    assert loss.interval is None and (loss.better, loss.worse) == (2, 0)


def test_counts_have_the_sign_test_and_no_interval(scaled: ScaledStudy) -> None:
    """Student's interval of small counts covers less than it says (docs/statistics.md)."""
    tried = by_rate({"base": [3.0, 2.0, 4.0], "mlp": [3.0, 2.5, 2.4]}) | compared("base", 0.2, [2.0] * 3)
    result = judge(scaled, tried | {Trial("mlp", 0.4, seed): outcome(2.0, spikes=seed + 2.0) for seed in range(3)})
    arm, (_, found) = result.arms["mlp"], result.compared
    assert arm.interval("train_loss") is not None and arm.interval("spikes") is None and arm.mean("spikes") == 3.0
    assert (found.interval, found.better, found.worse, found.sign_test) == (None, 0, 3, 0.25)
    told = "worse in 3 of 3 seeds, sign test p = 0.25 (cannot reach 0.05 unless 6 seeds differ), no interval: they are"
    assert found.sentence().endswith(f"{told} counts")


def test_without_an_interval_the_sign_test_decides_what_the_sentence_says(tmp_path: Path) -> None:
    """Of 6 equal signs p is 2 / 2^6 = 0.031, of 5 it is 0.062."""
    text = TEXT.replace("[{kind: train_loss}, {kind: spikes}]", "[{kind: spikes}, {kind: train_loss}]")
    for seeds in (5, 6):
        scaled = written(tmp_path, text.replace("seeds: [0, 1, 2], rate", f"seeds: {list(range(seeds))}, rate"))
        outcomes = by_rate({"base": [3.0, 2.0, 4.0], "mlp": [3.0, 2.5, 2.4]})
        outcomes |= compared("base", 0.1, [2.0] * seeds)
        outcomes |= {Trial("mlp", 0.1, seed): outcome(2.0, spikes=seed + 1.0) for seed in range(seeds)}
        sentence = judge(scaled, outcomes).sentence
        told = "better in 0, worse in 6 of 6 seeds, sign test p = 0.031, no interval: they are counts"
        alike = (
            "no difference in spikes is shown for mlp - base (better in 0, worse in 5 of 5 seeds, sign test p = 0.062"
        )
        assert (told in sentence, alike in sentence) == (seeds == 6, seeds == 5)


@pytest.mark.parametrize("name", study_names())
def test_published_figures_are_printed_as_the_paper_and_the_file_have_them(name: str) -> None:
    """1.830 and 50.00 keep their zeros."""
    text = (shipped("configs") / "study" / f"{name}.yaml").read_text()
    published = load_study(name, "cpu").study.published
    assert [printed(one, published) for one in published if one.value is not None] == re.findall(
        r"\{what: .*value: ([0-9.]+)\}", text
    )


def test_the_page_says_the_sentence_the_arms_and_what_was_published(scaled: ScaledStudy) -> None:
    page = study_page(judged(scaled, [2.0, 2.1, 2.2], [1.7, 2.0, 2.0]), {"base": "report/base/index.html"})
    for word in ("no difference in train_loss", "| mlp | base | 0.4 (edge) | 3 | 0 | 1.9 [",
                 "| a table | mlp | 1.5 | train_loss 1.9 [",
                 "report/base/index.html", "`attention=kha_mlp`"):  # fmt: skip
        assert word in page
