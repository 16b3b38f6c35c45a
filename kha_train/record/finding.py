"""Resolves what a user names to run directories: runs, sweeps, folders of runs, globs that the shell did not expand."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kha_train.config.first_steps import quickstart_first
from kha_train.errors import ConfigError, KhaError
from kha_train.record.reader import METRICS_FILE, RUN_FILE
from kha_train.record.sweeps import load_sweep


def is_run(path: Path) -> bool:
    """Whether the directory `path` belongs to a run that has been started."""
    return any((path / name).is_file() for name in (RUN_FILE, METRICS_FILE))


def spelled_out(named: Sequence[Path]) -> list[Path]:
    """`named` with each glob replaced by its sorted matches. Existing paths, and globs without a match, stay."""
    found: list[Path] = []
    for path in named:
        matches = [] if path.exists() or not glob.has_magic(str(path)) else sorted(glob.glob(str(path)))
        found += [Path(match) for match in matches] or [path]
    return found


def runs_at(path: Path) -> list[Path]:
    """`path` if it is a run; otherwise the runs below it, in the order of a sweep's points or sorted.

    Does not search inside a run, and follows a link only to a run or a sweep. `path` itself may also be a run that was
    imported or compressed, and never started. Raises DataError for a damaged `sweep.json`.
    """
    if all((path / name).exists() for name in ("config.yaml", "checkpoints")):
        return [path]
    return list(_below(path, follow=True))


def find_runs(
    named: Sequence[Path],
    note: Callable[[str], None],
    *,
    files: bool = False,
    trained: bool = False,
    read: Callable[[Path], object] | None = None,
) -> list[Path]:
    """The runs among and below `named`, in that order, each once unless the run itself is named twice.

    `files`: a file counts, as a curve. `trained`: a run counts once it has recorded a step. Paths without a run are
    skipped; so are runs from a folder or a glob on which `read` fails. `note` receives a line about each. Raises
    ConfigError when nothing is found, and for a path that does not exist.
    """
    found: list[Path] = []
    below: set[Path] = set()
    passed_over: list[str] = []
    typed = {path.resolve() for path in named if is_run(path)}
    places = spelled_out(named)
    refuse_missing(places)
    # `*/` arrives here as `*`. If a glob matches folders too, only their runs count.
    matched_runs = any(path not in named and path.is_dir() for path in places)
    for path in places:
        if files and path.is_file() and (path in named or not matched_runs):
            found.append(path)
            continue
        runs = runs_at(path)
        if not runs:
            passed_over.append(f"{path}: {_why_none(path)}")
        for run in runs:
            if run != path or path not in named:
                # A folder named beside one of its runs adds the others; only typing a run twice is a mistake.
                if run.resolve() in typed | below:
                    continue
                below.add(run.resolve())
            if trained and not _has_steps(run):
                passed_over.append(f"{run}: it has not recorded a step yet")
            elif read is not None and run not in named and (fault := _fault(read, run)):
                passed_over.append(f"{run}: {fault}")
            else:
                found.append(run)
    if not found:
        raise none_found(named, "; ".join(passed_over))
    for text in passed_over:
        note(f"skipped: {text}")
    return found


def find_run(path: Path) -> Path:
    """The one run that `path` is or holds. Returns `path` itself where it holds none, or has checkpoints of its own,
    for the caller to judge. Raises ConfigError where it holds several.
    """
    if path.is_file() or (path / "checkpoints").is_dir():
        return path
    runs = [run for place in spelled_out([path]) for run in runs_at(place)]
    if len(runs) > 1:
        names = ", ".join(str(run) for run in runs[:8])
        raise ConfigError(f"holds {len(runs)} runs", field="run", value=str(path), fix=f"name one of them: {names}")
    return runs[0] if runs else path


def refuse_missing(places: Sequence[Path]) -> None:
    """Raises ConfigError for the first of `places` that does not exist: a misspelt name, or a glob without a match."""
    missing = [path for path in places if not path.exists()]
    if missing:
        raise none_found(missing[:1], _why_none(missing[0]))


def none_found(named: Sequence[Path], why: str = "") -> ConfigError:
    """The error when no run was found among `named`; it lists the runs nearby."""
    value = " ".join(str(path) for path in named)
    return ConfigError(f"no run here{f' ({why})' if why else ''}", field="run", value=value, fix=_neighbours(named))


def _below(path: Path, follow: bool) -> Iterator[Path]:
    if not path.is_dir():
        return
    if is_run(path):
        yield path
        return
    sweep = load_sweep(path)
    if sweep is not None:
        yield from (path / point["label"] for point in sweep["points"] if is_run(path / point["label"]))
        return
    if follow:
        try:
            children = sorted(child for child in path.iterdir() if child.is_dir())
        except PermissionError:
            return
        for child in children:
            yield from _below(child, follow=not child.is_symlink())


def _has_steps(run: Path) -> bool:
    lines = run / METRICS_FILE
    return lines.exists() and not (lines.is_file() and lines.stat().st_size == 0)


def _fault(read: Callable[[Path], object], run: Path) -> KhaError | OSError | None:
    try:
        read(run)
    except (KhaError, OSError) as error:
        return error
    return None


def _why_none(path: Path) -> str:
    if not path.exists():
        return "no such run directory"
    return "holds no run" if path.is_dir() else "is a file"


def _neighbours(named: Sequence[Path]) -> str:
    parents = dict.fromkeys(path.resolve().parent for path in named)
    for parent in parents:
        runs = [child.name for child in sorted(parent.glob("*")) if is_run(child)] if parent.is_dir() else []
        if runs:
            return f"runs found in {parent}: {', '.join(runs[:8])}"
    quickstart = [first for path in named if (first := quickstart_first(path))]
    return quickstart[0] if quickstart else "name a run.dir, a sweep, or a folder of runs"


def is_export(path: Path) -> bool:
    """Whether `path` holds a model as transformers has it, and no run."""
    return (path / "config.json").is_file()
