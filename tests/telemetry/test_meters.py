"""Meters and throughput agree with exact arithmetic and with the kernel's own figures."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kha_train.telemetry import DataWait, MovingAverage, PeakMemory, Throughput
from kha_train.telemetry.throughput import measured_peak, tabulated_peak


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20))
def test_the_moving_average_is_the_weighted_mean_of_its_definition(values: list[float]) -> None:
    average = MovingAverage(0.75)
    for value in values:
        average.update(value)
    weights = [Fraction(3, 4) ** (len(values) - 1 - i) for i in range(len(values))]
    expected = sum(w * Fraction(v) for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert average.value == pytest.approx(float(expected), abs=1e-9)


def test_nonfinite_values_do_not_enter_the_average() -> None:
    average = MovingAverage()
    assert math.isnan(average.update(math.nan))
    average.update(2.0)
    assert average.update(math.inf) == 2.0


def test_the_data_wait_sums_the_blocks_and_starts_again_when_taken() -> None:
    now = iter([0.0, 1.5, 10.0, 10.25, 20.0, 21.0])
    wait = DataWait(clock=lambda: next(now))
    with wait.measured():
        pass
    with pytest.raises(StopIteration), wait.measured():
        raise StopIteration
    assert wait.take() == 1.75
    with wait.measured():
        pass
    assert wait.take() == 1.0


def test_the_peak_memory_of_a_cpu_grows_by_what_is_allocated_and_never_falls() -> None:
    # In a process of its own: the peak of the test session may be far above its present size.
    program = (
        "import torch; from kha_train.telemetry import PeakMemory\n"
        "memory = PeakMemory(torch.device('cpu')); before = memory.gib()\n"
        "held = torch.ones(2**27); grown = memory.gib(); del held\n"
        "print(before, grown, memory.gib(), memory.total_gib())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, grown, after = map(float, done.stdout.split()[:3])
    assert before + 0.4 < grown < before + 0.6
    assert after >= grown
    assert done.stdout.split()[3] == "None"


def config(peak_tflops: float) -> SimpleNamespace:
    return SimpleNamespace(telemetry=SimpleNamespace(peak_tflops=peak_tflops))


def test_mfu_is_flops_needed_over_flops_possible_on_all_ranks() -> None:
    throughput = Throughput(
        config(2.0), training_flops_per_token=3e9, world_size=4, device=torch.device("cpu"), dtype=torch.float32
    )
    assert throughput.peak.source == "telemetry.peak_tflops"
    assert throughput.rates(tokens=8192, seconds=8.0) == {
        "train/tokens_per_second": 1024.0,
        "train/mfu": pytest.approx(3e9 * 1024 / (4 * 2e12)),
    }


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H1000", None),
    ],
)
def test_the_peak_is_looked_up_by_the_devices_name(name: str, tflops: int | None) -> None:
    assert tabulated_peak(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_cpus_peak_is_measured_and_says_so() -> None:
    peak = measured_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < peak.flops_per_second < 1e14
    assert "measured 1024^3 float32 matrix product on cpu" in str(peak)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_measured_peak_is_below_its_data_sheet() -> None:
    device = torch.device("cuda", 0)
    known = tabulated_peak(torch.cuda.get_device_name(device))
    measured = measured_peak(device, torch.bfloat16).flops_per_second
    assert known is not None
    assert 0.4 * known < measured < known
    assert PeakMemory(device).gib() > 0.3
