"""`kha checkpoint`: lists, verifies, prunes, marks and compares what a run has saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from kha_train.checkpoint.background import write
from kha_train.checkpoint.pieces import Piece
from kha_train.cli.checkpoint import app
from kha_train.distributed import World
from kha_train.errors import CheckpointError, ConfigError


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 2, 4, 6; the weights of step N are N everywhere."""
    for step in (2, 4, 6):
        values = torch.full((12,), float(step))
        pieces = [Piece("w", kind, (3, 4), 0, values) for kind in ("master", "exp_avg", "exp_avg_sq")]
        write(tmp_path, step, World.single(), pieces, {"bias": torch.zeros(2)}, {"progress": {"step": step}})
    return tmp_path


@pytest.fixture
def kha() -> Callable[..., Result]:
    """`kha(*arguments)`: `kha checkpoint ...` in this process; mistakes are raised."""
    return lambda *arguments: CliRunner().invoke(app, [str(word) for word in arguments], catch_exceptions=False)


def test_list_tells_steps_sizes_marks_and_damage(run_dir, kha) -> None:
    assert kha("keep", run_dir, 2).exit_code == 0
    (run_dir / "checkpoints" / "step-00000004" / "trainer.json").unlink()
    rows = json.loads(kha("list", run_dir, "--json").stdout)
    assert [(row["step"], row["kept"], row["ranks"]) for row in rows] == [(6, "", 1), (4, "", 0), (2, "marked", 1)]
    assert rows[0]["state"] == "sizes match" and "trainer.json" in rows[1]["state"]
    assert rows[0]["bytes"] == sum(path.stat().st_size for path in (run_dir / "checkpoints/step-00000006").iterdir())
    assert "marked" in kha("list", run_dir).stdout


def test_verify_reads_every_byte_and_names_the_file_that_changed(run_dir, kha) -> None:
    assert kha("verify", run_dir).stdout.count("whole") == 3
    path = run_dir / "checkpoints" / "step-00000004" / "optimizer-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="1 of 3"):
        kha("verify", run_dir)
    with pytest.raises(CheckpointError, match="1 of 1"):
        kha("verify", path.parent)
    assert kha("verify", run_dir / "checkpoints" / "step-00000006").exit_code == 0


def test_prune_only_says_what_would_go_until_told_to(run_dir, kha) -> None:
    kha("keep", run_dir, 2)
    names = {path.name for path in (run_dir / "checkpoints").glob("step-*[0-9]")}
    assert "step 4" in kha("prune", run_dir, "--keep-last", 1).stdout
    assert {path.name for path in (run_dir / "checkpoints").glob("step-*[0-9]")} == names
    kha("prune", run_dir, "--keep-last", 1, "--yes")
    assert {path.name for path in (run_dir / "checkpoints").glob("step-*[0-9]")} == names - {"step-00000004"}
    kha("keep", run_dir, 2, "--off")
    kha("prune", run_dir, "--keep-last", 1, "--yes")
    assert {path.name for path in (run_dir / "checkpoints").glob("step-*[0-9]")} == {"step-00000006"}


def test_diff_finds_nothing_between_layouts_and_everything_between_steps(run_dir, kha, tmp_path_factory) -> None:
    other = tmp_path_factory.mktemp("other")
    values = torch.full((12,), 6.0)
    halves = [
        Piece("w", kind, (3, 4), start, values[start : start + 6])
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for start in (0, 6)
    ]
    write(other, 6, World.single(), halves, {"bias": torch.zeros(2)}, {"progress": {"step": 6}})
    assert "equal" in kha("diff", run_dir, other).stdout
    found = json.loads(kha("diff", run_dir / "checkpoints/step-00000004", other, "--json").stdout)
    assert found["settings"] == {"progress.step": [4, 6]}
    assert found["tensors"]["w master"] == [2.0, 0.5] and "bias" not in found["tensors"]


def test_a_number_that_is_none_is_equal_to_itself_alone(kha, tmp_path_factory) -> None:
    """Also in lists of the trainer's state; and an infinite moment beside one leaves the others comparable."""

    def saved(values: list[float], state: list[float]) -> Path:
        folder = tmp_path_factory.mktemp("nan")
        pieces = [Piece("w", kind, (3,), 0, torch.tensor(values)) for kind in ("master", "exp_avg", "exp_avg_sq")]
        write(folder, 6, World.single(), pieces, {}, {"progress": {"step": 6}, "stability": {"losses": state}})
        return folder

    first = saved([math.nan, math.inf, 1.0], [math.nan, 2.0])
    assert "equal" in kha("diff", first, saved([math.nan, math.inf, 1.0], [math.nan, 2.0])).stdout
    found = json.loads(kha("diff", first, saved([math.nan, math.inf, 3.0], [math.nan, 2.5]), "--json").stdout)
    assert found["tensors"]["w master"][0] == 2.0 and found["settings"] == {
        "stability.losses": [[None, 2.0], [None, 2.5]]
    }
    assert kha("diff", first, saved([0.0, math.inf, 1.0], [math.nan, 2.0]), "--json").stdout.count("w master") == 1


def test_a_directory_without_checkpoints_is_a_mistake_told_by_name(tmp_path, run_dir, kha) -> None:
    for arguments in (("list", tmp_path / "no"), ("prune", tmp_path / "no"), ("keep", run_dir, 5)):
        with pytest.raises(ConfigError):
            kha(*arguments)
