"""The name of a run without a given name, also used for its directory and on W&B. It depends on the settings, never on
the clock.

    gqa-s0    kha_mlp-s3-small    mla-knocking_linear-s0    gqa-s0-lr0.001-steps400    kha_mlp-s0-shards-5f1c09ab

It contains attention, seed, presets, then each setting that differs from its presets and that a resumed run may not
change, by value and not by spelling. So a command that may continue a run finds it, and any other command gets its own
directory. `resume.allow_changes` is ignored: to continue with other settings, give `run.dir`. A digest of all of it
follows if the text alone is not complete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from kha_train.config.build import flatten, to_plain, without_places, without_seeds
from kha_train.config.constants import FREE_TO_CHANGE, may_differ
from kha_train.config.schema import RunConfig
from kha_train.errors import KhaError

AUTO = "auto"
"""The value of `run.name` that stands for this name."""
MAX_LENGTH = 60
PLACES = ("data.train", "data.validation", "data.sources", "run.init_from", "run.branch_from")
"""Paths that a run may change, because data are compared by content; a new run with other paths gets another name."""
FIRST = ("optim.lr", "optim.weight_decay", "run.steps")
"""The most frequently varied settings come first, because a name may lack room for others."""
UNTOLD = ("run.seed", "run.name", "run.dir", "attention.name")
PLAIN = re.compile(r"[a-z0-9_.+]+|[0-9.]+e-[0-9]+")
"""Values that stay distinct as part of a file name, even on file systems that ignore case."""

Composed = Callable[[list[str]], Mapping[str, Any]]


def run_name(overrides: Sequence[str], groups: Container[str], config: RunConfig, composed: Composed) -> str:
    """The name of the run of `overrides`, which compose to `config`; `groups` are the groups of presets, and `composed`
    gives the values of the presets among `overrides`, or of fewer.
    """
    typed = {_key(text): text for text in overrides}
    presets = {key: text for key, text in typed.items() if key.partition("@")[0] in groups}
    settings = typed.keys() - presets.keys()
    now = tidy(flatten(to_plain(config)))
    before = tidy(flatten(composed(list(presets.values())))) if settings else now
    told = {key: now[key] for key in now if any(_within(key, name) for name in settings) and _counts(key, before, now)}
    chosen = {key: text.partition("=")[2] for key, text in presets.items() if _distinguishes(key, presets, composed)}
    head = [config.attention.name, *(name for key, name in chosen.items() if key.startswith("interaction"))]
    further = [chosen[key] for key in sorted(chosen) if not key.startswith(("attention", "interaction"))]
    order = sorted(told, key=lambda key: (key not in FIRST, key))
    parts = [*head, f"s{config.run.seed}", *further, *(_told(key, told[key], now) for key in order)]
    parts = list(filter(None, dict.fromkeys(parts)))
    plain = re.sub(r"[^A-Za-z0-9_.+-]", "_", _shortened(parts))
    if plain == "-".join(parts) and all(key not in PLACES and PLAIN.fullmatch(_text(told[key])) for key in told):
        return plain
    digest = hashlib.sha256(json.dumps([parts, told], sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{plain}-{digest}"


def old_name(config: RunConfig) -> str:
    """The name that older releases, whose names had no settings, gave every run."""
    return f"{config.attention.name}-s{config.run.seed}"


def at_home(config: RunConfig, overrides: Sequence[str], load: Callable[[Path], Mapping[str, Any]]) -> RunConfig:
    """`config`, composed from `overrides`, with the name that its run began with. Without a given directory, it uses
    that of an older release, whose names had no settings, if the same run is there. `load` reads a saved configuration.
    """
    keys, run = {_key(text) for text in overrides}, config.run
    if "run.name" in keys:
        return config
    place = run.dir
    if "run.dir" not in keys and not Path(run.dir).exists() and run.dir.endswith(run.name):
        place = run.dir.removesuffix(run.name) + old_name(config)
    try:
        saved = load(Path(place) / "config.yaml")
    except KhaError:
        return config
    name = saved.get("run", {}).get("name")
    if not isinstance(name, str) or not name or (place != run.dir and differing(saved, config)):
        return config
    return replace(config, run=replace(run, dir=place, name=name))


def differing(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """The settings that make `config` a different run from the `saved` one, without looking at the data."""
    before, now = tidy(without_places(saved)), tidy(without_places(to_plain(config)))
    return [key for key in sorted(before.keys() | now.keys()) if _counts(key, before, now)]


def tidy(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `flat`, by dotted keys, with each path spelled in one way, and each seed that is `run.seed` null."""
    paths = {key: _path(flat[key]) for key in PLACES if isinstance(flat.get(key), str)}
    sources = [
        source | {"path": _path(source["path"])} if isinstance(source.get("path"), str) else source
        for source in flat.get("data.sources") or []
    ]
    return {**without_seeds(flat), **paths, "data.sources": sources}


def _path(text: str) -> str:
    """`a/b`, also for `./a/b/`; addresses of a store keep their slashes."""
    return text.rstrip("/") if "://" in text or not text else str(PurePosixPath(text))


def _counts(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the setting `key` differs and distinguishes runs."""
    if key in UNTOLD or before.get(key) == now.get(key):
        return False
    return key in PLACES or not may_differ(key, FREE_TO_CHANGE, before, now)


def _distinguishes(key: str, presets: Mapping[str, str], composed: Composed) -> bool:
    """Whether the preset of the group `key` changes something that the name does not show without it."""
    group = key.partition("@")[0]
    if group in ("attention", "experiment"):
        return group == "experiment"
    # The default of a group is what the other presets, or none of them, make of it.
    is_alone = group != "interaction" and "experiment" not in presets
    before = flatten(composed([] if is_alone else [text for name, text in presets.items() if name != key]))
    now = flatten(composed(list(presets.values())))
    section = {"interaction": "attention.interaction"}.get(group, group)
    return any(_within(name, section) and _counts(name, before, now) for name in now)


def _shortened(parts: Sequence[str]) -> str:
    """As many of `parts` as fit into a name, joined."""
    fitting = max(
        count for count in range(1, len(parts) + 1) if count == 1 or len("-".join(parts[:count])) <= MAX_LENGTH
    )
    return "-".join(parts[:fitting])[:MAX_LENGTH].strip(".-")


def _told(key: str, value: Any, now: Mapping[str, Any]) -> str:
    """A setting as part of a name: the shortest unique end of its key, and its value. For `data.train` it is the last
    informative folder, for other paths the last word of the key, and nothing for validation data: the digest
    distinguishes them.
    """
    if key in PLACES:
        folders = [part for part in PurePosixPath(str(value)).parts if part not in ("train", "/")]
        return {"data.train": "".join(folders[-1:]), "data.validation": ""}.get(key, key.rpartition(".")[2])
    words = key.split(".")
    if words[-1] == "name":
        words.pop()
    ending = next(
        (end for count in range(1, len(words)) if _is_alone(end := ".".join(words[-count:]), now)), ".".join(words)
    )
    return f"{ending}{_text(value)}"


def _is_alone(ending: str, now: Mapping[str, Any]) -> bool:
    return sum(f".{name.removesuffix('.name')}".endswith(f".{ending}") for name in now) == 1


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "_".join(map(_text, value))
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}" if abs(value) < 1e15 else str(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _within(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
