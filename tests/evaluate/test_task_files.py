"""Task files of other people are data: what would run code, or leave their directory, is refused with one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kha_train.errors import ConfigError
from kha_train.evaluate.task_files import SHIPPED, read_tasks

GOOD: dict[str, Any] = {
    "task": "own",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def written(directory: Path, text: str, name: str = "own.yaml") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)
    return directory


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"process_docs": "utils.x"}, "process_docs"),
        ({"class": "utils.Task"}, "class"),
        ({"unsafe_code": True}, "unsafe_code"),
        ({"use_prompt": "promptsource:*"}, "use_prompt"),
        ({"custom_dataset": "utils.x"}, "custom_dataset"),
        ({"metric_list": [{"metric": "evil/script.py"}]}, "no metric of the harness"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "hf_evaluate"),
        ({"dataset_path": "somebody/dataset"}, "no format of files"),
        ({"dataset_path": "./loader.py"}, "no format of files"),
        ({"dataset_kwargs": {"data_files": {"test": "../secret.jsonl"}}}, "leaves the directory"),
        ({"dataset_kwargs": {"data_files": {"test": "/etc/passwd"}}}, "leaves the directory"),
        ({"dataset_kwargs": {"data_files": {"test": "questions.jsonl"}, "trust_remote_code": True}}, "nothing else"),
        ({"dataset_kwargs": {"data_files": "https://example.org/x.json"}}, "nothing else"),
        ({"include": "../outside.yaml"}, "leaves the directory"),
        ({"include": "/etc/hostname"}, "leaves the directory"),
        ({"include": "own.yaml"}, "circle"),
        ({"task": ["a", "b"]}, "no name of one task"),
    ],
)
def test_what_is_no_data_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "outside.yaml").write_text("doc_to_text: x\n")
    (tmp_path / "secret.jsonl").write_text("{}\n")
    directory = written(tmp_path / "tasks", json.dumps({**GOOD, **change}))
    (directory / "questions.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError) as refused:
        read_tasks(directory)["own"].with_data(None)
    assert said in refused.value.line() and "\n" not in refused.value.line()


@pytest.mark.parametrize(
    "text",
    [
        "task: own\ndoc_to_text: !function utils.run\n",
        "task: own\ndoc_to_text: !!python/object/apply:os.system [id]\n",
        "a: &a [x, x]\nb: [*a, *a]\n",
        "- a list\n",
        "task: [unclosed\n",
    ],
)
def test_tags_that_run_code_and_what_is_no_yaml_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_tasks(written(tmp_path / "tasks", text))
    assert "own.yaml" in refused.value.line() and "\n" not in refused.value.line()


def test_an_include_gives_what_the_file_does_not_say_itself(tmp_path: Path) -> None:
    directory = written(tmp_path / "tasks", json.dumps(GOOD))
    written(directory, "include: own.yaml\ntask: other\ndoc_to_target: other\n", "other.yaml")
    found = read_tasks(directory)
    assert found["other"].config == {**GOOD, "task": "other", "doc_to_target": "other"}


def test_files_that_include_each_other_many_times_are_read_once(tmp_path: Path) -> None:
    """Otherwise 4 ** 30 readings."""
    directory = written(tmp_path / "tasks", json.dumps(GOOD))
    for number in range(30):
        below = "own.yaml" if number == 0 else f"{number - 1}.yaml"
        written(directory, f"include: [{', '.join([below] * 4)}]\ntask: task_{number}\n", f"{number}.yaml")
    assert read_tasks(directory)["task_29"].config == {**GOOD, "task": "task_29"}


def test_data_below_the_users_directory_come_first(tmp_path: Path) -> None:
    directory = written(tmp_path / "tasks", json.dumps(GOOD))
    (task,) = read_tasks(directory).values()
    with pytest.raises(ConfigError, match="are not there"):
        task.with_data(None)
    (directory / "questions.jsonl").write_text("{}\n")
    (tmp_path / "data").mkdir()
    beside = task.with_data(tmp_path / "data")["dataset_kwargs"]["data_files"]["test"]
    (tmp_path / "data" / "questions.jsonl").write_text("{}\n")
    below = task.with_data(tmp_path / "data")["dataset_kwargs"]["data_files"]["test"]
    assert beside == str(directory / "questions.jsonl") and below == str(tmp_path / "data" / "questions.jsonl")


def test_the_shipped_tasks_are_data_that_is_there() -> None:
    found = read_tasks(SHIPPED)
    assert len(found) == 6 and all(task.with_data(None) for task in found.values())
