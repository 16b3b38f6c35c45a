"""Kernels in Triton's interpreter: values against plain twins, and the contract of attention on kernels.

The interpreter is chosen when a kernel's file is imported, so these suites run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: it exists for Linux alone"),
]


def run_interpreted(*arguments: str) -> int:
    """Run tests with the interpreter on; the answer is how many passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout[-6000:] + answer.stderr[-2000:]
    return int(answer.stdout.rpartition(" passed")[0].split()[-1])


@pytest.mark.quick
def test_a_case_of_each_kernel_gives_what_its_plain_twin_gives() -> None:
    perceptron = "test_values.py::test_the_perceptron_takes_any_number_of_rows[33]"
    rotation = "test_values.py::test_norm_and_rotation_take_any_number_of_rows[17]"
    experts = "test_experts.py::test_experts_by_kernels_equal_the_loop_and_their_gradients_too[spread-2-dtype0]"
    chosen = "tests/model/test_kernel_choice.py::test_every_kernel_passes_the_comparison_that_precedes_its_selection"
    assert run_interpreted(*(f"tests/model/kernels/{name}" for name in (perceptron, rotation, experts)), chosen) == 4


def test_kernels_give_the_values_and_gradients_of_their_plain_twins() -> None:
    assert run_interpreted("tests/model/kernels/test_values.py", "tests/model/kernels/test_experts.py") >= 100


def test_attention_on_kernels_keeps_the_contract() -> None:
    assert run_interpreted("tests/contract/test_contract.py", "-k", "triton", "-m", "") >= 85
