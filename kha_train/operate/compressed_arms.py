"""Arms of a study whose runs begin with another arm's model, compressed as by `kha compress`.

The run of the other arm with the same seed is trained first. Its compressed weights are written to
`<study>/compressed/`, once for all arms that begin with them, and taken over by `run.init_from`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kha_train.analysis.studies import CompressedArm, ScaledStudy, Trial
from kha_train.config.compose import compose, quoted
from kha_train.errors import ConfigError
from kha_train.operate.sweep import Point
from kha_train.record.files import read_json
from kha_train.record.reader import read_run

FOLDER = "compressed"


def parent_of(scaled: ScaledStudy, trial: Trial, begins: CompressedArm) -> Trial:
    """The trial whose model `trial` begins with."""
    return Trial(begins.arm, scaled.scale.rates_of(begins.arm)[0], trial.seed)


def start_of(directory: Path, begins: CompressedArm, seed: int) -> Path:
    """The compressed run that trials of this seed begin with."""
    layers = begins.layers.replace(",", "_")
    return directory / FOLDER / f"{begins.arm}-{layers}-h{begins.kv_heads}-s{seed}"


def beginning(before: Sequence[str], begins: CompressedArm, start: Path) -> list[str]:
    """The settings by which a run goes on with the compressed model in `start`; `before` are those of its parent.

    Raises ConfigError where the parent's model cannot be compressed so.
    """
    # Inside the functions: studies are listed and shown without torch.
    from kha_train.decode.virtual_heads import compressed_config
    from kha_train.export.compress import heads_by_layer, layers_named, settings_of

    config = compose(before)
    layers = layers_named(begins.layers, config.model.layers)
    compressed = compressed_config(config, heads_by_layer(config, layers, begins.kv_heads))
    return [*settings_of(compressed), f"run.init_from={quoted(str(start))}"]


def able_to_begin(
    scaled: ScaledStudy,
    directory: Path,
    points: Mapping[Trial, Point],
    start: Sequence[Point],
    ended: Collection[Trial],
) -> list[Point]:
    """Those of `start` that begin from scratch, or with a run that has ended: its compressed model is then there. The
    others wait for it. `points` are all of the study.

    Raises as `compress_run`, and ConfigError where what is there was made of another run than that of today.
    """
    from kha_train.export.compress import ORIGIN_FILE, compress_run

    trials, found = {point.label: trial for trial, point in points.items()}, []
    for point in start:
        trial = trials[point.label]
        begins = scaled.arms[trial.arm].compresses
        if begins is None:
            found.append(point)
            continue
        parent = parent_of(scaled, trial, begins)
        if parent in ended:
            place, source = start_of(directory, begins, trial.seed), Path(points[parent].run_dir)
            origin = read_json(place / ORIGIN_FILE, dict[str, Any])
            if origin is None:
                compress_run(source, begins.layers, begins.kv_heads, place, _silent)
            elif origin.get("run_id") != read_run(source).get("run_id"):
                raise ConfigError(
                    f"was compressed from an earlier run in {source}",
                    field=point.label,
                    value=str(place),
                    fix="remove it and the runs that began with it; the study makes them again",
                )
            found.append(point)
    return found


@contextmanager
def _silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda amount: None
