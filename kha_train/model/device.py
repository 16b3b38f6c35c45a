"""Plain facts about the device a process trains on, for `config.resolve`."""

from __future__ import annotations

from dataclasses import replace

import torch

from kha_train.config.resolve import Device
from kha_train.model.attention.backends import flash_attn_problem
from kha_train.model.kernels import availability
from kha_train.model.moe.megablocks import missing_packages


def device_facts(device: torch.device) -> Device:
    """The facts of `device` and of the installed packages."""
    return replace(availability.device_facts(device), lacks=lacks)


def lacks(package: str) -> str | None:
    """Why `triton`, `flash_attn` or `megablocks` cannot be used in this process, or None."""
    if package == "flash_attn":
        return flash_attn_problem()
    if package == "megablocks":
        names = missing_packages()
        return f"not installed: {', '.join(names)}" if names else None
    return availability.lacks(package)
