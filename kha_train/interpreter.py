"""Checks that kha_train is installed in this Python. Uses only the standard library, in any version."""

from __future__ import annotations

import sys
from importlib.util import find_spec

OLDEST = (3, 11)
NEEDED = (
    "torch",
    "deepspeed",
    "hydra",
    "omegaconf",
    "yaml",
    "numpy",
    "sentencepiece",
    "wandb",
    "safetensors",
    "rich",
    "typer",
    "matplotlib",
    "packaging",
)
"""Import names of the dependencies in pyproject.toml."""


def complaint() -> str:
    """The line for a user whose Python cannot run kha_train, with the fix; "" when it can."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if sys.version_info >= OLDEST and not lacking:
        return ""
    version = ".".join(map(str, sys.version_info[:2]))
    old = f"is Python {version}, and 3.11 or newer is needed"
    why = f"has no {', '.join(lacking)}" if sys.version_info >= OLDEST else old
    return (
        f"{sys.executable} {why}: activate the environment that kha_train is installed in, "
        "`source .venv/bin/activate` (`make quickstart` makes it), or name its Python: .venv/bin/python, "
        "KHA_PYTHON=.venv/bin/python launch/local.sh"
    )


def require() -> None:
    """End the process with exit code 2 and the complaint, if there is one."""
    line = complaint()
    if line:
        print(f"configuration error: {line}", file=sys.stderr)
        sys.exit(2)
