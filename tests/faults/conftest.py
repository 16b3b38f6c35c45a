"""Runs that are killed, damaged and restarted in their own directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train.checkpoint.layout import candidates
from kha_train.checkpoint.reader import verify
from kha_train.record import read_events, read_metrics, read_run, timing_keys

RUN = Path("runs/one")


class Runs:
    """One run directory, its command and its content. `where` holds `runs/one`, like every twin's."""

    def __init__(self, where: Path, overrides: list[str], serve: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.where, self.overrides, self._serve = where, overrides, serve
        self.run_dir, self.log = where / RUN, where / "log"
        where.mkdir(parents=True, exist_ok=True)

    def start(self, *faults: dict[str, Any], ranks: int = 1, overrides: tuple[str, ...] = (), **more: Any) -> list[Any]:
        """The exit code of every rank."""
        request = {"cwd": str(self.where), "overrides": [*self.overrides, *overrides], "ranks": ranks, "faults": faults}
        return self._serve({**request, "log": str(self.log), **more})["codes"]

    def to_the_end(self, ranks: int = 1, overrides: tuple[str, ...] = ()) -> None:
        """Run without faults; it must succeed."""
        assert self.start(ranks=ranks, overrides=overrides) == [0] * ranks, self.log.read_text()

    def curve(self) -> list[dict[str, Any]]:
        """The surviving curve without what depends on the clock."""
        lines, timings = read_metrics(self.run_dir), timing_keys(read_run(self.run_dir))
        return [{key: value for key, value in line.items() if key not in timings} for line in lines]

    def final_state(self) -> dict[str, str]:
        """File name -> SHA-256 of the newest checkpoint."""
        return {name: entry.sha256 for name, entry in verify(self.newest()).contents.files.items()}

    def newest(self) -> Path:
        """The directory of the newest checkpoint."""
        return candidates(self.run_dir / "checkpoints")[0][1]

    def equals(self, twin: Runs) -> bool:
        """Equal curves and equal final states, bit for bit."""
        return self.curve() == twin.curve() and self.final_state() == twin.final_state()

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What happened of one kind."""
        return [event for event in read_events(self.run_dir) if event["kind"] == kind]

    def starts(self) -> list[int]:
        """The step each attempt began after."""
        return [attempt["start_step"] for attempt in read_run(self.run_dir)["attempts"]]


@pytest.fixture(scope="session")
def make_run(
    tmp_path_factory: pytest.TempPathFactory, small: list[str], serve: Callable[..., Any]
) -> Callable[..., Runs]:
    """`make_run(*overrides, steps=6)`: a fresh run that saves every second step."""

    def make(*overrides: str, steps: int = 6) -> Runs:
        common = ["run.name=one", f"run.dir={RUN}", f"run.steps={steps}"]
        common += ["checkpoint.every_steps=2", "validation.every_steps=4"]
        return Runs(tmp_path_factory.mktemp("run"), [*small, *common, *overrides], serve)

    return make


@pytest.fixture(scope="session")
def straight(make_run: Callable[..., Runs]) -> Callable[..., Runs]:
    """`straight(*overrides, steps=6, ranks=1)`: the same run, never interrupted; made once per session."""
    made: dict[Any, Runs] = {}

    def get(*overrides: str, steps: int = 6, ranks: int = 1) -> Runs:
        key = (overrides, steps, ranks)
        if key not in made:
            made[key] = make_run(*overrides, steps=steps)
            made[key].to_the_end(ranks)
        return made[key]

    return get
