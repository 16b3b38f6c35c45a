"""The wheel is complete: installed away from the checkout it finds its configurations and trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the files that git knows: nothing that only lies about may get in, or be needed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in _tracked():
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    _run([*build, "-w", folder, source], cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `kha` command of a fresh environment that holds the wheel, and shares the dependencies of this one.

    Their directory is added by a .pth file, whose own .pth files (that of the editable checkout is among them) Python
    does not follow: the checkout stays out of sight.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    _run([sys.executable, "-m", "venv", folder], cwd=folder.parent)
    scheme = sysconfig.get_paths("venv", vars={"base": str(folder), "platbase": str(folder)})
    _run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], cwd=folder)
    (Path(scheme["purelib"]) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "kha"


def test_the_wheel_holds_packages_configurations_and_launch_scripts(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in _tracked():
        room = name.partition("/")[0]
        if room in ("kha_train", "data_tools", "configs", "launch"):
            assert (name if room in ("kha_train", "data_tools") else f"kha_train/{name}") in names
    assert "hydra_plugins/kha_slurm/__init__.py" in names and "hydra_plugins/__init__.py" not in names
    rooms = {"kha_train", "data_tools", "hydra_plugins", "kha_train-0.1.0.dist-info"}
    assert {name.partition("/")[0] for name in names} == rooms


def test_an_installed_wheel_finds_its_configurations_inside_itself(installed: Path, tmp_path: Path) -> None:
    program = (
        "import json, kha_train, data_tools; from kha_train.config.compose import compose, shipped; "
        "from kha_train.config.explain import explain; "
        "print(json.dumps([kha_train.__file__, data_tools.__file__, str(shipped('configs')), str(shipped('launch')), "
        "compose(['model=moe_6b']).model.layers, explain('optim.lr', [])[0].meaning]))"
    )
    output = _run([installed.parent / "python", "-c", program], cwd=tmp_path)
    *paths, layers, meaning = json.loads(output)
    assert all(path.startswith(str(installed.parents[1])) for path in paths)
    assert Path(paths[2]).name == "configs" and (Path(paths[3]) / "local.sh").is_file()
    assert layers == 18 and meaning == "peak learning rate"


def test_an_installed_wheel_trains_outside_the_checkout(
    installed: Path, small: list[str], dataset: Path, tmp_path: Path
) -> None:
    assert "quickstart" in _run([installed, "--help"], cwd=tmp_path)
    _run([installed, "train", *small, "attention=kha_mlp", "run.steps=2", "run.dir=run"], cwd=tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").is_file()


def test_an_installed_wheel_prints_the_scripts_of_a_sweep(installed: Path, tmp_path: Path) -> None:
    said = _run([installed, "sweep", "attention=gqa,kha_mlp", "seed=0,1", "--print"], cwd=tmp_path)
    for word in ("# 4 points", "sbatch --parsable", "--array=0-3", "#SBATCH --requeue", "train_in_allocation()"):
        assert word in said
    assert f"{installed.parents[1]}" in said.partition("sweep.sbatch")[0] and list(tmp_path.iterdir()) == []


def test_an_installed_wheel_gives_plain_hydra_its_launcher(installed: Path, tmp_path: Path) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 7\n")
    sbatch.chmod(0o755)
    program = (
        "import os, sys; from kha_train.config.compose import shipped; "
        "os.environ['PATH'] = sys.argv.pop(1) + ':' + os.environ['PATH']; "
        "script = sys.argv[0] = str(shipped('launch') / 'hydra_train.py'); "
        "import runpy; runpy.run_path(script, run_name='__main__')"
    )
    sweep = ["-m", "attention=gqa,kha_mlp", "hydra/launcher=kha_slurm", "hydra.launcher.name=two"]
    said = _run([installed.parent / "python", "-c", program, sbatch.parent, *sweep], cwd=tmp_path)
    assert "job 7, 2 of 2 points submitted" in said
    written = json.loads((tmp_path / "runs" / "two" / "points-0.json").read_text())
    assert [point["run_dir"] for point in written["points"]] == ["runs/two/gqa-s0", "runs/two/kha_mlp-s0"]


def _tracked() -> list[str]:
    """The files git knows that are there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def _run(command: list[str | Path], cwd: Path) -> str:
    """Its standard output; its errors are shown when it fails. Nothing of the checkout or of a launcher leaks in."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = list(map(str, command))
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
