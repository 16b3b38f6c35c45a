"""Task files of lm-evaluation-harness, read as data: a fixed list of keys, and nothing that runs code.

The harness's own loader imports what a `!function` tag names, and its metrics may come from scripts. So files of other
people are read here: YAML without tags and aliases, known keys alone, metrics and data formats of a fixed list, and
data files below the directory of the task. Templates stay text; the harness renders them in a sandbox.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from kha_train.errors import ConfigError
from kha_train.foreign.documents import parse_yaml
from kha_train.foreign.files import read_regular
from kha_train.foreign.typed import short

SHIPPED = Path(__file__).parents[2] / "data_tools" / "eval_tasks"
"""The package's own tasks, beside it in a checkout and in an installation."""
FORMATS = ("csv", "json", "parquet", "text")
"""What `dataset_path` may be: readers of the `datasets` library, which run no code of the data."""
METRICS = (
    "acc",
    "acc_bytes",
    "acc_mutual_info",
    "acc_norm",
    "bits_per_byte",
    "brier_score",
    "byte_perplexity",
    "exact_match",
    "f1",
    "likelihood",
    "mcc",
    "perplexity",
    "word_perplexity",
)
"""Metrics of the harness's own code. It would load any other name as a script of the `evaluate` library."""
KEYS = frozenset(
    (
        "dataset_kwargs",
        "dataset_name",
        "dataset_path",
        "description",
        "doc_to_choice",
        "doc_to_decontamination_query",
        "doc_to_target",
        "doc_to_text",
        "fewshot_config",
        "fewshot_delimiter",
        "fewshot_split",
        "filter_list",
        "gen_prefix",
        "generation_kwargs",
        "include",
        "metadata",
        "metric_list",
        "num_fewshot",
        "output_type",
        "repeats",
        "should_decontaminate",
        "tag",
        "target_delimiter",
        "task",
        "task_alias",
        "test_split",
        "training_split",
        "validation_split",
    )
)
_METRIC_KEYS = frozenset(
    ("metric", "aggregation", "higher_is_better", "ignore_case", "ignore_punctuation", "ignore_numbers")
) | {"regexes_to_ignore"}
_MOST_BYTES = 1 << 20
_RUN_CODE = "if you trust whoever wrote it, let the harness read it: --run-code"


class TaskFile(NamedTuple):
    """The configuration of one task, from the file `path` below the directory `root`."""

    path: Path
    root: Path
    config: dict[str, Any]

    def with_data(self, data: Path | None) -> dict[str, Any]:
        """The configuration with absolute paths of data files: a file of that name below `data` if there is one, else
        beside the task. Raises ConfigError for one that is missing, or outside these directories.
        """
        given = self.config.get("dataset_kwargs")
        options = given if isinstance(given, dict) else {}
        files = options.get("data_files")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()) or len(options) > 1:
            problem = "needs data_files, with the file of each split, and nothing else"
            raise _refused(self.path, "dataset_kwargs", problem, given)
        placed = {split: str(self._place(split, name, data)) for split, name in files.items()}
        return {**self.config, "dataset_kwargs": {"data_files": placed}}

    def _place(self, split: str, name: str, data: Path | None) -> Path:
        """The data file `name` of `split`."""
        tops = [(data.resolve(), data / name)] if data else []
        tops.append((self.root, self.path.parent / name))
        for top, place in tops:
            if not place.resolve().is_relative_to(top):
                raise _refused(self.path, f"data_files {split}", f"leaves the directory {top}", name)
        there = [place for _, place in tops if place.is_file()]
        if not there:
            raise ConfigError(
                f"the data of the task {self.config['task']} are not there",
                field=f"{self.path} data_files {split}",
                value=name,
                allowed=" or ".join(str(place) for _, place in tops),
            )
        return there[0].resolve()


def read_tasks(directory: Path) -> dict[str, TaskFile]:
    """Every task in the YAML files of `directory`, by name.

    Raises ConfigError for the first file that is no data, naming it and what it asks for.
    """
    if not directory.is_dir():
        raise ConfigError("no such directory of tasks", field="include", value=str(directory))
    found: dict[str, TaskFile] = {}
    root = directory.resolve()
    known: dict[Path, dict[str, Any]] = {}
    for path in sorted(root.rglob("*.yaml")):
        config = _with_includes(path, root, (), known)
        if "task" not in config:
            continue
        name = config["task"]
        if not isinstance(name, str):
            raise _refused(path, "task", "is no name of one task", name)
        if name in found:
            raise _refused(path, "task", "another file has this name", name)
        _check(path, config)
        found[name] = TaskFile(path, root, config)
    return found


def _with_includes(path: Path, root: Path, seen: tuple[Path, ...], known: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """The mapping in `path`, over those that it includes. `known` has the files that were read, each once: files that
    include each other often would be read without end."""
    path = path.resolve()
    if path in known:
        return known[path]
    if not path.is_relative_to(root):
        raise _refused(path, "include", f"leaves the directory {root}", str(path))
    if path in seen:
        raise _refused(path, "include", "is a circle", str(path))
    try:
        config = parse_yaml(read_regular(path, _MOST_BYTES, ConfigError) or b"")
    except ValueError as error:
        raise ConfigError(f"is not plain data: {error}", field=str(path), fix=_RUN_CODE) from error
    if not isinstance(config, dict):
        raise _refused(path, "", "is no mapping, or not there", config)
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in includes if isinstance(includes, list) else [includes]:
        if not isinstance(name, str):
            raise _refused(path, "include", "is no path", name)
        merged |= _with_includes(path.parent / name, root, (*seen, path), known)
    known[path] = merged | config
    return known[path]


def _check(path: Path, config: dict[str, Any]) -> None:
    """Raises ConfigError for a key, a metric or a data format that is not of the fixed lists."""
    for key in config.keys() - KEYS:
        raise _refused(path, key, "this key is not read from task files", config[key], ", ".join(sorted(KEYS)))
    if config.get("dataset_path") not in FORMATS:
        raise _refused(path, "dataset_path", "is no format of files", config.get("dataset_path"), ", ".join(FORMATS))
    metrics = config.get("metric_list", [])
    for metric in metrics if isinstance(metrics, list) else [metrics]:
        if not isinstance(metric, dict) or metric.get("metric") not in METRICS:
            raise _refused(path, "metric_list", "is no metric of the harness", metric, ", ".join(METRICS))
        for key in metric.keys() - _METRIC_KEYS:
            raise _refused(path, f"metric_list {key}", "this key is not read", metric[key])


def _refused(path: Path, key: str, problem: str, value: object = None, allowed: str | None = None) -> ConfigError:
    return ConfigError(problem, field=f"{path} {key}".rstrip(), value=short(value), allowed=allowed, fix=_RUN_CODE)
