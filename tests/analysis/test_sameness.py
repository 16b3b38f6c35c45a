"""Two runs are compared step by step, each judged by the attempts that made its surviving lines."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from hypothesis import given
from hypothesis import strategies as st

from kha_train.analysis.compare import Comparison, Pair, compare_runs
from kha_train.analysis.history import differences, stretches_of
from kha_train.analysis.report.page import report_html
from kha_train.analysis.runs import RunData, load_run
from kha_train.analysis.sameness import data_difference, data_proof, meetings, shared_until
from kha_train.analysis.spikes import read_curve
from kha_train.config.build import to_plain
from kha_train.config.compose import compose, dump
from kha_train.record import Attempt, Record, read_run
from kha_train.record.columns import columns_of
from kha_train.record.schema import Parent


class Start(NamedTuple):
    """One start of a run: it trains steps up to `last` with these overrides of the base, and records these facts."""

    last: int
    overrides: tuple[str, ...] = ()
    facts: Mapping[str, Any] = MappingProxyType({})
    world_size: int = 1
    at: int | None = None
    """The step after which it resumes, if it is not the last one before."""
    parent: Parent | None = None
    """The run that it branches off."""


def write_run(path: Path, *starts: Start, variant: str = "gqa", old: bool = False, shift_from: int = 1000) -> Path:
    """A run directory as these starts leave it; with `old`, as a release that kept only the last configuration would
    leave it.
    """
    step = 0
    for start in starts:
        step = step if start.at is None else start.at
        config = compose([f"attention={variant}", "optim.lr=0.001", f"run.dir={path}", *start.overrides])
        known = {} if old else {"validation_content_id": "aa" * 32, "validation_rows": 4}
        record = Record.open(path)
        record.begin_attempt(
            step,
            world_size=start.world_size,
            facts={"data_content_id": "c0ffee", "dtype": "float32", **known, **start.facts},
            config=None if old else to_plain(config),
            parent=start.parent,
        )
        while step < start.last:
            step += 1
            first = 4 * step + (100 if step > shift_from else 0)
            line = {"step": step, "samples_first": first, "samples_last": first + 3, "train/lr": config.optim.lr}
            line |= {"train/loss": 3.0 + 0.01 * (step % 3)}
            if step % 5 == 0:
                line |= {"validation/loss": 3.0, "validation/bits_per_byte": 1.5}
            record.step(line)
        record.close("requeued")
        if not old:
            (path / "config.yaml").write_text(dump(config))
    if old:
        (path / "config.yaml").write_text(dump(config))
        run = json.loads((path / "run.json").read_text())
        assert not any("config" in attempt for attempt in run["attempts"])
    return path


def pair_of(*paths: Path) -> tuple[Pair, Comparison]:
    comparison = compare_runs(list(paths))
    json.dumps(comparison.to_dict(), allow_nan=False)
    (pair,) = comparison.pairs
    return pair, comparison


def test_a_setting_that_differs_for_some_steps_alone_is_named_with_them(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", Start(10), Start(15, ("optim.lr=0.5",)), Start(30))
    pair, _ = pair_of(one, write_run(tmp_path / "b", Start(30), variant="kha_mlp"))
    assert pair.confounders == ("optim.lr (0.5 and 0.001 at steps 11 to 15)",)
    assert pair.same_data and pair.difference is not None


def test_ranks_stage_and_versions_are_notes_of_a_fair_pair(tmp_path: Path) -> None:
    moved = Start(30, ("engine=zero2", "data.train=/elsewhere"), {"versions": {"torch": "9.9"}}, world_size=2)
    one = write_run(tmp_path / "a", Start(10), moved)
    pair, comparison = pair_of(one, write_run(tmp_path / "b", Start(30), variant="kha_mlp"))
    assert pair.caveats == () and comparison.evidence == "1 seed: not evidence"
    notes = " | ".join(pair.notes)
    assert "world_size (2 and 1 from step 11 on)" in notes and "engine.zero_stage (2 and 1 from step 11 on)" in notes
    assert "data.train (/elsewhere and" in notes and "versions.torch (9.9 and" in notes
    told = comparison.to_dict()["runs"][0]
    assert told["world_size"] == "1, then 2 from step 11 on" and told["zero_stage"] == "1, then 2 from step 11 on"
    page = report_html(comparison)
    assert "1, then 2 from step 11 on" in page and "world_size (2 and 1 from step 11 on)" in page


def test_what_both_changed_and_what_one_did_are_sentences_and_what_trains_nothing_is_none(tmp_path: Path) -> None:
    before, later = {"git": {"commit": "f00d"}}, {"git": {"commit": "beef"}}
    untold = ("resume.allow_changes=[run.steps,optim]", "telemetry.wandb.mode=disabled", "run.max_minutes=9")
    moved = Start(20, ("engine=zero2", *untold), later, world_size=2)
    one = write_run(tmp_path / "a", Start(10, facts=before), moved)
    profiled = ("profile.first_step=3", "profile.last_step=4", "data.prefetch=5")
    other = write_run(
        tmp_path / "b", Start(10, profiled, before), Start(20, ("data.prefetch=5",), later), variant="mha"
    )
    pair, comparison = pair_of(one, other)
    label = comparison.runs[0].label
    assert list(pair.notes) == [
        "both changed git.commit to beef from step 11 on",
        f"only {label} changed engine.zero_stage (2 and 1 from step 11 on), world_size (2 and 1 from step 11 on)",
        "they differ in data.prefetch (0 and 5)",
    ]
    assert comparison.notes() == [f"{label} and {comparison.runs[1].label}: {note}" for note in pair.notes]
    shown = json.dumps(comparison.to_dict()) + report_html(comparison)
    for key in ("resume.", "run.max_minutes", "profile.", "telemetry."):
        assert key not in shown
    assert "data.prefetch" in comparison.differences


def test_the_precision_that_auto_stood_for_is_compared(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", Start(20))
    pair, _ = pair_of(one, write_run(tmp_path / "b", Start(20, facts={"dtype": "bfloat16"}), variant="kha_mlp"))
    assert pair.confounders == ("engine.precision (fp32 and bf16)",)


def test_a_micro_batch_that_is_part_of_the_objective_is_no_free_setting(tmp_path: Path) -> None:
    scope = ("moe.auxiliary_loss.scope=micro_batch", "moe.auxiliary_loss.weight=0.01")
    one = write_run(tmp_path / "a", Start(20, (*scope, "engine.micro_batch_size=4")))
    other = write_run(tmp_path / "b", Start(20, (*scope, "engine.micro_batch_size=2")), variant="kha_mlp")
    assert pair_of(one, other)[0].confounders == ("engine.micro_batch_size (4 and 2)",)


def test_where_weights_came_from_matters_in_the_first_start_alone(tmp_path: Path) -> None:
    inherits = "run.init_from=runs/source"
    one = write_run(tmp_path / "a", Start(10, (inherits,)), Start(20))
    other = write_run(tmp_path / "b", Start(10, (inherits,)), Start(20, (inherits,)), variant="kha_mlp")
    assert pair_of(one, other)[0].caveats == ()
    never = write_run(tmp_path / "c", Start(10), Start(20, (inherits,)), variant="kha_mlp")
    assert pair_of(one, never)[0].confounders == ("run.init_from (runs/source and )",)


def test_the_first_step_of_other_samples_is_named_though_the_data_change_later(tmp_path: Path) -> None:
    other_data = Start(30, facts={"data_content_id": "decade"})
    one = write_run(tmp_path / "a", Start(20), other_data, shift_from=12)
    pair, _ = pair_of(one, write_run(tmp_path / "b", Start(30), variant="kha_mlp"))
    assert pair.different_from == 13 and "different samples from step 13 on" in pair.data_words
    assert pair.caveats == ("they read different data from step 13 on",) and pair.interval is None


def test_an_order_setting_that_changes_on_the_way_is_other_data(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", Start(10), Start(30, ("data.shuffle=block",)))
    pair, _ = pair_of(one, write_run(tmp_path / "b", Start(30), variant="kha_mlp"))
    assert pair.different_from == 11 and "data.shuffle is block and global from step 11 on" in pair.data_words


def test_a_start_that_trained_nothing_or_was_undone_does_not_matter(tmp_path: Path) -> None:
    hot = ("optim.lr=0.5", "run.seed=7", "data.shuffle=block")
    other_data = {"data_content_id": "decade", "parameters": {"total": 1, "active": 1}}
    undone = Start(20, hot, other_data)
    one = write_run(tmp_path / "a", Start(10), undone, Start(30, at=10), Start(30, hot, other_data))
    pair, comparison = pair_of(one, write_run(tmp_path / "b", Start(30), variant="kha_mlp"))
    assert pair.caveats == () and comparison.runs[0].seed == 0
    assert comparison.differences.keys() & {"optim.lr", "run.seed", "data.shuffle"} == set()
    assert comparison.summaries[0].told["changes"] == []


def test_a_first_start_whose_lines_were_all_discarded_gives_no_figure_of_the_run(tmp_path: Path) -> None:
    first = Start(10, ("optim.lr=0.5",), {"data_content_id": "decade", "parameters": {"total": 1, "active": 1}})
    second = Start(20, facts={"parameters": {"total": 1000, "active": 300}}, at=0)
    one = write_run(tmp_path / "a", first, second)
    pair, comparison = pair_of(one, write_run(tmp_path / "b", Start(20), variant="kha_mlp"))
    assert pair.caveats == () and comparison.summaries[0].results["parameters"] == 1000


def test_runs_of_one_attention_with_other_histories_are_variants_of_their_own(tmp_path: Path) -> None:
    """Although their last settings are equal."""
    one = write_run(tmp_path / "a", Start(10), Start(20, ("optim.lr=0.5",)))
    _, comparison = pair_of(one, write_run(tmp_path / "b", Start(20, ("optim.lr=0.5",))))
    assert [run.variant for run in comparison.runs] == [
        "gqa optim.lr=0.001, then 0.5 from step 11 on",
        "gqa optim.lr=0.5",
    ]
    assert comparison.differences["optim.lr"] == ("0.001, then 0.5 from step 11 on", 0.5)


def test_an_old_run_that_was_started_once_is_known_from_its_config_yaml(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", Start(20), old=True)
    pair, comparison = pair_of(one, write_run(tmp_path / "b", Start(20), variant="kha_mlp"))
    assert pair.caveats == () and pair.same_data and comparison.validation_marks == ("?", "A")
    assert "not proven to be the same" in comparison.validation_words
    page = report_html(comparison)
    assert "same rows" not in page and "was not recorded" in page


def test_the_earlier_starts_of_an_old_run_cannot_be_known(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", Start(10), Start(20), old=True)
    pair, comparison = pair_of(one, write_run(tmp_path / "b", Start(20), variant="kha_mlp"))
    assert not pair.same_data and pair.different_from is None and pair.difference is not None
    name = comparison.runs[0].label
    told = f"the settings of {name} at steps 1 to 10 were not recorded"
    assert pair.caveats == ("not proven to have read the same data", told) and told in pair.data_words
    assert comparison.evidence == "a variant without a fair pair: not evidence"
    assert comparison.summaries[0].told["unknown"] == ["settings at steps 1 to 10"]


def test_the_learning_rates_that_an_old_run_recorded_are_compared(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", Start(10, ("optim.lr=0.5",)), Start(20), old=True)
    pair, _ = pair_of(one, write_run(tmp_path / "b", Start(20), variant="kha_mlp"))
    assert pair.confounders == ("the recorded train/lr (0.5 and 0.001 at steps 1 to 10)",)


def test_an_attention_that_changes_on_the_way_is_named_with_its_steps(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", Start(20))
    turned = Start(20, ("attention.positions=none", "attention.backend=eager"))
    pair, _ = pair_of(one, write_run(tmp_path / "b", Start(10), turned, variant="kha_mlp"))
    assert pair.confounders == ("attention.positions (rope and none from step 11 on)",)
    mixed = Start(20, ("attention.interaction.projections=[q]",))
    pair, _ = pair_of(one, write_run(tmp_path / "c", Start(10), mixed, variant="kha_mlp"))
    assert any(
        text.startswith("attention.interaction.projections (None and ['q'] from step 11") for text in pair.confounders
    )


def test_neighbouring_starts_that_recorded_nothing_are_told_as_one(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", *(Start(last, ("optim.lr=0.5",)) for last in (6, 12)), Start(20), old=True)
    pair, comparison = pair_of(one, write_run(tmp_path / "b", Start(9), Start(20), variant="kha_mlp"))
    told = f"the settings of {comparison.runs[0].label} at steps 1 to 12 were not recorded"
    assert pair.unknown == (told,)
    assert pair.confounders == ("the recorded train/lr (0.5 and 0.001 at steps 1 to 12)",)
    assert comparison.summaries[0].told["unknown"] == ["settings at steps 1 to 12"]


def test_a_step_without_a_line_proves_nothing(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", Start(10), Start(30, at=12))
    pair, _ = pair_of(one, write_run(tmp_path / "b", Start(30), variant="kha_mlp"))
    assert not pair.same_data and "a run has no line for step 11" in pair.data_words


def test_a_validation_set_that_changes_on_the_way_is_drawn_apart(tmp_path: Path) -> None:
    other_set = {"validation_content_id": "bb" * 32}
    one = write_run(tmp_path / "a", Start(10), Start(20, facts=other_set))
    comparison = compare_runs([one])
    page = report_html(comparison)
    assert page.count("Scored here: content id") == 2 and "same rows" not in page
    pair, _ = pair_of(one, write_run(tmp_path / "b", Start(20), variant="kha_mlp"))
    assert len(pair.caveats) == 1 and pair.caveats[0].startswith("different validation sets from step 15 on")


def test_sets_of_equal_content_cut_otherwise_are_other_sets(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", Start(20)), write_run(tmp_path / "b", Start(20), variant="kha_mlp")]
    runs.append(write_run(tmp_path / "c", Start(20, ("data.packing=best_fit",)), variant="mha"))
    runs.append(write_run(tmp_path / "d", Start(4), variant="mea"))
    comparison = compare_runs(runs)
    assert comparison.validation_marks == ("A", "A", "B", "")
    page = report_html(comparison)
    assert page.count("1.5000 [A]") == 2 and page.count("1.5000 [B]") == 1


def test_an_infinite_setting_leaves_the_json_strict(tmp_path: Path) -> None:
    one, other = (write_run(tmp_path / name, Start(20), old=True) for name in ("a", "b"))
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["optim"] |= {"grad_clip": float("inf")}
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    answer = json.loads(json.dumps(compare_runs([one, other]).to_dict(), allow_nan=False))
    assert answer["config_differences"]["optim.grad_clip"] == [1.0, "inf"]


def test_the_phases_of_each_start_are_the_planned_changes_of_its_own_steps(tmp_path: Path) -> None:
    sources = "data.train=''", "data.sources=[{name: a, path: x, weight: 1.0}, {name: b, path: y, weight: 1.0}]"
    early, late = (f"data.phases=[{{start_sample: {first}, weights: [1.0, 2.0]}}]" for first in (4 * 5, 4 * 15))
    run = write_run(tmp_path / "a", Start(10, (*sources, early)), Start(20, (*sources, late)))
    assert read_curve(run).planned == {5, 15}


def save(run: Path, content: str, step: int = 10) -> Path:
    """A checkpoint of `step`, of which only the manifest is looked at."""
    manifest = run / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(content)
    return manifest.parent


def branch(path: Path, checkpoint: Path, last: int = 30, step: int = 10) -> Path:
    """A run that goes on from `checkpoint` as it is now."""
    before, manifest = read_run(checkpoint.parents[1]), (checkpoint / "manifest.json").read_bytes()
    older = before.get("parent")
    parent: Parent = {
        "run_id": before["run_id"],
        "step": step,
        "manifest": hashlib.sha256(manifest).hexdigest(),
        "checkpoint": str(checkpoint),
        "ancestors": [*older["ancestors"], (older["run_id"], older["step"], older["manifest"])] if older else [],
    }
    return write_run(path, Start(last, (f"run.branch_from={checkpoint}",), at=step, parent=parent))


NO_CHECKPOINT = "their states before step 11: not known to come from one checkpoint"


def test_a_branch_and_its_parent_are_one_run_while_the_parent_passes_the_checkpoint(tmp_path: Path) -> None:
    parent = write_run(tmp_path / "a", Start(30))
    child = branch(tmp_path / "b", save(parent, "first"))
    for pruned in (False, True):
        pair, _ = pair_of(parent, child)
        assert pair.caveats == () and "until step 10 both are one run" in pair.notes
        if not pruned:
            shutil.rmtree(parent / "checkpoints")


def test_a_parent_that_went_back_and_came_again_is_another_run(tmp_path: Path) -> None:
    parent = write_run(tmp_path / "a", Start(15))
    child = branch(tmp_path / "b", save(parent, "first"))
    write_run(parent, Start(30, at=5))
    for saved in ("first", "second", None):
        shutil.rmtree(parent / "checkpoints")
        if saved:
            save(parent, saved)
        pair, _ = pair_of(parent, child)
        # A resume that computed the same step again has made the same checkpoint.
        assert (pair.caveats == ()) == (saved == "first")
        assert (NO_CHECKPOINT in pair.confounders) == (saved != "first")
        assert ("until step 10 both are one run" in pair.notes) == (saved == "first")


def test_branches_of_two_checkpoints_of_one_step_are_no_fair_pair(tmp_path: Path) -> None:
    parent = write_run(tmp_path / "a", Start(30))
    one, two = branch(tmp_path / "b", save(parent, "first")), branch(tmp_path / "c", save(parent, "first"))
    other = branch(tmp_path / "d", save(parent, "second"))
    assert pair_of(one, two)[0].caveats == ()
    pair, _ = pair_of(one, other)
    assert pair.confounders == (NO_CHECKPOINT,) and not any("one run" in note for note in pair.notes)


def test_the_checkpoints_of_all_ancestors_decide_and_old_records_name_none(tmp_path: Path) -> None:
    parent = write_run(tmp_path / "a", Start(30))
    child = branch(tmp_path / "b", save(parent, "first"))
    grandchild = branch(tmp_path / "c", save(child, "its own", step=20), step=20)
    sibling = branch(tmp_path / "d", save(parent, "second"))
    assert shared(child, grandchild) == 20 and shared(parent, grandchild) == shared(parent, child) == 0
    save(parent, "first")
    assert shared(parent, grandchild) == shared(parent, child) == 10
    assert shared(sibling, grandchild) == 0
    run = read_run(grandchild)
    run["parent"]["ancestors"] = [entry[:2] for entry in run["parent"]["ancestors"]]
    (grandchild / "run.json").write_text(json.dumps(run))
    assert shared(sibling, grandchild) == 10, "what was not recorded cannot tell them apart"


def shared(one: Path, other: Path) -> float:
    found = shared_until(load_run(one), load_run(other))
    assert found == shared_until(load_run(other), load_run(one))
    return found


def test_runs_of_two_seeds_that_share_that_of_the_data_read_the_same(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", Start(30))
    pair, _ = pair_of(one, write_run(tmp_path / "b", Start(30, ("run.seed=1", "data.seed=0")), variant="kha_mlp"))
    assert pair.same_data and pair.difference is not None
    assert pair.caveats == ("different seeds, so different initial values",)


def test_runs_of_one_seed_and_two_of_the_data_are_no_pair(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", Start(30, ("data.seed=0",)))
    pair, _ = pair_of(one, write_run(tmp_path / "b", Start(30, ("data.seed=1",)), variant="kha_mlp"))
    assert pair.difference is None and pair.confounders == ()
    assert "data.seed is 0 and 1" in pair.data_words
    same, _ = pair_of(one, write_run(tmp_path / "c", Start(30), variant="kha_mlp"))
    assert same.caveats == (), "a seed that is named is the one it stands for"


RATES, CONTENTS = (0.001, 0.5), ("c0ffee", "decade")
HISTORY = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from(RATES), st.sampled_from(CONTENTS)), min_size=1, max_size=4
)


def run_of(history: list[tuple[int, float, str]]) -> RunData:
    """A run in memory: (steps, learning rate, content id) of each of its starts."""
    lines, attempts = [], {}
    for number, (count, rate, content) in enumerate(history, 1):
        config = {"optim": {"lr": rate}, "run": {"seed": 0}}
        attempts[number] = Attempt(number, len(lines), 1, {"data_content_id": content}, config)
        steps = range(len(lines) + 1, len(lines) + count + 1)
        lines += [{"step": step, "attempt": number, "samples_first": step, "samples_last": step} for step in steps]
    columns = columns_of(lines)
    return RunData(Path("x"), "x", {}, {}, columns, stretches_of(columns, attempts), 0, [], "gqa")


@given(HISTORY, HISTORY)
def test_the_judgement_is_that_of_a_comparison_line_by_line(one: list, two: list) -> None:
    both = [[(rate, content) for count, rate, content in history for _ in range(count)] for history in (one, two)]
    steps = list(enumerate(zip(*both, strict=False), 1))
    other_data = [step for step, ((_, first), (_, second)) in steps if first != second]
    other_rate = [step for step, ((first, _), (second, _)) in steps if first != second]
    reference, other = run_of(one), run_of(two)
    different = data_difference(reference, other)
    assert (different and different[0]) == (other_data[0] if other_data else None)
    assert data_proof(reference, other)[0] == (not other_data)
    named = differences(meetings(reference, other), lambda key, _: key == "optim.lr")
    assert sorted(step for found in named for step in range(found.first, found.last + 1)) == other_rate
