"""Plain Hydra submits what `kha sweep` submits."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kha_train.cli.main import run

ROOT = Path(__file__).resolve().parents[2]
SBATCH = '#!/bin/bash\nprintf \'%s\\n\' "$@" > "$FAKE/arguments"\necho 7\n'


@pytest.mark.slow
def test_the_launcher_and_the_command_submit_the_same_points_by_the_same_arguments(tmp_path: Path) -> None:
    grid = ["attention=gqa,kha_mlp", "run.seed=0,1", "run.name='a b'", "data.global_batch_size=12"]
    kha = [sys.executable, "-c", "from kha_train.cli.main import run; run()", "sweep", *grid, "--name=s", "--nodes=3"]
    hydra = [sys.executable, str(ROOT / "launch" / "hydra_train.py"), "-m", *grid, "hydra/launcher=kha_slurm"]
    hydra += ["hydra.launcher.name=s", "hydra.launcher.nodes=3"]
    answers = [_submitted(command, tmp_path / name) for name, command in {"kha": kha, "hydra": hydra}.items()]
    assert answers[0] == answers[1]
    arguments, points = answers[0]
    assert "--array=0-3" in arguments and "--nodes=3" in arguments
    assert len({point["run_dir"] for point in points}) == 4


def test_the_launcher_refuses_a_point_that_cannot_run_and_submits_none(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "hydra_train.py"), "-m", "model.kv_heads=2,3"]
    ended = _run([*command, "hydra/launcher=kha_slurm"], tmp_path)
    assert ended.returncode == 2 and "model.kv_heads" in ended.stderr
    assert not (tmp_path / "arguments").exists()


REFUSED = {
    "a grid": ("-m attention=gqa,kha_mlp", "kha sweep attention=gqa,kha_mlp --local"),
    "the long option": ("--multirun run.seed=0,1 hydra/launcher=basic", "kha sweep run.seed=0,1 --local"),
    "Hydra's own switch": ("hydra.mode=MULTIRUN run.seed=0,1", "kha sweep run.seed=0,1 --local"),
    "a directory for all": ("-m run.seed=0,1 run.dir=here", "kha sweep run.seed=0,1 --dir=here --local"),
    "a grid that is not called one": ("attention=gqa,kha_mlp", "kha sweep attention=gqa,kha_mlp --local"),
    "another launcher behind ours": (
        "-m hydra/launcher=kha_slurm hydra/launcher=basic run.seed=0,1",
        "kha sweep run.seed=0,1 --local",
    ),
    "a multirun in another spelling": ("hydra.mode='MULTIRUN' run.seed=3", "kha sweep run.seed=3 --local"),
    "axes of the sweeper": (
        "-m +hydra.sweeper.params.attention='gqa,kha_mlp' +hydra.sweeper.params={run.seed:'0,1'} run.steps=2",
        "kha sweep attention=gqa,kha_mlp run.seed=0,1 run.steps=2 --local",
    ),
    "a secret": ("run.name='api_key=canSECRETxyz123'", "holds a secret"),
    "a secret in Hydra's settings": ("hydra.job.name=https://u:canSECRETxyz123@h", "holds a secret"),
    "a launcher without -m": ("hydra/launcher=kha_slurm", "add -m"),
    "settings of a launcher without -m": ("hydra.launcher.nodes=2", "add -m"),
    "another configuration": ("--config-name other", "--config-name"),
    "what kha train refuses": ("attention=kha_mpl", "did you mean kha_mlp"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_hydra_takes_and_a_run_would_not_see_ends_with_2_and_the_command_to_type(
    case: str, tmp_path: Path
) -> None:
    arguments, word = REFUSED[case]
    ended = _run([sys.executable, str(ROOT / "launch" / "hydra_train.py"), *arguments.split()], tmp_path)
    assert ended.returncode == 2 and word in ended.stderr, ended.stderr
    assert not (tmp_path / "runs").exists()
    assert "canSECRETxyz123" not in ended.stderr + "".join(
        path.read_text() for path in tmp_path.rglob("*") if path.is_file()
    )


@pytest.mark.slow
def test_the_suggested_sweep_trains_every_point(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["attention=gqa,kha_mlp", "run.steps=1", "model.layers=1", *small]
    with pytest.raises(SystemExit) as ended:
        run(["train", "-m", *settings])
    assert ended.value.code == 2
    command = shlex.split(capfd.readouterr().err.partition("; fix: ")[2])
    with pytest.raises(SystemExit) as ended:
        run(command[1:])
    assert ended.value.code == 0, capfd.readouterr().err
    assert sorted(path.parent.name for path in Path("runs/attention").glob("*/DONE")) == ["gqa-s0", "kha_mlp-s0"]


def _submitted(command: list[str], folder: Path) -> tuple[list[str], list[dict]]:
    """What a stand-in for sbatch was given, without the folder's own name, and the points it was to read."""
    folder.mkdir()
    ended = _run(command, folder)
    assert ended.returncode == 0, ended.stderr
    arguments = (folder / "arguments").read_text().replace(str(folder), "").splitlines()
    return arguments, json.loads((folder / "runs" / "s" / "points-0.json").read_text())["points"]


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    # This tree before any that is installed, with Hydra's plugin in it.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "launch")]),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "FAKE": str(folder),
        "KHA_DEBUG": "",
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
