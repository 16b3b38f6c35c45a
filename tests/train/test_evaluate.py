"""What a run measures while it trains: recorded, resumed, held to the content of its data, never by one rank alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kha_train import compose
from kha_train.analysis.compare import compare_runs
from kha_train.data.format.manifest import content_id_of
from kha_train.data.format.shards import ShardSet
from kha_train.errors import DataError, ResumeError
from kha_train.record import read_metrics, read_run, timing_keys
from kha_train.train.run import train

STEPS = 6


@pytest.fixture
def measured(small: list[str], dataset: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`measured(name, *overrides)`: a short run that validates at every third step on two sets, and has two tasks."""
    shutil.copytree(dataset / "train", tmp_path / "code")
    often = ["validation.every_steps=3", "checkpoint.every_steps=3", f"run.steps={STEPS}"]
    model = [
        "model.layers=1",
        "data.global_batch_size=4",
        "engine.micro_batch_size=4",
        "engine.device=cpu",
        "engine.name=plain",
    ]
    sets = f"validation.sets=[{{name: code, path: {tmp_path}/code}}]"
    tasks = "evaluation.tasks=[{name: context, every_steps: 2}, {name: bits_per_byte, set: code, rows: 3, label: few}]"
    return lambda name, *more: [*small, *often, *model, sets, tasks, f"run.dir={tmp_path / name}", *more]


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """The record without what tells the time."""
    timings = timing_keys(read_run(run_dir))
    return [{key: value for key, value in line.items() if key not in timings} for line in read_metrics(run_dir)]


def take_back(run_dir: Path, step: int) -> None:
    """Leave the run as a kill right after the checkpoint of `step` does."""
    for path in (run_dir / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (run_dir / "DONE").unlink()


def test_sets_and_tasks_are_recorded_when_due_and_a_resume_at_such_a_step_repeats_them_bit_for_bit(
    measured: Callable[..., list[str]], tmp_path: Path
) -> None:
    train(compose(measured("run")))
    whole = lines_of(tmp_path / "run")
    begin = {"validation/loss": [3, 6], "validation/code/loss": [3, 6], "evaluation/context/loss_from_1": [2, 4, 6]}
    begin |= {"validation/code/bits_per_byte": [3, 6], "evaluation/few/loss": [6]}
    assert {key: [line["step"] for line in whole if key in line] for key in begin} == begin

    train(compose(measured("alone", "validation.sets=[]", "evaluation.tasks=[]")))
    for line, alone in zip(whole, lines_of(tmp_path / "alone"), strict=True):
        assert {key: line[key] for key in alone} == alone, "what is measured changes nothing of the rest"

    take_back(tmp_path / "run", 3)
    train(compose(measured("run")))
    assert lines_of(tmp_path / "run") == whole
    facts = read_run(tmp_path / "run")["provenance"]["evaluations"]
    assert facts.keys() == {"validation/code", "evaluation/context", "evaluation/few"}
    assert facts["evaluation/few"]["rows"] == 3
    assert not any("evaluations" in attempt["changed"] for attempt in read_run(tmp_path / "run")["attempts"])


def test_a_run_does_not_go_on_with_other_content_of_a_named_set_unless_it_is_allowed(
    measured: Callable[..., list[str]], dataset: Path, tmp_path: Path
) -> None:
    train(compose(measured("run")))
    take_back(tmp_path / "run", 3)
    saved = json.loads((tmp_path / "run/checkpoints/step-00000003/trainer.json").read_text())
    assert saved["evaluation_content_ids"].keys() == {"validation_content_id.code"}
    without = ["validation.sets=[]", "evaluation.tasks=[]"]
    moved = f"validation.sets=[{{name: code, path: {dataset}/train}}]"
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    train(compose(measured("copy", moved)))
    take_back(tmp_path / "copy", 3)
    train(compose(measured("copy", *without)))
    assert "validation/code/loss" not in lines_of(tmp_path / "copy")[-1]

    manifest = tmp_path / "code" / "manifest.json"
    raw = json.loads(manifest.read_text())
    raw["corpus"]["made"] = "yesterday"
    manifest.write_text(json.dumps(raw | {"content_id": content_id_of(raw)}))
    with pytest.raises(ResumeError, match=r"validation_content_id\.code +'") as refused:
        train(compose(measured("run")))
    assert refused.value.exit_code == 3
    train(compose(measured("run", "resume.allow_changes=[validation_content_id.code]")))
    last = json.loads((tmp_path / "run/checkpoints/step-00000006/trainer.json").read_text())
    assert last["evaluation_content_ids"] != saved["evaluation_content_ids"]
    told = [one for one in compare_runs([tmp_path / "run"]).summaries[0].told["changes"] if "content_id" in one]
    assert [one.partition(".content_id")[0] for one in told] == [
        "evaluations.evaluation/few",
        "evaluations.validation/code",
    ]
    assert all(one.endswith("from step 4 on") for one in told)


@pytest.mark.parametrize("of", ["validation.sets[0].path", "data.validation"])
def test_a_damaged_set_ends_the_run_before_its_first_step_or_where_the_damage_is_read(
    of: str, measured: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "code" / "manifest.json").write_text("{}")
    changed = [f"data.validation={tmp_path}/code", "validation.sets=[]", "evaluation.tasks=[]"]
    with pytest.raises(DataError) as raised:
        train(compose(measured("run", *(changed if of == "data.validation" else []))))
    assert raised.value.exit_code == 4 and (tmp_path / "run" / "FATAL").exists()
    assert not list(read_metrics(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
def test_a_damaged_row_that_one_rank_reads_stops_all_ranks(
    small: list[str], dataset: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]], named: bool
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(dataset / "validation", damaged)
    entry = ShardSet.open(damaged).manifest.shards[0]
    path = next(path for path in sorted(damaged.glob("*.tok")))
    ids = np.fromfile(path, dtype=np.uint16)
    assert entry.tokens == len(ids)
    ids[64 * 4 + 10] = 60_000
    ids.tofile(path)
    overrides = [
        *small,
        f"validation.sets=[{{name: code, path: {damaged}}}]" if named else f"data.validation={damaged}",
        "data.check_crc=false",
        f"run.dir={tmp_path}/run",
        "run.steps=2",
        "validation.every_steps=1",
    ]
    told = run_ranks(Path(__file__).with_name("validation_worker.py"), 2, overrides=overrides)
    assert "60000" in told[1]
    assert told[0] == f"rank 1: {told[1]}"
    assert (tmp_path / "run" / "FATAL").exists()


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "validation"])
def test_ranks_whose_copies_of_the_data_differ_do_not_begin(
    small: list[str], dataset: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]], split: str
) -> None:
    other = shutil.copytree(dataset / split, tmp_path / "other")
    raw = json.loads((other / "manifest.json").read_text())
    raw["corpus"]["made"] = "yesterday"
    (other / "manifest.json").write_text(json.dumps(raw | {"content_id": content_id_of(raw)}))
    overrides = [*small, f"run.dir={tmp_path}/run", "run.steps=2"]
    told = run_ranks(
        Path(__file__).with_name("validation_worker.py"),
        2,
        overrides=overrides,
        of_rank={"1": [f"data.{split}={other}"]},
    )
    assert "reads other data than rank 0" in told[1] and f"data.{split}" in told[1]
    assert told[0] == f"rank 1: {told[1]}"
