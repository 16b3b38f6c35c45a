"""The origin of a run: versions, commit, command, machine. This is an allow-list; the environment is never copied
whole.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from kha_train.config.compose import PACKAGE, shipped
from kha_train.stability.monitor import DETECTOR

PACKAGES = ("kha_train", "torch", "deepspeed", "numpy", "hydra-core", "sentencepiece", "safetensors", "wandb")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "LOCAL_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION",
    "SLURM_RESTART_COUNT",
    "TORCHELASTIC_RESTART_COUNT",
    "WORLD_SIZE",
)
"""The only environment variables that are recorded."""


def with_version(package: str) -> str:
    """Name and version, such as `kha_train 0.1.0`. A checkout that runs need not be installed."""
    return f"{package} {_version(package) or '(not installed)'}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package lies in; None for an installed wheel inside some other repository."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def code_sha256() -> str:
    """The SHA-256 of all `.py` and `.yaml` files of the package and of `configs`, with their names: a wheel and the
    checkout that it is of have the same, and changes that are not committed count.
    """
    configs = shipped("configs")
    apart = {configs, shipped("launch")}
    files = {f"configs/{file.relative_to(configs).as_posix()}": file for file in configs.rglob("*.yaml")}
    for file in PACKAGE.rglob("*"):
        if file.suffix in (".py", ".yaml") and apart.isdisjoint(file.parents):
            files[f"{PACKAGE.name}/{file.relative_to(PACKAGE).as_posix()}"] = file
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(f"{name}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


@cache
def _code_in_use() -> str:
    """Read once: what changes on the disk later is not what this process runs."""
    return code_sha256()


def collect_provenance(clean: Callable[[list[str]], list[str]] = list) -> dict[str, Any]:
    """What is known of this process without importing anything heavy. `clean` removes secrets from the command's
    arguments before they are quoted; the caller redacts the rest.
    """
    return {
        "command": shlex.join(clean(sys.orig_argv)),
        "git": _git_state(),
        "code_sha256": _code_in_use(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
        "detector": DETECTOR,
        "python": platform.python_version(),
        "host": {
            "name": socket.gethostname(),
            "system": platform.system(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
