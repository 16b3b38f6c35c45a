"""Which tasks of lm-evaluation-harness are chosen, and their data: files of this disk, in memory, without a cache.

The harness asks the `datasets` library for a dataset by the name it has on a hub. Here the same name is a directory
below the user's data (docs/evaluate.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kha_train.errors import ConfigError
from kha_train.evaluate.task_files import FORMATS

_ENDINGS = (".jsonl", ".json", ".parquet")
_NO_DATA = ("dataset_info.json", "dataset_infos.json")
"""Files beside the data that describe them, as hubs and the `datasets` library write them."""
_FOR_EXAMPLES = ("auxiliary_train", "dev", "train", "training")
"""Names of splits that examples come from."""


@dataclass(frozen=True)
class Choice:
    """Which tasks, and how: the first `limit` documents of each (0: all), with `shots` examples before a question
    (None: as the task says), data below the directory `data`, further tasks of the directory `include`.

    With `run_code`, Python of `include` and code that a model writes may run. `field` names the setting in errors.
    """

    tasks: tuple[str, ...]
    data: str = ""
    include: str = ""
    limit: int = 0
    shots: int | None = None
    run_code: bool = False
    field: str = "tasks"


class Splits(dict[str, Any]):
    """The splits of a dataset that are on this disk. A training split that is not there is empty: most tasks open it,
    and need it only for examples."""

    def __init__(self, splits: Mapping[str, Any], where: Callable[[str], str], empty: Any, field: str) -> None:
        super().__init__(splits)
        self.where, self._empty, self._field = where, empty, field
        self.absent: set[str] = set()

    def __missing__(self, split: str) -> Any:
        """An empty split for the training data. Raises ConfigError for another one."""
        if split not in _FOR_EXAMPLES:
            raise ConfigError("no such split on this disk", field=self._field, value=split, allowed=self.where(split))
        self.absent.add(split)
        return self._empty


def loader(choice: Choice, scratch: str, datasets: ModuleType) -> Callable[..., Splits]:
    """What stands for `datasets.load_dataset`: it reads files of this disk into memory."""
    original = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Splits:
        if path in FORMATS:
            kind, files = path, options.get("data_files")
            where = str(files)
        else:
            kind, files, where = _files_of(path, name, choice)
        splits = original(kind, data_files=files, cache_dir=scratch, keep_in_memory=True)
        return Splits(splits, lambda split: f"{where}/{split}.jsonl", datasets.Dataset.from_dict({}), choice.field)

    return load_dataset


def _files_of(path: str, name: str | None, choice: Choice) -> tuple[str, dict[str, list[str]], str]:
    """The format and files of each split of the dataset `path` and its part `name`, below the user's data; and where
    they lie. Raises ConfigError when there are none."""
    base = Path(choice.data or ".") / path
    folders = [base / name, base] if name else [base, base / "data", base / "default"]
    for folder in folders:
        for ending in _ENDINGS:
            files: dict[str, list[str]] = {}
            for file in sorted(folder.glob(f"*{ending}")):
                if file.name in _NO_DATA:
                    continue
                files.setdefault(file.name.removesuffix(ending).partition("-0")[0], []).append(str(file))
            if files:
                return ending.strip(".l") if ending == ".parquet" else "json", files, str(folder)
    raise ConfigError(
        f"the dataset {path}{f' ({name})' if name else ''} is not on this disk",
        field="data",
        value=choice.data or "not given",
        allowed=f"{folders[0]}/SPLIT.jsonl, .json or .parquet, such as {folders[0]}/test.jsonl",
        fix="docs/evaluate.md says how the data lie",
    )


@contextmanager
def silent(datasets: ModuleType) -> Iterator[None]:
    """Without the harness's remarks and the bars of `datasets`."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
