"""A profile is a luxury: a disk that does not take it costs the profile and not the run."""

from __future__ import annotations

from pathlib import Path

import torch

from kha_train import compose
from kha_train.distributed import World
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
