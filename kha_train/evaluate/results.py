"""The saved results of `kha eval`: a strict JSON file per checkpoint, `<run.dir>/evaluation/step-XXXXXXXX.json`.

Only this file knows their format. A result holds the SHA-256 of its checkpoint's manifest: after a checkpoint of the
same step took its place, the result is stale. Figures of later calls are added to those that are there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kha_train.checkpoint.layout import step_name
from kha_train.evaluate.harness_results import TaskResult
from kha_train.foreign.documents import parse_json
from kha_train.foreign.files import read_regular
from kha_train.foreign.typed import Source
from kha_train.record.files import replace_json
from kha_train.record.jsonl import decode

SCHEMA = 1
"""The version of the format. A file of another version is replaced."""
FOLDER = "evaluation"
"""The directory of the results, inside the run directory."""
MAX_BYTES = 2**26
_FIX = "remove it; `kha eval` makes it again"


@dataclass(frozen=True)
class HarnessResult:
    """The result of a task of lm-evaluation-harness, and how it came about: the first `limit` documents (0: all), the
    id `prefix` before a text that nothing precedes, the `harness` by name and version."""

    result: TaskResult
    limit: int
    prefix: int
    harness: str


@dataclass(frozen=True)
class Evaluation:
    """The figures of a model. `step` and `manifest` name its checkpoint (None for an export). `entries` are those of
    our own tasks, by the names they have in the record; `scored` says what each is of, by what its entries begin with;
    `harness` are those of the harness, by task."""

    schema: int
    made_by: str
    step: int | None
    manifest: str | None
    entries: dict[str, float]
    scored: dict[str, dict[str, Any]]
    harness: dict[str, HarnessResult]

    def over(self, older: Evaluation | None) -> Evaluation:
        """With the figures of an `older` evaluation of the same checkpoint that this one does not have itself."""
        if older is None or older.manifest != self.manifest:
            return self
        # Of a task whose settings changed, no figure of the older settings stays.
        kept = {key: value for key, value in older.entries.items() if key.rpartition("/")[0] not in self.scored}
        return replace(
            self,
            entries={**kept, **self.entries},
            scored={**older.scored, **self.scored},
            harness={**older.harness, **self.harness},
        )


def path_of(run_dir: Path, step: int) -> Path:
    """The file of the checkpoint of `step`."""
    return run_dir / FOLDER / f"{step_name(step)}.json"


def read_evaluation(path: Path) -> Evaluation | None:
    """The result in the file `path`; None where there is none, or none of this version. Raises DataError when it is
    damaged, OSError when it cannot be read.
    """
    raw, source = read_regular(path, MAX_BYTES), Source(str(path), fix=_FIX)
    if raw is None:
        return None
    try:
        values = decode(parse_json(raw))
    except ValueError as error:
        raise source.fault("", f"not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        return None
    return source.read(Evaluation, values)


def save(run_dir: Path, evaluation: Evaluation) -> Path:
    """Writes an evaluation of a checkpoint to its file, over what is there of the same checkpoint; returns the path.
    Raises DataError when the file there is damaged, OSError.
    """
    assert evaluation.step is not None, "an export has no file"
    path = path_of(run_dir, evaluation.step)
    path.parent.mkdir(exist_ok=True)
    replace_json(path, asdict(evaluation.over(read_evaluation(path))))
    return path
