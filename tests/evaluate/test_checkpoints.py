"""`kha eval` on the checkpoints of a run: the figures of the record again, saved beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kha_train import compose
from kha_train.cli.main import app
from kha_train.decode import generate
from kha_train.evaluate.results import read_evaluation
from kha_train.record import read_metrics
from kha_train.train.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Any) -> Path:
    """A run of four steps with checkpoints at 2 and 4."""
    run = tmp_path_factory.mktemp("runs") / "kha"
    steps = ["run.steps=4", "checkpoint.every_steps=2", "data.global_batch_size=4", "engine.micro_batch_size=4"]
    tasks = "evaluation.tasks=[{name: harness, tasks: [kha_choice], limit: 8, every_steps: 2}, context]"
    train(compose([*corpus.overrides, *steps, tasks, "attention=kha_linear", f"run.dir={run}", "optim.lr=1e-2",
                   "validation.every_steps=2", "engine.device=cpu"]))  # fmt: skip
    return run


def asked(run: Path, *words: str, code: int = 0) -> Any:
    found = CliRunner().invoke(app, ["eval", str(run), *words])
    assert getattr(found.exception, "exit_code", found.exit_code) == code, found.output
    return found


@pytest.mark.slow
def test_every_checkpoint_has_again_what_the_record_has(run: Path) -> None:
    """The interaction absorbed, in one process."""
    lines = {line["step"]: line for line in read_metrics(run)}
    answer = json.loads(asked(run, "--every-checkpoint", "--json", "--batch-size", "3").stdout)
    assert [found["step"] for found in answer["evaluations"]] == [4, 2]
    for found in answer["evaluations"]:
        entries = {
            key: value
            for key, value in lines[found["step"]].items()
            if key.partition("/")[0] in ("validation", "evaluation")
        }
        assert {key: found["entries"][key] for key in entries} == pytest.approx(entries, rel=1e-4)
        assert "validation/framed/bits_per_byte" in entries and "evaluation/harness/kha_choice_acc" in entries


@pytest.mark.slow
def test_results_of_several_calls_are_kept_beside_the_checkpoint(run: Path, tmp_path: Path) -> None:
    asked(run, "--tasks", "validation")
    printed = asked(run, "--tasks", "kha_choice,kha_prose", "--limit", "5").stdout
    assert "kha_choice acc_norm" in printed and "5 of 60" in printed
    saved = read_evaluation(run / "evaluation" / "step-00000004.json")
    assert saved is not None and "validation/bits_per_byte" in saved.entries
    assert saved.harness["kha_choice"].result.samples == 5 and saved.harness["kha_choice"].limit == 5
    # A checkpoint by its own name, which has its place in the same run.
    asked(run / "checkpoints" / "step-00000002", "--tasks", "answers", code=2)
    asked(run / "checkpoints" / "step-00000002", "--tasks", "context")
    second = read_evaluation(run / "evaluation" / "step-00000002.json")
    assert second is not None and any(key.startswith("evaluation/context/") for key in second.entries)
    # Where another checkpoint took its place, nothing of the old figures is kept.
    path = run / "evaluation" / "step-00000004.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "manifest": "0" * 64}))
    asked(run, "--tasks", "validation")
    again = read_evaluation(path)
    assert again is not None and again.harness == {} and again.manifest != "0" * 64


@pytest.mark.slow
def test_a_checkpoint_of_the_ring_belongs_to_the_run(run: Path, tmp_path: Path) -> None:
    copy, step = shutil.copytree(run, tmp_path / "run"), "checkpoints/step-00000002"
    in_ring = shutil.copytree(copy / step, copy / "ring" / step)
    asked(in_ring, "--tasks", "validation")
    assert (copy / "evaluation" / "step-00000002.json").is_file()
    assert generate.load_run(in_ring, print).step == 2


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_told(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (path,) = (copy / "checkpoints" / "step-00000004").glob("model-*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    answer = asked(copy, "--tasks", "validation", "--json")
    assert [found["step"] for found in json.loads(answer.stdout)["evaluations"]] == [2]
    assert "passed over" in answer.stderr
    asked(copy, "--tasks", "validation", "--every-checkpoint", code=4)


def test_the_list_names_all_tasks_of_the_paper_without_any_model() -> None:
    answer = json.loads(CliRunner().invoke(app, ["eval", "--list", "--json"]).stdout)
    assert len(answer["paper"]) == 19 and "kha_choice" in answer["shipped"] and "answers" in answer["own"]


def test_no_model_and_a_directory_that_is_none_are_refused(tmp_path: Path) -> None:
    runner: Callable[..., Any] = CliRunner().invoke
    for words in (["eval"], ["eval", str(tmp_path)], ["eval", str(tmp_path / "gone")]):
        assert type(runner(app, words).exception).__name__ == "ConfigError"
