"""Real runs restarted with other data or settings: the comparison states how strong the evidence is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_tools.synthetic import write_dataset
from kha_train.analysis.compare import Comparison, compare_runs
from kha_train.analysis.ending import end_of
from kha_train.analysis.report.page import report_html
from kha_train.cli.compare import compare
from kha_train.config.compose import compose
from kha_train.record import read_attempts, read_metrics, read_run
from kha_train.train.run import train

pytestmark = pytest.mark.slow

STEPS, LAST_KEPT = 20, 10
SETTINGS = (
    "model.vocab_size=256", "model.seq_len=16", "model.layers=1", "model.hidden_size=32", "model.query_heads=2",
    "model.kv_heads=1", "model.head_dim=16", "moe.expert_width=16", "data.global_batch_size=2",
    "engine.micro_batch_size=2", "validation.rows=4", "validation.every_steps=5", "checkpoint.every_steps=5",
    "checkpoint.keep_last=9", "checkpoint.background=false", "telemetry.wandb.mode=disabled",
    "telemetry.peak_tflops=0.1", "telemetry.console=quiet", f"run.steps={STEPS}",
)  # fmt: skip
CHANGED = "resume.allow_changes=[optim.lr,data_content_id,validation_content_id]"


class Place:
    """Datasets `first` and `other`, and runs with steps of a few milliseconds, made once for all tests of this file."""

    def __init__(self, where: Path) -> None:
        self.where = where
        for seed, name in enumerate(("first", "other", "third")):
            write_dataset(where / name, vocab_size=256, documents=40, seed=seed)

    def run(self, name: str, *overrides: str, data: str = "first") -> Path:
        """Start (again) the run `name` on the dataset `data`."""
        run_dir = self.where / "runs" / name
        paths = [f"{key}={self.where / data / split}" for key, split in PLACES.items()]
        train(compose([*SETTINGS, *paths, f"run.dir={run_dir}", f"run.name={name}", *overrides]))
        return run_dir

    def copy(self, run_dir: Path, name: str) -> Path:
        """A copy of a run that has lost its checkpoints after `LAST_KEPT`."""
        copied = self.where / "runs" / name
        shutil.copytree(run_dir, copied)
        for step in (15, 20):
            shutil.rmtree(copied / "checkpoints" / f"step-{step:08d}")
        return copied


PLACES = {"data.train": "train", "data.validation": "validation"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def whole(place: Place) -> dict[str, Path]:
    """Runs on the first data with one start each."""
    return {
        "gqa": place.run("gqa", "attention=gqa"),
        "gqa_hot": place.run("gqa_hot", "attention=gqa", "optim.lr=0.02"),
        "kha_hot": place.run("kha_hot", "attention=kha_mlp", "optim.lr=0.02"),
    }


@pytest.fixture(scope="module")
def resumed(place: Place, whole: dict[str, Path]) -> Path:
    """gqa on the first data, from step 11 on with other data, other validation data and another rate."""
    place.copy(whole["gqa"], "resumed")
    return place.run("resumed", "attention=gqa", "optim.lr=0.02", CHANGED, data="other")


def answered(*runs: Path) -> tuple[Comparison, dict]:
    comparison = compare_runs(list(runs))
    return comparison, json.loads(json.dumps(comparison.to_dict(), allow_nan=False))


def test_runs_that_were_started_once_on_the_same_data_are_a_fair_pair(whole: dict[str, Path]) -> None:
    comparison, answer = answered(whole["gqa_hot"], whole["kha_hot"])
    (pair,) = answer["pairs"]
    assert pair["caveats"] == [] and pair["same_data"] and answer["evidence"] == "1 seed: not evidence"
    assert answer["validation_sets"].startswith("Every validation at the end scored the same rows: content id ")
    page = report_html(comparison)
    assert "The same rows at every point: content id" in page
    assert [run["validation_mark"] for run in answer["runs"]] == ["", ""]


def test_a_run_resumed_on_other_data_at_another_rate_is_no_pair_of_one_that_had_that_rate_from_the_start(
    resumed: Path, whole: dict[str, Path]
) -> None:
    first, other = (read_metrics(run)[LAST_KEPT]["train/loss"] for run in (resumed, whole["gqa"]))
    assert first != other, "step 11 read other data"
    comparison, answer = answered(resumed, whole["kha_hot"])
    (pair,) = answer["pairs"]
    assert not pair["same_data"] and pair["different_from"] == LAST_KEPT + 1 and pair["interval"] is None
    told = " | ".join(pair["caveats"])
    assert "they read different data from step 11 on" in told
    rate = compose(SETTINGS).optim.lr
    assert f"optim.lr ({rate} and 0.02 at steps 1 to 10)" in told
    assert "different validation sets from step 15 on" in told
    assert "read the same data" not in pair["data_words"]
    assert "from step 11 on" in pair["data_words"]
    assert answer["across_seeds"] == [] and answer["evidence"] == "a variant without a fair pair: not evidence"
    changed = " | ".join(answer["runs"][0]["changes"])
    assert f"optim.lr {rate} -> 0.02 from step 11 on" in changed and "data_content_id" in changed
    page = report_html(comparison)
    assert page.count("not a fair pair: ") == len(pair["caveats"]) and "no paired difference" in page
    assert "same rows" not in page


def test_the_same_holds_of_one_variant_and_with_the_runs_named_the_other_way_round(
    resumed: Path, whole: dict[str, Path]
) -> None:
    _, answer = answered(whole["gqa_hot"], resumed)
    (pair,) = answer["pairs"]
    assert any("different data from step 11 on" in caveat for caveat in pair["caveats"])
    assert any("optim.lr (0.02 and" in caveat and "at steps 1 to 10)" in caveat for caveat in pair["caveats"])
    assert "not evidence" in answer["evidence"] and len({run["variant"] for run in answer["runs"]}) == 2


def test_what_both_runs_changed_at_the_same_step_is_a_note_and_no_caveat(
    place: Place, resumed: Path, whole: dict[str, Path]
) -> None:
    twin = place.run("twin", "attention=kha_mlp")
    place.copy(twin, "twin_resumed")
    twin = place.run("twin_resumed", "attention=kha_mlp", "optim.lr=0.02", "engine=zero2", CHANGED, data="other")
    _, answer = answered(resumed, twin)
    (pair,) = answer["pairs"]
    assert pair["caveats"] == [] and pair["same_data"] and pair["difference"] is not None
    assert answer["evidence"] == "1 seed: not evidence"
    both, one = pair["notes"]
    assert both.startswith("both changed ") and both.endswith(" from step 11 on")
    assert "optim.lr to 0.02" in both and "data_content_id to" in both
    assert one == "only twin_resumed changed engine.zero_stage (1 and 2 from step 11 on)"
    assert answer["runs"][1]["zero_stage"] == "1, then 2 from step 11 on"


def test_a_start_whose_lines_were_all_discarded_does_not_matter(place: Place, whole: dict[str, Path]) -> None:
    place.copy(whole["gqa_hot"], "undone")
    place.run("undone", "attention=gqa", "optim.lr=0.5", CHANGED, data="other")
    for step in (15, 20):
        shutil.rmtree(place.where / "runs" / "undone" / "checkpoints" / f"step-{step:08d}")
    undone = place.run("undone", "attention=gqa", "optim.lr=0.02")
    assert len(read_attempts(undone)) == 3
    _, answer = answered(undone, whole["kha_hot"])
    assert answer["pairs"][0]["caveats"] == [] and answer["runs"][0]["changes"] == []


def test_validation_data_overwritten_between_two_runs_are_told_apart(
    place: Place, whole: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    gqa = place.run("before", "attention=gqa", data="third")
    shutil.rmtree(place.where / "third" / "validation")
    shutil.copytree(place.where / "other" / "validation", place.where / "third" / "validation")
    kha = place.run("after", "attention=kha_mlp", data="third")
    ids = [read_run(run)["provenance"]["validation_content_id"] for run in (gqa, kha)]
    assert ids[0] != ids[1]
    assert [end_of(run).summary()["final/validation_content_id"] for run in (gqa, kha)] == ids, "W&B shows it too"

    comparison, answer = answered(gqa, kha)
    (pair,) = answer["pairs"]
    (caveat,) = pair["caveats"]
    assert caveat.startswith("different validation sets from step 5 on") and all(one[:12] in caveat for one in ids)
    assert pair["same_data"]
    assert [run["validation_mark"] for run in answer["runs"]] == ["A", "B"]
    assert [run["validation_content_id"] for run in answer["runs"]] == ids
    assert "cannot be compared" in answer["validation_sets"]
    page = report_html(comparison)
    assert (
        page.count("<strong>Validation, set") == 2
        and page.count("Scored here: content id") == 2
        and "same rows" not in page
    )
    assert page.count(" [A]</td>") == page.count(" [B]</td>") == 2
    compare([gqa, kha], place.where / "report", as_json=False)
    printed = " ".join(capsys.readouterr().out.split())
    assert "[A]" in printed and "[B]" in printed and "cannot be compared" in printed


def test_other_rows_of_the_same_validation_set_are_told_apart(place: Place, whole: dict[str, Path]) -> None:
    kha = place.run("fewer_rows", "attention=kha_mlp", "optim.lr=0.02", "validation.rows=3")
    _, answer = answered(whole["gqa_hot"], kha)
    (caveat,) = answer["pairs"][0]["caveats"]
    assert "4 rows of 16 tokens" in caveat and "3 rows of 16 tokens" in caveat


def test_a_run_of_an_older_release_says_what_cannot_be_known(
    place: Place, resumed: Path, whole: dict[str, Path]
) -> None:
    old = place.where / "runs" / "old"
    shutil.copytree(resumed, old)
    run = read_run(old)
    for attempt in run["attempts"]:
        del attempt["config"]
        attempt["changed"].pop("validation_content_id", None)
    del run["provenance"]["validation_content_id"]
    (old / "run.json").write_text(json.dumps(run))
    _, answer = answered(old, whole["kha_hot"])
    (pair,) = answer["pairs"]
    told = " | ".join(pair["caveats"])
    assert f"they read different data from step {LAST_KEPT + 1} on" in told, "each start's content id was recorded"
    assert "the settings of resumed at steps 1 to 10 were not recorded" in told
    assert "the recorded train/lr" in told
    assert answer["runs"][0]["unknown"] == ["settings at steps 1 to 10"]
    assert [run["validation_mark"] for run in answer["runs"]] == ["?", "A"]
    assert "not proven to be the same" in answer["validation_sets"]
