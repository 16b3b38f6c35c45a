"""ZeRO 3 with another copy of the weights in groups of ranks computes the same as plain ZeRO 3."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train.config.compose import compose
from kha_train.config.validate_ranks import validate_batch
from kha_train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("threads_worker.py")


@pytest.mark.slow
def test_groups_of_two_among_four_ranks_change_nothing(
    small: list[str], clean_environment: dict[str, str], tmp_path: Path, curve: Callable[[Path], list[dict[str, Any]]]
) -> None:
    def trained(size: int) -> list[dict[str, Any]]:
        run_dir = tmp_path / str(size)
        settings = [*small, "model.layers=1", "engine=zero3", "engine.micro_batch_size=1", "run.steps=3"]
        settings += ["data.global_batch_size=4", f"engine.hpz_partition_size={size}", f"run.dir={run_dir}"]
        environment = {**clean_environment, "NPROC": "4", "KHA_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        subprocess.run(["bash", str(ROOT / "launch" / "local.sh"), *settings], env=environment, check=True, cwd=ROOT)
        return curve(run_dir)

    whole = trained(1)
    assert len(whole) == 3 and trained(2) == whole


@pytest.mark.slow
@pytest.mark.parametrize("engine", [("engine=zero1",), ("engine=zero3", "engine.hpz_partition_size=2")])
def test_no_thread_of_a_process_group_outlives_the_run(
    engine: tuple[str, ...], small: list[str], run_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """One that is alive when the interpreter ends may abort the process: "terminate called without an exception"."""
    settings = [*small, *engine, "model.layers=1", "engine.micro_batch_size=1", "data.global_batch_size=4"]
    settings += ["run.steps=3", f"run.dir={tmp_path / 'run'}"]
    answers = run_ranks(WORKER, 2, fresh=True, overrides=settings)
    assert answers == [{"finished": True, "threads": []}] * 2


def test_groups_need_zero_3_and_ranks_that_divide() -> None:
    with pytest.raises(ConfigError, match="ZeRO 3"):
        compose(["engine=zero2", "engine.hpz_partition_size=2"])
    config = compose(["engine=zero3", "engine.hpz_partition_size=4", "engine.micro_batch_size=1"])
    validate_batch(config, 8)
    with pytest.raises(ConfigError, match="hpz_partition_size"):
        validate_batch(config, 6)
