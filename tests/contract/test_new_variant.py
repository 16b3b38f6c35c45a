"""A new variant is one file, one preset and one registry line: the contract suite finds it by itself, and judges it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VARIANT = '''
from __future__ import annotations

from dataclasses import dataclass

from kha_train.model.attention.interaction import Interaction
from kha_train.model.init import Constant
from kha_train.variants.attention import InteractionOptions


@dataclass(frozen=True, kw_only=True)
class TemperOptions(InteractionOptions):
    """One gain for each head of the values."""

    def parameters(self, heads):
        """See `InteractionOptions.parameters`."""
        return heads.kv_heads + {miscounted}


class Temper(Interaction):
    """Every head of the values times its own gain."""

    def __init__(self, options, heads, way):
        super().__init__(options, heads, way)
        self.declare_parameter("gain", (heads.kv_heads,), Constant(1.0))

    def forward(self, q, k, v):
        """See `Interaction.forward`."""
        return q, k, v{leak} * self.gain[:, None]
'''
PLUGIN = """
from pathlib import Path

from kha_train.config import compose
from kha_train.variants.registry import INTERACTIONS, Variant

compose.shipped = lambda directory: Path(__file__).parent / directory
INTERACTIONS["temper"] = Variant("temper:Temper", "temper:TemperOptions")
"""


def run_suite(folder: Path, *, leak: str = "", miscounted: int = 0) -> subprocess.CompletedProcess[str]:
    """The contract suite, untouched, in a process where the variant is registered."""
    (folder / "temper.py").write_text(VARIANT.format(leak=leak, miscounted=miscounted))
    (folder / "register_temper.py").write_text(PLUGIN)
    presets = folder / "configs"
    subprocess.run(["cp", "-r", str(ROOT / "configs"), str(presets)], check=True)
    (presets / "interaction" / "temper.yaml").write_text("name: temper\n")
    suite = ROOT / "tests" / "contract" / "test_contract.py"
    options = ["-q", "-p", "register_temper", "-p", "no:cacheprovider", "-k", "temper", "-m", "not slow", "-rf"]
    path = f"{folder}:{ROOT}"
    return subprocess.run(
        [sys.executable, "-m", "pytest", str(suite), *options],
        cwd=ROOT, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_new_registration_is_covered_on_every_base_without_touching_the_suite(tmp_path: Path) -> None:
    answer = run_suite(tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert int(answer.stdout.rpartition(" passed")[0].split()[-1]) >= 50


@pytest.mark.slow
def test_a_variant_that_lets_tokens_see_later_ones_and_miscounts_is_found_out(tmp_path: Path) -> None:
    answer = run_suite(tmp_path, leak=".flip(1)", miscounted=1)
    assert answer.returncode == 1
    for promise in ("no_token_sees_a_later_one", "parameters_and_operations", "decoding_with_a_cache"):
        assert f"test_{promise}" in answer.stdout, answer.stdout
