"""The configuration and facts of each attempt of a run, so that every line of a curve can be judged by its own attempt.

They are stored in `run.json`. The first attempt's facts are the `provenance`; each later attempt lists differing facts
as `changed`. One attempt holds its whole configuration and later ones hold the difference from it, so the file stays
small after hundreds of restarts of one command. Attempts of older releases hold no configuration. `config.yaml` still
has that of the last of them; the next start moves it into `run.json` before overwriting the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kha_train.config.build import flatten, nested
from kha_train.config.compose import load_plain
from kha_train.config.saved import SavedConfig, completed
from kha_train.foreign.typed import Source
from kha_train.record.reader import RUN_FILE, read_run

CONFIG_FILE = "config.yaml"
CONFIG = "config"
"""The field of an attempt in `run.json` that holds its configuration."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run directory.

    `facts` is its provenance (`data_content_id`, `dtype`, ...). `config` is its configuration as nested plain values,
    or None where it was not recorded: an older release kept only that of the last start.
    """

    number: int
    start_step: int
    world_size: int | None
    facts: dict[str, Any]
    config: dict[str, Any] | None


def read_attempts(run_dir: Path) -> dict[int, Attempt]:
    """Every attempt of the run in `run_dir`, by number. Raises DataError when `run.json` or `config.yaml` is
    damaged.
    """
    run, source = read_run(run_dir), Source(str(run_dir / RUN_FILE))
    entries = run.get("attempts", [])
    configs, finished = {}, {}
    for number, config in recorded_configs(entries).items():
        # Restarts of one command share a configuration, and completing it takes milliseconds.
        if id(config) not in finished:
            finished[id(config)] = completed(source.read(SavedConfig, config, f"attempts[{number - 1}].{CONFIG}"))
        configs[number] = finished[id(config)]
    if entries and entries[-1]["attempt"] not in configs:
        last = load_plain(run_dir / CONFIG_FILE)
        configs |= {entries[-1]["attempt"]: last} if last else {}
    provenance = run.get("provenance", {})
    return {
        entry["attempt"]: Attempt(
            number=entry["attempt"],
            start_step=entry["start_step"],
            world_size=entry.get("world_size"),
            facts={**provenance, **entry.get("changed", {})},
            config=configs.get(entry["attempt"]),
        )
        for entry in entries
    }


def config_of(attempts: Mapping[int, Attempt], number: int | None) -> dict[str, Any] | None:
    """The configuration of attempt `number`. Its data paths are those of the last attempt that read the same data,
    because the data may have moved since. None where the configuration was not recorded.
    """
    attempt = attempts.get(number) if number is not None else None
    if attempt is None or attempt.config is None:
        return None
    content_id = attempt.facts.get("data_content_id")
    alike = [one for one in attempts.values() if one.config and one.facts.get("data_content_id") == content_id]
    newest = alike[-1].config or {}
    return {**attempt.config, "data": _moved(attempt.config.get("data", {}), newest.get("data", {}))}


def recorded_configs(entries: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """The configurations in `run.json`, by attempt number. Attempts with the same configuration share one object."""
    configs: dict[int, dict[str, Any]] = {}
    for entry in entries:
        kept = entry.get(CONFIG, {})
        if "whole" in kept:
            configs[entry["attempt"]] = kept["whole"]
        elif kept.get("like") in configs and not (kept["changed"] or kept["without"]):
            configs[entry["attempt"]] = configs[kept["like"]]
        elif kept.get("like") in configs:
            values = {key: value for key, value in flatten(configs[kept["like"]]).items() if key not in kept["without"]}
            configs[entry["attempt"]] = nested({**values, **kept["changed"]})
    return configs


def config_entry(entries: Sequence[Mapping[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """How to store `config`, without secrets, for the next attempt: whole, or as the difference from an attempt in
    `entries`.

    The difference is always relative to an attempt that holds its whole configuration, so there are no chains of
    differences.
    """
    whole = [entry for entry in entries if "whole" in entry.get(CONFIG, {})]
    if not whole:
        return {"whole": config}
    before, now = flatten(whole[-1][CONFIG]["whole"]), flatten(config)
    changed = {key: value for key, value in now.items() if key not in before or before[key] != value}
    without = sorted(before.keys() - now.keys())
    if len(changed) + len(without) > len(now) // 2:
        return {"whole": config}
    return {"like": whole[-1]["attempt"], "changed": changed, "without": without}


def _moved(data: Mapping[str, Any], newest: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `data` with the paths of the `newest`, where both name one dataset, or sources with the same
    names.
    """
    own, later = data.get("sources") or [], newest.get("sources") or []
    if bool(own) != bool(later):
        return dict(data)
    paths = {source.get("name"): source.get("path") for source in later}
    moved = [{**source, "path": paths.get(source.get("name"), source.get("path"))} for source in own]
    return {**data, **{key: newest[key] for key in ("train",) if key in newest}, "sources": moved}
