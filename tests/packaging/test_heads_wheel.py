"""The wheel kha-heads: built from the room, it works where the trainer cannot be imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOM = Path(__file__).resolve().parents[2] / "kha_train" / "heads"

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
sys.modules["kha_train"] = None  # an import of it is an error
import kha_heads, torch
assert "safetensors" not in sys.modules
from torch import nn
class LlamaAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.head_dim, self.num_key_value_groups = 4, 2
        self.q_proj, self.o_proj = nn.Linear(8, 16), nn.Linear(16, 8)
        self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
model = nn.Sequential(LlamaAttention())
kha_heads.save(kha_heads.insert(model, "kha_linear"), "out")
x = torch.randn(3, 8)
before = model[0].v_proj(x)
kha_heads.fold(model)
assert torch.equal(model[0].v_proj(x), before)
kha_heads.load(model, "out")
print(kha_heads.__file__)
"""


def test_the_wheel_of_heads_works_without_the_trainer(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOM, source, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("kha_heads-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        packages = {name.partition("/")[0] for name in archive.namelist()}
        modules = {Path(name).name for name in archive.namelist() if name.startswith("kha_heads/")}
        metadata = archive.read("kha_heads-0.1.0.dist-info/METADATA").decode()
        archive.extractall(site)
    assert packages == {"kha_heads", "kha_heads-0.1.0.dist-info"}
    assert modules == {path.name for path in ROOM.glob("*.py")}
    assert "Requires-Dist: torch" in metadata and "insert(model, " in metadata
    # Without `site`, the .pth file of an editable checkout is not followed.
    paths = f"import sys; sys.path[:0] = [{str(site)!r}, {sysconfig.get_paths()['purelib']!r}]\n"
    command = [sys.executable, "-I", "-S", "-c", paths + PROGRAM]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(site / "kha_heads" / "__init__.py")
