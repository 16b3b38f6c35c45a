"""Plain facts about the device a process computes on, for `config.resolve`, and what runs there."""

from __future__ import annotations

import torch

from kha_train.config.resolve import Device, Precision, Resolved, interpreted, lacks_here, resolve
from kha_train.config.schema import RunConfig
from kha_train.model.attention.backends import FLASH, flash_problem
from kha_train.model.moe.megablocks import missing_packages

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The dtype of parameters and activations."""


def resolve_on(config: RunConfig, device: torch.device) -> Resolved:
    """What `config` resolves to on `device` of this machine. Raises as `resolve`."""
    return resolve(config, device_facts(device))


def device_facts(device: torch.device) -> Device:
    """The facts of `device` and of the installed packages."""
    if device.type != "cuda":
        return Device("cpu", interpreted=interpreted(), lacks=lacks)
    capability = torch.cuda.get_device_capability(device)
    return Device("cuda", capability, torch.version.hip is None, interpreted(), lacks)


def lacks(package: str) -> str | None:
    """Why `triton`, `megablocks` or the package of an attention backend cannot be used in this process, or None."""
    if package in FLASH:
        return flash_problem(package)
    if package == "megablocks":
        names = missing_packages()
        return f"not installed: {', '.join(names)}" if names else None
    return lacks_here(package)
