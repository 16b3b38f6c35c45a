"""With a Python that lacks packages (no environment is active), every way to start prints one line with the fix."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kha_train.interpreter import NEEDED, complaint

ROOT = Path(__file__).resolve().parents[2]
BARE = [sys.executable, "-S"]
"""This Python without its site-packages: only the standard library."""
IMPORTED_AS = {"hydra-core": "hydra", "pyyaml": "yaml"}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With `python` a Python that has no packages, and no kha_train but what stands in the working directory."""
    bare = tmp_path / "bin" / "python"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "KHA_", "SLURM_"))}
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_ARRAY_TASK_ID": "0"}
    return {**kept, **job, "PATH": f"{bare.parent}:/usr/bin:/bin"}


WAYS = {
    "the module": ["python", "-m", "kha_train", "run.steps=1"],
    "one machine": ["launch/local.sh", "run.steps=1"],
    "one machine, told how many": ["env", "NPROC=2", "launch/local.sh", "run.steps=1"],
    "a job": ["bash", "launch/train.sbatch", "run.dir=nowhere"],
    "a job of a sweep": ["bash", "launch/sweep.sbatch", "points-0.json"],
    "a Hydra application": ["python", "launch/hydra_train.py", "run.steps=1"],
}


@pytest.mark.parametrize("way", WAYS)
def test_no_active_environment_is_one_line_that_says_what_to_do(way: str, environment: dict[str, str]) -> None:
    ended = subprocess.run(WAYS[way], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and "source .venv/bin/activate" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_python_that_does_not_see_the_package_is_told_so(environment: dict[str, str], tmp_path: Path) -> None:
    script = [str(ROOT / "launch" / "local.sh"), "run.steps=1"]
    ended = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "has no kha_train: activate" in ended.stderr


def test_no_python_at_all_is_told_so(environment: dict[str, str]) -> None:
    missing = {**environment, "KHA_PYTHON": "no-such-python"}
    script = [str(ROOT / "launch" / "local.sh"), "run.steps=1"]
    ended = subprocess.run(script, cwd=ROOT, env=missing, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "there is no no-such-python here: activate" in ended.stderr


def test_what_is_asked_for_is_what_the_package_depends_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [text.partition(">=")[0] for text in project["dependencies"]]
    assert list(NEEDED) == [IMPORTED_AS.get(name, name) for name in names]
    assert complaint() == ""


def test_an_older_python_is_told_which_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert "is Python 3.9, and 3.11 or newer is needed" in complaint()
