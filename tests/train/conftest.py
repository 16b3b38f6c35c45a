"""Runs that tests of the trainer share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kha_train import compose
from kha_train.train.run import train


@pytest.fixture(scope="module")
def trained(
    small: list[str], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`trained(*overrides)` trains a run with the settings `SMALL` of the module in a directory of its own, which it
    returns.
    """

    def make(*overrides: str) -> Path:
        run_dir = tmp_path_factory.mktemp("run") / "run"
        train(compose([*small, *request.module.SMALL, *overrides, f"run.dir={run_dir}"]))
        return run_dir

    return make
