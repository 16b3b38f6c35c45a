"""Tokens per second and MFU, each with a stated denominator.

MFU = training FLOPs per token x tokens/s / (peak FLOP/s of one rank x ranks). The FLOPs are those the model needs:
neither recomputation nor a head interaction is counted, so that all variants have the same numerator. On a CPU the peak
is a measured matrix product: the figure gives the fraction of the machine's own best speed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from kha_train.config.schema import RunConfig
from kha_train.metric import Metric

BF16_PEAKS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bf16 peaks in FLOP/s from the vendors' data sheets (GB200 and B200: see configs/cluster/b200_1x8.yaml); the
first name contained in the device's name counts.
"""

METRICS = (
    Metric(
        "train/tokens_per_second",
        "tokens/s",
        "places of the global batch (`tokens` of the step) / train/step_seconds",
        timing=True,
    ),
    Metric(
        "train/mfu",
        "fraction",
        "training FLOPs per token x tokens/s / (peak FLOP/s of one rank x ranks); neither recomputation nor head "
        "interactions are counted",
        timing=True,
    ),
)
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Peak:
    """The maximum FLOP/s of one rank, and the source of the figure."""

    flops_per_second: float
    source: str

    def __str__(self) -> str:
        return f"{self.flops_per_second / 1e12:.3g} TFLOP/s a rank ({self.source})"


def peak_flops(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Peak:
    """`telemetry.peak_tflops` if set, else the table's value for this GPU in bf16, else a measured matrix product."""
    if config.telemetry.peak_tflops > 0:
        return Peak(config.telemetry.peak_tflops * 1e12, "telemetry.peak_tflops")
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = tabulated_peak(name)
        if known is not None:
            return Peak(known, f"data sheet of {name}, dense bf16")
    return measured_peak(device, dtype)


def tabulated_peak(device_name: str) -> float | None:
    """The data sheet's dense bf16 FLOP/s for a CUDA device name; None when it is not in the table."""
    words = device_name.replace("-", " ").split()
    for name, peak in BF16_PEAKS.items():
        if all(word in words for word in name.split()):
            return peak
    return None


def measured_peak(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> Peak:
    """The fastest of `repeats` square matrix products (2 n^3 FLOPs each) in the training dtype on `device`."""
    size = MATMUL_SIZE[device.type]
    left, right = torch.ones(2, size, size, device=device, dtype=dtype).unbind()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    kind = str(dtype).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    # The first product includes start-up costs.
    return Peak(2 * size**3 / min(seconds[1:]), f"measured {size}^3 {kind} matrix product on {device.type}{threads}")


class Throughput:
    """Turns the duration of a step into `train/tokens_per_second` and `train/mfu`."""

    def __init__(
        self,
        config: RunConfig,
        *,
        training_flops_per_token: float,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`training_flops_per_token` is the numerator of MFU per token, forward and backward."""
        self.peak = peak_flops(config, device, dtype)
        self.training_flops_per_token = training_flops_per_token
        self.world_size = world_size

    def rates(self, tokens: int, seconds: float) -> dict[str, float]:
        """The two metrics of a step that took `seconds` for `tokens` tokens of the whole global batch."""
        tokens_per_second = tokens / seconds if seconds > 0 else float("inf")
        mfu = self.training_flops_per_token * tokens_per_second / (self.peak.flops_per_second * self.world_size)
        return {"train/tokens_per_second": tokens_per_second, "train/mfu": mfu}
