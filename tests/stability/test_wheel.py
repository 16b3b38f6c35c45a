"""The package spike-score, built from the room and installed where nothing else is."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from kha_train.stability.document import document, plain
from tests.stability.curves import named

ROOM = Path(__file__).resolve().parents[2] / "kha_train/stability"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment without torch, numpy and kha_train that has the package."""
    place = tmp_path_factory.mktemp("spike-score")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(place), str(ROOM)], check=True, env={"PATH": "/usr/bin:/bin"})
    venv.create(place / "env", with_pip=False)
    (library,) = (place / "env/lib").glob("python*/site-packages")
    (wheel,) = place.glob("spike_score-*.whl")
    zipfile.ZipFile(wheel).extractall(library)
    return place / "env/bin/python"


def answer(python: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = "import sys; from spike_score.command import main; main(sys.argv[1:])"
    called = [str(python), "-I", "-c", program, *map(str, arguments)]
    return subprocess.run(called, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_package_scores_a_file_without_numpy_torch_and_kha_train(installed: Path, tmp_path: Path) -> None:
    missing = "import importlib.util as u; print([u.find_spec(n) for n in ('numpy', 'torch', 'kha_train')])"
    found = subprocess.run([str(installed), "-I", "-c", missing], capture_output=True, text=True, check=True)
    assert found.stdout == "[None, None, None]\n"
    rows, planned = named()["planned"]
    lines = ["step,loss,grad_norm,tokens,lr,samples_first,samples_last"]
    (tmp_path / "curve.csv").write_text("\n".join([*lines, *(",".join(map(repr, row)) for row in rows)]) + "\n")
    options = [word for step in planned for word in ("--planned", step)]
    scored = answer(installed, tmp_path / "curve.csv", "--json", *options)
    assert json.loads(scored.stdout) == plain(document(rows, planned)), scored.stderr
    # Without the planned step the higher level is an event that is still open.
    told = answer(installed, tmp_path / "curve.csv").stdout
    assert told == f"{tmp_path}/curve.csv: 0 spikes in 300 steps, 0 in 1,000 (0 to 12.3), 0 unrecovered, diverged\n"


@pytest.mark.slow
def test_the_package_refuses_with_one_line_what_is_no_curve(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "deep").write_text("[{" + '"a":[' * 100_000)
    for name in ("text", "deep", "absent", "."):
        refused = answer(installed, tmp_path / name)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith("spike-score: ") and refused.stderr.count("\n") == 1
