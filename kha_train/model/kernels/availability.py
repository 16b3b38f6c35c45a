"""Whether kernels written in Triton can run here. Needs no Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from kha_train.errors import ConfigError

OLDEST = (8, 0)
"""The oldest compute capability kernels are written for: the first with bfloat16."""


def interpreted() -> bool:
    """Whether Triton's interpreter is on (`TRITON_INTERPRET=1`): kernels then run on a CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps Triton's kernels from running on `device` with tensors of `dtype`, or None."""
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed (pip install triton, on Linux)"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, and this is {device.type}"
    if torch.version.hip is not None:
        return "was written for NVIDIA devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}, and this device has {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16, and parameters are {str(dtype).removeprefix('torch.')}"
    return None


def require(
    device: torch.device, dtype: torch.dtype, field: str = "engine.kernels", fix: str = "engine.kernels=torch"
) -> None:
    """Raises ConfigError, naming `field` and `fix`, when Triton's kernels cannot run on `device` in `dtype`."""
    reason = missing(device, dtype)
    if reason:
        raise ConfigError(reason, field=field, value="triton", fix=fix)
