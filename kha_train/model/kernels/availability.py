"""Whether Triton kernels can run here. Needs no Triton."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from kha_train.config.resolve import Device, Precision, interpreted, require_triton, triton_problem


def device_facts(device: torch.device) -> Device:
    """The facts of `device` that matter for Triton."""
    if device.type != "cuda":
        return Device("cpu", interpreted=interpreted(), lacks=lacks)
    capability = torch.cuda.get_device_capability(device)
    return Device("cuda", capability, torch.version.hip is None, interpreted(), lacks)


def precision_of(dtype: torch.dtype) -> Precision:
    """Whether parameters of `dtype` count as fp32 or as bf16 (as all half precisions do)."""
    return "bf16" if dtype in (torch.bfloat16, torch.float16) else "fp32"


def lacks(package: str) -> str | None:
    """Why `package` cannot be imported here, or None."""
    return None if find_spec(package) else "not installed"


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run on `device` with tensors of `dtype`, or None."""
    return triton_problem(device_facts(device), precision_of(dtype))


def require(
    device: torch.device, dtype: torch.dtype, field: str = "engine.kernels", fix: str = "engine.kernels=torch"
) -> None:
    """Raises ConfigError, naming `field` and `fix`, when Triton's kernels cannot run on `device` in `dtype`."""
    require_triton(device_facts(device), precision_of(dtype), field, fix)
