"""A profile is optional: a disk that cannot take it costs the profile and not the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kha_train import compose
from kha_train.config.validate import validate
from kha_train.distributed import World
from kha_train.errors import ConfigError
from kha_train.telemetry.profiler import Profiler


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    warnings: list[str] = []
    config = compose(["profile.first_step=1", "profile.last_step=2"])
    profiler = Profiler(config, tmp_path, World.single(), warnings.append)
    for step in (1, 2, 3):
        with profiler.over(step):
            torch.ones(step).sum()
    profiler.close()
    (told,) = warnings
    assert "profile/steps-1-2" in told and "File exists" in told


def test_a_profile_that_a_rewind_cuts_short_begins_anew(tmp_path: Path) -> None:
    profiler = Profiler(compose(["profile.first_step=3", "profile.last_step=4"]), tmp_path, World.single(), print)
    for step in (1, 2, 3, 2, 3, 4, 5):
        with profiler.over(step):
            torch.ones(2).sum() if step != 2 else torch.ones(2).prod()
    profiler.close()
    (listed,) = (tmp_path / "profile").glob("*.txt")
    assert listed.name == "steps-3-4.txt"
    assert "aten::sum" in listed.read_text() and "aten::prod" not in listed.read_text()


def test_a_profile_of_more_steps_than_memory_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="too many steps") as refused:
        validate(compose(["profile.first_step=10", "profile.last_step=100"]))
    assert refused.value.fix == "profile.last_step=59"
