"""The notebook for a first look runs from its first cell to its last, and shows what its text says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples/first_look.ipynb"


def test_the_notebook_is_stored_without_results() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5 and not [cell for cell in code if cell["outputs"] or cell["execution_count"]]


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs_and_shows_what_its_text_says(tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::FutureWarning", "-c", program]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "equal: True" in ended.stdout
    moved = [float(line.split()[-1]) for line in ended.stdout.splitlines() if " moved by " in line]
    assert len(moved) == 6 and min(moved) > 0.01
    added = [float(line.split()[-2]) for line in ended.stdout.splitlines() if line.endswith(" %")]
    assert added[0] == 0 and all(0 < value < 0.1 for value in added[1:])
